"""From prompts to rollouts that are sampled, read as text and graded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from prism_nemo.config.schema import RolloutConfig
from prism_nemo.data.chat import ChatEncoder
from prism_nemo.data.records import Record
from prism_nemo.engine.runtime import Runtime
from prism_nemo.packing.groups import EncodedPrompt
from prism_nemo.rewards.grader import Grader
from prism_nemo.rewards.registry import Reward
from prism_nemo.rollout.base import RolloutEngine, rollout_seed
from prism_nemo.rollout.batch import RolloutBatch, sampling_params


@dataclass(frozen=True, eq=False)
class Sampler:
    """A policy's engine with all that is needed to sample from it. Without a grader nothing is graded."""

    engine: RolloutEngine
    encoder: ChatEncoder
    grader: Grader | None
    runtime: Runtime
    seed: int

    def sample(self, batch: Sequence[tuple[Record, EncodedPrompt]], config: RolloutConfig, *, step: int) -> RolloutBatch:
        """`num_rollouts_per_prompt` responses to each prompt, seeded by the run's seed, the step, the record and their number.

        A collective of the ranks that hold one model.
        """
        count = config.num_rollouts_per_prompt
        records, prompts = [record for record, _ in batch], [prompt for _, prompt in batch]
        seeds = [rollout_seed(self.seed, step, record.id, index) for record in records for index in range(count)]
        rollouts = self.engine.generate(
            prompts, sampling_params(config, self.encoder), num_rollouts_per_prompt=count, seeds=seeds
        )
        texts = [self.encoder.decode(rollout.tokens) for rollout in rollouts]
        return RolloutBatch(records, prompts, rollouts, texts, self._grade(texts, [records[r.prompt_index] for r in rollouts]))

    def _grade(self, texts: Sequence[str], records: Sequence[Record]) -> Sequence[Reward | None]:
        """Graded once, by one of the ranks that hold one model: they must agree, and a judge is asked once."""
        if self.grader is None:
            return [None] * len(texts)
        return self.runtime.share_from_leader(partial(self.grader.grade, texts, records))
