"""The discriminator's work: scoring a prompt's teacher response against any number of other responses.

Warm-up pairs, the alignment game and the content probe are all comparisons. A prompt and its image run through the network once,
with the teacher's segments and all the others' behind it; one pass gives the scores and, in training, accumulates the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from prism_nemo.algorithms.discriminator_loss import (
    bradley_terry_loss,
    content_probe,
    discriminator_health,
    groups_without_spread,
    histogram_shares,
    score_regularization,
)
from prism_nemo.algorithms.metrics import MetricSums, merge
from prism_nemo.config.schema import DiscriminatorConfig
from prism_nemo.data.segments import KINDS
from prism_nemo.engine.runtime import Runtime
from prism_nemo.errors import ConfigError
from prism_nemo.models.base import TrainingBatch
from prism_nemo.packing.groups import EncodedPrompt, Group, Segment
from prism_nemo.packing.rows import PackedRow, pack_rows

TEACHER = -1  # `sample` of a teacher's segments; in a batch, comparison i's carry TEACHER - i


@dataclass(frozen=True, eq=False)
class Comparison:
    """One prompt, the teacher's segments, and those of every response compared with them.

    A response's segments carry its index in the batch as `sample`; the teacher's are told apart by `TEACHER`.
    """

    prompt: EncodedPrompt
    teacher: tuple[Segment, ...]
    students: tuple[tuple[Segment, ...], ...]

    def numbered(self, first: int) -> Comparison:
        """The same with its students' segments numbered from `first`."""
        students = tuple(
            tuple(replace(segment, sample=first + offset) for segment in student) for offset, student in enumerate(self.students)
        )
        return replace(self, students=students)


class ComparisonBatch:
    """One step of the discriminator on one data-parallel rank: rows, loss, and afterwards the scores.

    student_scores  float32 [responses, kinds], filled as rows run; NaN where a response is in no comparison
    teacher_scores  float32 [comparisons, kinds], filled likewise
    """

    def __init__(
        self,
        comparisons: Sequence[Comparison],
        num_students: int,
        config: DiscriminatorConfig,
        runtime: Runtime,
        *,
        max_tokens: int,
    ) -> None:
        self.config = config
        self.runtime = runtime
        self.kinds = KINDS[config.view]
        self.student_scores = torch.full((num_students, len(self.kinds)), float("nan"))
        self.teacher_scores = torch.full((len(comparisons), len(self.kinds)), float("nan"))
        self.comparison_of = torch.full((num_students,), -1)
        groups: list[Group] = []
        copies = []
        for index, comparison in enumerate(comparisons):
            for student in comparison.students:
                self.comparison_of[student[0].sample] = index
            pieces = _pieces(comparison, max_tokens)
            copies.append(len(pieces))
            groups += [_with_teacher(piece, index) for piece in pieces]
        self.copies = torch.tensor(copies, dtype=torch.float32)
        self.rows = pack_rows(groups, max_tokens=max_tokens, pad_multiple=runtime.row_multiple)
        counts = torch.tensor([float(self.compared.sum()), float(len(comparisons))], dtype=torch.float64)
        self.global_pairs, self.global_comparisons = runtime.sum_over_data_parallel(counts).clamp(min=1.0).tolist()

    @property
    def compared(self) -> Tensor:
        """Which responses are in a comparison and so have scores, bool [responses]."""
        return self.comparison_of >= 0

    @property
    def training_batch(self) -> TrainingBatch:
        return TrainingBatch(self.rows, self.loss)

    @property
    def probe_batch(self) -> TrainingBatch:
        """For the content probe: no loss, its own metrics."""
        return TrainingBatch(self.rows, self.probe)

    def loss(self, row: PackedRow, scores: Tensor) -> tuple[Tensor, MetricSums]:
        """Bradley-Terry over the row's pairs of every kind, divided by the global number of pairs, plus the score regularisation.

        The regularisation is `coefficient * mean(score^2)`, the mean over each of the score sets (teacher and student, per kind)
        and then over the sets. Where a comparison was cut over rows, its teacher's scores count once.
        """
        total = scores.sum() * 0.0
        metrics: MetricSums = {}
        for column, kind in enumerate(self.kinds):
            teacher, student, samples = self._pairs(row, scores, kind)
            self.student_scores[samples, column] = student.detach().float().cpu()
            teachers = ((row.segment_kind == kind) & (row.segment_sample < 0)).nonzero().flatten()
            self.teacher_scores[TEACHER - row.segment_sample[teachers].cpu(), column] = scores[teachers].detach().float().cpu()
            total = total + bradley_terry_loss(teacher, student, global_pairs=self.global_pairs)
            if self.config.score_regularization > 0:
                total = total + self._regularization(row, scores, student, kind)
            name = kind.name.lower()
            metrics = merge(metrics, discriminator_health(teacher, student, kind=name))
            metrics = merge(metrics, histogram_shares(teacher, kind=name, role="teacher"))
            metrics = merge(metrics, histogram_shares(student, kind=name, role="student"))
        return total, metrics

    def share_scores(self) -> None:
        """Gives every pipeline stage the scores, which the last one has, when all rows have run. A collective."""
        scores = self.runtime.broadcast_from_last_stage((self.student_scores, self.teacher_scores))
        self.student_scores, self.teacher_scores = scores

    def spread(self) -> MetricSums:
        """`groups_without_spread` of every kind, when all rows have run: the rows may each hold but a part of a comparison."""
        metrics: MetricSums = {}
        compared = self.compared
        for column, kind in enumerate(self.kinds):
            scores = self.student_scores[compared, column]
            metrics |= groups_without_spread(scores, self.comparison_of[compared], kind=kind.name.lower())
        return metrics

    def probe(self, row: PackedRow, scores: Tensor) -> tuple[Tensor, MetricSums]:
        metrics: MetricSums = {}
        for kind in self.kinds:
            teacher, student, _ = self._pairs(row, scores, kind)
            metrics = merge(metrics, content_probe(teacher, student, kind=kind.name.lower()))
        return scores.sum() * 0.0, metrics

    def _pairs(self, row: PackedRow, scores: Tensor, kind: int) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher's and student's scores of every pair of a kind in the row, and the student's index."""
        teacher_at: dict[int, int] = {}
        pairs: list[tuple[int, int, int]] = []
        kinds = row.segment_kind.tolist()
        for position, sample in enumerate(row.segment_sample.tolist()):
            if kinds[position] != kind:
                continue
            if sample < 0:
                teacher_at[TEACHER - sample] = position
            else:
                pairs.append((position, sample, int(self.comparison_of[sample])))
        students = torch.tensor([position for position, _, _ in pairs], dtype=torch.int64, device=scores.device)
        teachers = torch.tensor([teacher_at[number] for _, _, number in pairs], dtype=torch.int64, device=scores.device)
        samples = torch.tensor([sample for _, sample, _ in pairs], dtype=torch.int64)
        return scores[teachers], scores[students], samples

    def _regularization(self, row: PackedRow, scores: Tensor, student: Tensor, kind: int) -> Tensor:
        mine = ((row.segment_kind == kind) & (row.segment_sample < 0)).nonzero().flatten()
        copies = self.copies.to(scores.device)[TEACHER - row.segment_sample[mine]]
        teacher = score_regularization(scores[mine] / copies.sqrt(), global_count=self.global_comparisons)
        both = teacher + score_regularization(student, global_count=self.global_pairs)
        return self.config.score_regularization * both / (2 * len(self.kinds))


def _with_teacher(comparison: Comparison, index: int) -> Group:
    teacher = tuple(Segment(segment.tokens, TEACHER - index, segment.kind) for segment in comparison.teacher)
    return Group(comparison.prompt, teacher + tuple(segment for student in comparison.students for segment in student))


def _pieces(comparison: Comparison, max_tokens: int) -> list[Comparison]:
    """Cuts a comparison that exceeds the row budget; every piece has the prompt and the teacher's segments.

    Scores, loss and regularisation are those of the whole comparison. The router's load balancing is not: to it each piece is a
    group, in which the prompt's and the teacher's tokens count once more.
    """
    base = len(comparison.prompt) + sum(len(segment) for segment in comparison.teacher)
    pieces: list[list[tuple[Segment, ...]]] = [[]]
    used = base
    for student in comparison.students:
        size = sum(len(segment) for segment in student)
        if base + size > max_tokens:
            raise ConfigError(
                f"a prompt with the teacher's and one student's segments has {base + size} tokens, a row holds {max_tokens}",
                where="trainer.max_tokens_per_row",
                remedy="raise it to data.max_prompt_length + 2 x data.max_response_length",
            )
        if pieces[-1] and used + size > max_tokens:
            pieces.append([])
            used = base
        pieces[-1].append(student)
        used += size
    return [Comparison(comparison.prompt, comparison.teacher, tuple(piece)) for piece in pieces]
