"""Reinforcement learning with verifiable rewards: GRPO and its relatives.

    prism-nemo rlvr algorithm=grpo model.path=runs/align data.train=prompts.jsonl experiment.dir=runs/rlvr

One step: sample a group of rollouts for every prompt and reward each against the verified answer, with dynamic sampling until
there are enough groups that teach something; normalise within the group; update, once or in several mini-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from prism_nemo.algorithms.advantages import grpo_advantages
from prism_nemo.algorithms.metrics import MetricSums, mean_of
from prism_nemo.config.schema import RLVRConfig
from prism_nemo.config.validate import validate
from prism_nemo.data.chat import ChatEncoder
from prism_nemo.data.open import open_stream
from prism_nemo.data.records import Record
from prism_nemo.engine.runtime import Runtime, session
from prism_nemo.engine.step import reduce_metrics
from prism_nemo.evaluation.accuracy import HeldOutPrompts
from prism_nemo.models.policy import OutputDistribution, PolicyModel
from prism_nemo.packing.groups import EncodedPrompt
from prism_nemo.rewards.grader import Grader, check_answer
from prism_nemo.rewards.overlong import overlong_penalty
from prism_nemo.rollout.base import build_engine
from prism_nemo.rollout.batch import RolloutBatch
from prism_nemo.rollout.groups import Filling, GroupSampler, NoSignalError, Sampled
from prism_nemo.rollout.sampler import Prompts, Sampler
from prism_nemo.stages.ahead import BegunSteps, Saved
from prism_nemo.stages.loop import StageLoop
from prism_nemo.stages.policy_update import PolicyUpdate


class RLVRTrainer:
    """One policy step per global batch of prompts."""

    def __init__(self, config: RLVRConfig, runtime: Runtime, loop: StageLoop, grader: Grader) -> None:
        self.config = config
        self.runtime = runtime
        self.loop = loop
        self.policy = PolicyModel(config.model, config.parallel, runtime)
        self.policy.build_optimizer(config.optimizer, config.trainer.max_steps)
        self.models = {"policy": self.policy}
        self.encoder = ChatEncoder.from_directory(self.policy.assets, config.data, image_root=None)
        self.policy.distribution = OutputDistribution(config.rollout.temperature, self.encoder.banned_token_ids)
        engine = build_engine(config.rollout, self.policy, config.data, loop.directory)
        self.sampler = Sampler(engine, self.encoder, grader, runtime, config.runtime.seed)
        self.groups = GroupSampler(self.sampler, config)
        self.policy_update = PolicyUpdate(self.policy, config)
        self.stream = open_stream(config, self.encode, required=("answer",), batch_size=self.groups.generation_batch_size)
        self.begun = BegunSteps(config, loop, self.policy, self.sampler, self.stream, self.begin)
        self.held_out = HeldOutPrompts(self.sampler, config.data, limit=config.trainer.limit_val_samples)

    def encode(self, record: Record) -> EncodedPrompt:
        """Raises DataError for a record without an answer that can be verified, too."""
        check_answer(record)
        return self.encoder.encode_prompt(record)

    def fit(self) -> None:
        self.policy.prepare_for_training()
        for step in self.loop.steps(self):
            with self.loop.timed("rollout"):
                sampled = self.sample(step)
            rollouts = sampled.rollouts
            scores = self.scores(rollouts)
            advantages = grpo_advantages(scores, rollouts.group_ids, normalize_std=self.config.algorithm.normalize_std)

            with self.loop.timed("policy"):
                update = self.policy_update.run(step, rollouts, advantages, sampled.positions)

            ids = [record.id for record in rollouts.records]
            self.loop.guard(update.applied, "the gradient", ids, at_fault=update.at_fault)
            sums: MetricSums = {"reward": mean_of(scores), "advantage_magnitude": mean_of(advantages.abs()), **sampled.metrics}
            sums |= {**rollouts.staleness(step), **self.sampler.metrics()}
            self.loop.end_step(
                {**update.metrics, **reduce_metrics(sums, self.runtime)},
                rollouts.samples(self.config.trainer.log_samples, {"reward": scores.tolist(), "advantage": advantages.tolist()}),
            )
        self.policy.finish_training()

    def sample(self, step: int) -> Sampled:
        """The step's rollouts; with `max_staleness`, those of the next are generated from here on, while this one trains.

        What was trained so far is saved when no prompt teaches anything any more.
        """
        filling = self.begun.take(step)
        try:
            sampled = self.groups.finish(filling, self.draw, step=step)
        except NoSignalError:
            self.begun.give_back()
            self.loop.save(self, step)
            raise
        self.begun.go_on(step)
        return sampled

    def begin(self, step: int, saved: Saved | None) -> Filling:
        """Starts to sample the groups of step `step`; `saved` are sampled already.

        (What dynamic sampling draws beside those comes from the weights of now, not from those before, which are gone.)
        """
        return self.groups.begin(self.draw, step=step, saved=saved)

    def draw(self) -> tuple[Prompts, Sequence[int]]:
        """This rank's prompts of the next generation batch, and where they stood in it."""
        return self.loop.next_batch(self.stream), self.stream.positions

    def scores(self, rollouts: RolloutBatch) -> Tensor:
        """fp32 [B]: the rewards, less what responses near the length limit lose."""
        scores = torch.tensor([reward.score for reward in rollouts.rewards if reward is not None])  # every record has an answer
        algorithm = self.config.algorithm
        if not algorithm.overlong_buffer_length:
            return scores
        return scores + overlong_penalty(
            rollouts.lengths,
            max_response_length=self.config.data.max_response_length,
            buffer_length=algorithm.overlong_buffer_length,
            factor=algorithm.overlong_penalty_factor,
        )

    def run_validation(self) -> dict[str, float]:
        """Accuracy on held-out prompts, by the weights of now; nothing without a validation file."""
        self.begun.update_weights()
        return self.held_out.accuracy(self.config.rollout)

    def state_dict(self) -> dict[str, Any]:
        return self.begun.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begun.load_state_dict(state)


def run(config: RLVRConfig) -> None:
    """The `rlvr` command."""
    validate(config)
    with (
        Grader(config.reward) as grader,
        session(config.parallel, config.runtime) as runtime,
        StageLoop("rlvr", config, runtime) as loop,
    ):
        trainer = RLVRTrainer(config, runtime, loop, grader)
        with closing(trainer.sampler):
            trainer.fit()
