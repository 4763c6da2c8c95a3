"""The policy's optimizer steps on one batch of rollouts, the same in alignment and RLVR."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from prism_nemo.algorithms.metrics import MetricSums, finalize, merge
from prism_nemo.config.schema import AlignConfig, ModelConfig, RLVRConfig
from prism_nemo.models.policy import PolicyModel
from prism_nemo.rollout.batch import RolloutBatch
from prism_nemo.stages.policy_batch import log_probs_of_rollouts, policy_batch, policy_rows


@dataclass(frozen=True)
class Updated:
    """Whether every optimizer step was applied (each gradient was finite), and the means of the steps' metrics.

    at_fault   whether this rank's own part of a gradient was not finite
    """

    applied: bool
    metrics: dict[str, float]
    at_fault: bool = False


class PolicyUpdate:
    """Takes `algorithm.num_mini_batches` steps, each on its share of the prompts.

    The ratio of the first mini-batch is 1: nothing has changed since its rollouts were sampled, and no pass is needed for its old
    log-probabilities. Those of the later ones are computed before the first step. With one mini-batch, as PRISM runs it, clipping
    therefore never acts; the metrics `ratio_is_one` and `clip_fraction_…` say how it is.
    """

    def __init__(self, policy: PolicyModel, config: AlignConfig | RLVRConfig) -> None:
        """Loads the reference policy where the loss has a divergence from it."""
        self.policy = policy
        self.loss = config.algorithm.policy_loss
        self.num_mini_batches = config.algorithm.num_mini_batches
        self.rows = partial(policy_rows, max_tokens=config.trainer.max_tokens_per_row, runtime=policy.runtime)
        self.max_response_length = config.data.max_response_length
        self.global_batch_size = config.trainer.global_batch_size
        self.reference: PolicyModel | None = None
        if self.loss.kl_coefficient > 0:
            model = frozen(config.model, path=self.loss.reference_path)
            self.reference = PolicyModel(model, config.parallel, policy.runtime, policy.distribution)

    def run(self, step: int, rollouts: RolloutBatch, advantages: Tensor, positions: Sequence[int]) -> Updated:
        """Updates the policy from rollouts with advantages [B], all steps at the learning rate of step `step`.

        positions: of this rank's prompts in the global batch. A collective.
        """
        parts = [self.part(number, rollouts, advantages, positions) for number in range(self.num_mini_batches)]
        packed = [self.rows(batch) for batch, _ in parts]
        old: list[list[Tensor] | None] = [None] * len(parts)
        for number in range(1, len(parts)):
            old[number] = log_probs_of_rollouts(self.policy, packed[number], len(parts[number][0].rollouts))

        results = []
        for (batch, values), rows, before in zip(parts, packed, old, strict=True):
            if len(parts) > 1 and self.policy.runtime.max_over_data_parallel(len(rows)) == 0:
                continue  # all its records were unusable: Adam would move on its momentum alone
            reference = None
            if self.reference is not None:
                reference = log_probs_of_rollouts(self.reference, rows, len(batch.rollouts))
            training_batch = policy_batch(
                rows,
                batch,
                values,
                self.loss,
                self.policy.runtime,
                max_response_length=self.max_response_length,
                old_log_probs=before,
                reference_log_probs=reference,
            )
            self.policy.prepare_for_training_step()
            loss, metrics = self.policy.get_loss_and_metrics(training_batch, forward_only=False)
            self.policy.finish_training_step()
            update = self.policy.optimizer_step(step)
            metrics = {"loss": loss, **metrics, "grad_norm": update.grad_norm, "learning_rate": update.learning_rate}
            results.append(Updated(update.applied, metrics, update.at_fault))
        return mean_of_updates(results)

    def part(
        self, number: int, rollouts: RolloutBatch, advantages: Tensor, positions: Sequence[int]
    ) -> tuple[RolloutBatch, Tensor]:
        """This rank's rollouts and advantages of mini-batch `number`.

        The global batch is cut evenly in its order: at any number of ranks a mini-batch has the same prompts.
        """
        if self.num_mini_batches == 1:
            return rollouts, advantages
        members = [
            index
            for index, position in enumerate(positions)
            if position * self.num_mini_batches // self.global_batch_size == number
        ]
        return rollouts.select(members), advantages[torch.isin(rollouts.group_ids, torch.tensor(members, dtype=torch.int64))]


def frozen(config: ModelConfig, *, path: str | None) -> ModelConfig:
    """A model that is only asked: without gradients, and so without their memory."""
    return replace(config, path=path or config.path, freeze_vision_model=True, freeze_language_model=True)


def mean_of_updates(updates: Sequence[Updated]) -> Updated:
    """Metrics that a step did not measure do not count into their means; a mini-batch counts as one, whatever its size."""
    total: MetricSums = {}
    for update in updates:
        total = merge(total, {name: (value, 1.0) for name, value in update.metrics.items()})
    at_fault = any(update.at_fault for update in updates)
    return Updated(all(update.applied for update in updates), finalize(total), at_fault)
