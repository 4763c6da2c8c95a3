"""The policy's training batch, made of rollouts and their advantages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from prism_nemo.algorithms.metrics import MetricSums, mean_of, prefixed
from prism_nemo.algorithms.policy_loss import policy_loss
from prism_nemo.algorithms.rollout_correction import mismatch_metrics
from prism_nemo.config.schema import PolicyLossConfig
from prism_nemo.engine.runtime import Runtime
from prism_nemo.models.base import TrainingBatch
from prism_nemo.models.policy import PolicyOutput
from prism_nemo.packing.groups import Group, Segment
from prism_nemo.packing.rows import PackedRow, pack_rows
from prism_nemo.rollout.batch import RolloutBatch

MISMATCH_THRESHOLDS = (0.01, 0.1, 1.0)  # of |log p_trainer - log p_sampler|


def policy_rows(batch: RolloutBatch, *, max_tokens: int, runtime: Runtime) -> list[PackedRow]:
    """One group per prompt with all its rollouts as segments; a segment's `sample` is the rollout's number in the batch."""
    members: list[list[Segment]] = [[] for _ in batch.prompts]
    for index, rollout in enumerate(batch.rollouts):
        members[rollout.prompt_index].append(Segment(rollout.tokens, sample=index))
    groups = [Group(prompt, tuple(segments)) for prompt, segments in zip(batch.prompts, members, strict=True)]
    return pack_rows(groups, max_tokens=max_tokens, pad_multiple=runtime.row_multiple)


def policy_batch(
    batch: RolloutBatch,
    advantages: Tensor,
    parameters: PolicyLossConfig,
    runtime: Runtime,
    *,
    max_tokens: int,
    max_response_length: int,
    old_log_probs: Sequence[Tensor] | None = None,
) -> TrainingBatch:
    """The policy's step on rollouts with advantages [B].

    Without `old_log_probs` (one tensor per rollout) the ratio is taken against the very log-probabilities that are being trained,
    detached: exact as long as the batch is used for one optimizer step, and it saves a pass through the network.
    """
    rows = policy_rows(batch, max_tokens=max_tokens, runtime=runtime)
    counts = torch.tensor([float(batch.lengths.sum()), float(len(batch.rollouts))], dtype=torch.float64)
    global_tokens, global_sequences = runtime.sum_over_data_parallel(counts).clamp(min=1.0).tolist()
    return TrainingBatch(
        rows,
        partial(
            surrogate,
            batch=batch,
            advantages=advantages,
            parameters=parameters,
            global_tokens=global_tokens,
            global_sequences=global_sequences,
            max_response_length=max_response_length,
            old_log_probs=old_log_probs,
        ),
    )


def surrogate(
    row: PackedRow,
    output: PolicyOutput,
    *,
    batch: RolloutBatch,
    advantages: Tensor,
    parameters: PolicyLossConfig,
    global_tokens: float,
    global_sequences: float,
    max_response_length: int,
    old_log_probs: Sequence[Tensor] | None,
) -> tuple[Tensor, MetricSums]:
    """The clipped policy loss of one row, and how far the sampler's log-probabilities are from the trainer's."""
    device = output.log_probs.device
    members = row.segment_sample.tolist()
    old = (
        output.log_probs.detach() if old_log_probs is None else _concatenate([old_log_probs[index] for index in members], device)
    )
    result = policy_loss(
        output.log_probs,
        old,
        advantages.to(device, torch.float32)[row.sample_of_label],
        row.label_segment,
        global_tokens=global_tokens,
        global_sequences=global_sequences,
        parameters=parameters,
        max_response_length=max_response_length,
    )
    sampled = _concatenate([batch.rollouts[index].log_probs for index in members], device)
    mismatch = mismatch_metrics(output.log_probs.detach(), sampled, thresholds=MISMATCH_THRESHOLDS)
    metrics = {**result.metrics, **prefixed("mismatch", mismatch)}
    if output.entropy is not None:
        metrics["entropy"] = mean_of(output.entropy)
    return result.loss, metrics


def _concatenate(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat([torch.zeros(0), *parts]).to(device)
