"""The way from the policy's ranks to the discriminator's and back, where the two models are cut over the ranks differently.

Comparisons are made where the rollouts are, on the policy's data-parallel ranks; they are scored on the discriminator's. Each is
sent once to every rank that needs it, and its scores come back. With one layout for both nothing is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prism_nemo.engine.runtime import Runtime
from prism_nemo.packing.groups import SegmentKind
from prism_nemo.stages.comparisons import Comparison, ComparisonBatch


@dataclass(frozen=True, eq=False)
class Scores:
    """The discriminator's scores of this policy rank's rollouts.

    student_scores  float32 [responses, kinds]     NaN where a response is in no comparison
    teacher_scores  float32 [comparisons, kinds]
    compared        bool    [responses]
    batch           what this rank of the discriminator scored
    """

    kinds: tuple[SegmentKind, ...]
    student_scores: Tensor
    teacher_scores: Tensor
    compared: Tensor
    batch: ComparisonBatch


@dataclass(frozen=True, eq=False)
class _Sent:
    """A comparison on its way: which of which policy rank's it is, and the samples that its students had there."""

    source: int  # data-parallel rank of the policy
    index: int
    samples: tuple[int, ...]
    comparison: Comparison | None  # None on the way back


class Crossing:
    """One step's comparisons from `policy` ranks to `discriminator` ranks, and their scores back."""

    def __init__(self, comparisons: Sequence[Comparison], num_students: int, *, policy: Runtime, discriminator: Runtime) -> None:
        """Of this policy rank: its comparisons, and how many responses it has, compared or not. A collective."""
        self._policy, self._discriminator = policy, discriminator
        self._own, self._num_students = comparisons, num_students
        self._same = policy.layout is discriminator.layout
        self._arrived: list[_Sent] = [] if self._same else self._exchange()

    @property
    def comparisons(self) -> list[Comparison]:
        """What this rank of the discriminator has to score, the students numbered through."""
        if self._same:
            return list(self._own)
        numbered, count = [], 0
        for sent in self._arrived:
            assert sent.comparison is not None
            numbered.append(sent.comparison.numbered(count))
            count += len(sent.samples)
        return numbered

    @property
    def num_students(self) -> int:
        return self._num_students if self._same else sum(len(sent.samples) for sent in self._arrived)

    def back(self, batch: ComparisonBatch) -> Scores:
        """The scores of this policy rank's own responses and comparisons, from `batch` of `comparisons`. A collective."""
        if self._same:
            return Scores(batch.kinds, batch.student_scores, batch.teacher_scores, batch.compared, batch)
        scored, count = [], 0
        for number, sent in enumerate(self._arrived):
            students = batch.student_scores[count : count + len(sent.samples)]
            scored.append((replace(sent, comparison=None), students, batch.teacher_scores[number]))
            count += len(sent.samples)
        student = torch.full((self._num_students, len(batch.kinds)), float("nan"))
        teacher = torch.full((len(self._own), len(batch.kinds)), float("nan"))
        compared = torch.zeros(self._num_students, dtype=torch.bool)
        for share in self._discriminator.gather_objects(scored):
            for sent, students, of_teacher in share:
                if sent.source == self._policy.data_parallel_rank:
                    samples = torch.tensor(sent.samples, dtype=torch.int64)
                    student[samples], teacher[sent.index], compared[samples] = students, of_teacher, True
        return Scores(batch.kinds, student, teacher, compared, batch)

    def _exchange(self) -> list[_Sent]:
        """Sends comparisons round robin over the discriminator's ranks; what arrives here, in an order all ranks agree on."""
        policy = self._policy
        places = policy.gather_objects_over_all((policy.data_parallel_rank, self._discriminator.data_parallel_rank))
        first = sum(policy.gather_objects(len(self._own))[: policy.data_parallel_rank])
        holders = [rank for rank, (source, _) in enumerate(places) if source == policy.data_parallel_rank]
        outgoing: list[list[_Sent]] = [[] for _ in places]
        for rank, (_, wanted) in enumerate(places):
            if holders[rank % len(holders)] != policy.rank:
                continue  # another rank that holds the same comparisons sends them
            for index, comparison in enumerate(self._own):
                if (first + index) % self._discriminator.data_parallel_size == wanted:
                    samples = tuple(student[0].sample for student in comparison.students)
                    outgoing[rank].append(_Sent(policy.data_parallel_rank, index, samples, comparison))
        incoming = policy.exchange_objects(outgoing)
        return sorted((sent for share in incoming for sent in share), key=lambda sent: (sent.source, sent.index))
