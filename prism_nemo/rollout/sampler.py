"""From prompts to rollouts that are sampled, read as text and graded."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from prism_nemo.config.schema import RolloutConfig
from prism_nemo.data.chat import ChatEncoder
from prism_nemo.data.records import Record
from prism_nemo.engine.runtime import Runtime
from prism_nemo.packing.groups import EncodedPrompt
from prism_nemo.rewards.grader import Grader
from prism_nemo.rewards.registry import Reward
from prism_nemo.rollout.base import RolloutEngine, rollout_seed
from prism_nemo.rollout.batch import RolloutBatch, sampling_params

Prompts = Sequence[tuple[Record, EncodedPrompt]]


@dataclass(frozen=True, eq=False)
class Sampler:
    """A policy's engine with all that is needed to sample from it. Without a grader nothing is graded."""

    engine: RolloutEngine
    encoder: ChatEncoder
    grader: Grader | None
    runtime: Runtime
    seed: int
    _background: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "grading"), init=False, repr=False)

    def sample(self, batch: Prompts, config: RolloutConfig, *, step: int) -> RolloutBatch:
        """`num_rollouts_per_prompt` graded responses to each prompt. A collective."""
        return self.begin(batch, config, step=step).result()

    def begin(self, batch: Prompts, config: RolloutConfig, *, step: int, attempt: int = 0) -> PendingRollouts:
        """Samples, and leaves the grading to the background: more can be sampled meanwhile.

        Seeds depend on the run's seed, the step, the record and the response's number, and on `attempt`: a prompt that comes up
        again within a step gets other responses. A collective of the ranks that hold one model.
        """
        count = config.num_rollouts_per_prompt
        records, prompts = [record for record, _ in batch], [prompt for _, prompt in batch]
        keys = [record.id if attempt == 0 else f"{record.id} {attempt}" for record in records]
        seeds = [rollout_seed(self.seed, step, key, index) for key in keys for index in range(count)]
        rollouts = self.engine.generate(
            prompts, sampling_params(config, self.encoder), num_rollouts_per_prompt=count, seeds=seeds
        )
        texts = [self.encoder.decode(rollout.tokens) for rollout in rollouts]
        sampled = RolloutBatch(records, prompts, rollouts, texts, [None] * len(texts))
        if self.grader is None:
            return PendingRollouts(sampled, None, self.runtime)
        # Once per model: the ranks that hold it must agree, and what judges may cost.
        grades = None
        if self.runtime.is_leader:
            graded = [records[rollout.prompt_index] for rollout in rollouts]
            grades = self._background.submit(self.grader.grade, texts, graded)
        return PendingRollouts(sampled, grades, self.runtime, shared=True)


@dataclass(frozen=True, eq=False)
class PendingRollouts:
    """Rollouts whose grades are on their way."""

    sampled: RolloutBatch
    grades: Future[list[Reward | None]] | None
    runtime: Runtime
    shared: bool = False

    def result(self) -> RolloutBatch:
        """The graded rollouts. A collective over all ranks."""
        if not self.shared:
            return self.sampled
        return replace(self.sampled, rewards=self.runtime.share_from_leader(self._wait))

    def _wait(self) -> list[Reward | None]:
        assert self.grades is not None, "the leader grades"
        return self.grades.result()
