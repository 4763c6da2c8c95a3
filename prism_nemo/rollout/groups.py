"""The groups of rollouts that a step trains on: those of one batch of prompts, or with DAPO only groups that have a signal.

A group has a signal when its answers are not all equally right: then its advantages are not all zero. Dynamic sampling replaces
the others by groups of further prompts until the batch is full. While one generation batch is graded in the background the next
is sampled, as long as the share of signals so far says that it will be needed. What is drawn and kept depends on counts over all
ranks alone, never on time or on how prompts lie on ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from prism_nemo.algorithms.metrics import MetricSums, merge
from prism_nemo.config.schema import RLVRConfig
from prism_nemo.engine.runtime import Runtime
from prism_nemo.errors import DataError
from prism_nemo.rollout.ahead import unpacked
from prism_nemo.rollout.base import rollout_seed
from prism_nemo.rollout.batch import RolloutBatch, join
from prism_nemo.rollout.sampler import PendingRollouts, Prompts, Sampler


@dataclass(frozen=True, eq=False)
class Sampled:
    """This data-parallel rank's rollouts to train on, and measures of all rollouts that were sampled for them."""

    rollouts: RolloutBatch
    metrics: MetricSums
    positions: Sequence[int]  # of this rank's prompts in the global batch


Draw = Callable[[], tuple[Prompts, Sequence[int]]]


class NoSignalError(DataError):
    """Dynamic sampling found too few groups with a signal. All ranks raise it alike."""


@dataclass(frozen=True)
class _Place:
    """Where a group with a signal is; groups are in the order of generation batch and key, the same at any number of ranks."""

    generation_batch: int
    key: int
    data_parallel_rank: int
    index: int  # among the rank's groups of that generation batch

    @property
    def order(self) -> tuple[int, int, int, int]:
        return self.generation_batch, self.key, self.data_parallel_rank, self.index


@dataclass(eq=False)
class Filling:
    """A step's batch while it fills.

    first       its first generation batch, the only one where nothing is replaced
    positions   of this rank's prompts in that
    """

    first: PendingRollouts
    positions: Sequence[int]
    kept: list[_Place] = field(default_factory=list)
    mine: dict[_Place, RolloutBatch] = field(default_factory=dict)
    pending: deque[PendingRollouts] = field(default_factory=deque)
    drawn: int = 1  # generation batches
    graded: int = 0  # groups
    all_right: int = 0
    metrics: MetricSums = field(default_factory=dict)


class GroupSampler:
    """Samples a step's groups as `config.algorithm` asks."""

    def __init__(self, sampler: Sampler, config: RLVRConfig) -> None:
        self.sampler = sampler
        self.runtime: Runtime = sampler.runtime
        self.rollout = config.rollout
        self.algorithm = config.algorithm
        self.needed = config.trainer.global_batch_size
        self.generation_batch_size = config.algorithm.generation_batch_size or self.needed

    def sample(self, draw: Draw, *, step: int) -> Sampled:
        """`begin` and `finish`."""
        return self.finish(self.begin(draw, step=step), draw, step=step)

    def begin(self, draw: Draw, *, step: int, saved: Sequence[dict[str, Any]] | None = None) -> Filling:
        """Starts on a step's groups. `draw` gives this rank's prompts of the next generation batch, and where they stood in it.

        saved: what `ahead.packed` made of the first generation batch, which is then not sampled once more. A collective.
        """
        prompts, positions = draw()
        given = None if saved is None else unpacked(saved, positions)
        first = self.sampler.begin(prompts, self.rollout, step=step, given=given)
        return Filling(first, positions, pending=deque([first]))

    def finish(self, filling: Filling, draw: Draw, *, step: int) -> Sampled:
        """The groups that were begun, all of them with a signal where the algorithm asks for that. A collective.

        Raises NoSignalError when dynamic sampling has drawn `max_generation_batches` and not found enough groups with a signal.
        """
        if not self.algorithm.dynamic_sampling:
            rollouts = filling.first.result()
            signals = [has_signal(rollouts, prompt) for prompt in range(len(rollouts.prompts))]
            share = float(sum(signals)), float(len(signals))
            return Sampled(rollouts, {**rollouts.metrics(), **rollouts.grading, "groups_with_signal": share}, filling.positions)
        while True:
            if self._draws_more(filling):
                batch = self.sampler.begin(draw()[0], self.rollout, step=step, attempt=filling.drawn)
                filling.pending.append(batch)
                filling.drawn += 1
            elif filling.pending:
                self._collect(filling, step)
            else:
                break
        if len(filling.kept) < self.needed:
            raise self._exhausted(filling)
        return self._finish(filling)

    def _draws_more(self, filling: Filling) -> bool:
        """Whether what is kept and pending will not do, by the share of signals so far; at first all are taken to have one.

        At most one batch is sampled ahead of the grades: the share of a bad beginning says little.
        """
        if filling.drawn == self.algorithm.max_generation_batches or len(filling.pending) > 1:
            return False
        share = len(filling.kept) / filling.graded if filling.graded else 1.0
        return len(filling.kept) + share * self.generation_batch_size * len(filling.pending) < self.needed

    def _collect(self, filling: Filling, step: int) -> None:
        """Takes the oldest pending rollouts in, on every rank."""
        number = filling.drawn - len(filling.pending)
        rollouts = filling.pending.popleft().result()
        filling.metrics = merge(filling.metrics, {**rollouts.metrics(), **rollouts.grading})
        groups = range(len(rollouts.prompts))
        mine = [
            _Place(number, rollout_seed(0, step, rollouts.records[group].id, 0), self.runtime.data_parallel_rank, group)
            for group in groups
            if has_signal(rollouts, group)
        ]
        filling.mine |= {place: rollouts.select([place.index]) for place in mine}
        all_right = sum(min(_accuracies(rollouts, group)) == 1.0 for group in groups)
        for places, count, right in self.runtime.gather_objects((mine, len(groups), all_right)):
            filling.kept += places
            filling.graded += count
            filling.all_right += right

    def _finish(self, filling: Filling) -> Sampled:
        """The first groups in order, dealt to the ranks in turn, so that all have equally many."""
        chosen = sorted(filling.kept, key=lambda place: place.order)[: self.needed]
        size = self.runtime.data_parallel_size
        counted = 1.0 if self.runtime.data_parallel_rank == 0 else 0.0  # the counts are of all ranks, and sums are over ranks
        metrics: MetricSums = {
            **filling.metrics,
            "groups_with_signal": (counted * len(filling.kept), counted * filling.graded),
            "dynamic_sampling/generation_batches": (counted * filling.drawn, counted),
            "dynamic_sampling/surplus_groups": (counted * (len(filling.kept) - self.needed), counted),
            "dynamic_sampling/all_right": (counted * filling.all_right, counted * filling.graded),
        }
        if size == 1:
            return Sampled(join([filling.mine[place] for place in chosen]), metrics, range(self.needed))
        peers = self.runtime.gather_objects(self.runtime.rank)  # the processes that hold the same part of the model
        outgoing: list[dict[int, RolloutBatch]] = [{} for _ in range(self.runtime.world_size)]
        for position, place in enumerate(chosen):
            if place.data_parallel_rank == self.runtime.data_parallel_rank:
                outgoing[peers[position % size]][position] = filling.mine[place]
        arrived: dict[int, RolloutBatch] = {}
        for part in self.runtime.exchange_objects(outgoing):
            arrived |= part
        positions = sorted(arrived)
        return Sampled(join([arrived[position] for position in positions]), metrics, positions)

    def _exhausted(self, filling: Filling) -> NoSignalError:
        algorithm = self.algorithm
        none_right = filling.graded - len(filling.kept) - filling.all_right
        easier = none_right >= filling.all_right
        return NoSignalError(
            f"{filling.drawn} generation batches of {self.generation_batch_size} prompts gave {len(filling.kept)} groups with a "
            f"signal, a step needs {self.needed}; of {filling.graded} groups {filling.all_right} were all right and {none_right} "
            "without a difference otherwise, mostly all wrong",
            where="algorithm.dynamic_sampling",
            remedy=f"train on {'easier' if easier else 'harder'} prompts, raise rollout.num_rollouts_per_prompt (now "
            f"{self.rollout.num_rollouts_per_prompt}), lower trainer.global_batch_size, or set "
            "algorithm.dynamic_sampling=false, in a new run from this one's weights, which are saved; or go on with more than "
            f"algorithm.max_generation_batches={algorithm.max_generation_batches}",
        )


def has_signal(rollouts: RolloutBatch, prompt: int) -> bool:
    """Whether the answers to a prompt are not all equally right."""
    return len(set(_accuracies(rollouts, prompt))) > 1


def _accuracies(rollouts: RolloutBatch, prompt: int) -> list[float]:
    members = zip(rollouts.rollouts, rollouts.rewards, strict=True)
    return [reward.accuracy for rollout, reward in members if rollout.prompt_index == prompt and reward is not None]
