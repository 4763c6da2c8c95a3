"""The policy's training batch, made of rollouts and their advantages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from prism_nemo.algorithms.metrics import MetricSums, mean_of, prefixed
from prism_nemo.algorithms.policy_loss import policy_loss
from prism_nemo.algorithms.rollout_correction import correction_weights, mismatch_metrics
from prism_nemo.config.enums import RolloutCorrection
from prism_nemo.config.schema import PolicyLossConfig
from prism_nemo.engine.runtime import Runtime
from prism_nemo.models.base import TrainingBatch
from prism_nemo.models.policy import PolicyModel, PolicyOutput
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


def log_probs_of_rollouts(policy: PolicyModel, rows: Sequence[PackedRow], count: int) -> list[Tensor]:
    """The policy's log-probabilities of `count` rollouts, each fp32 [its tokens] on the CPU, from rows that hold all of them."""
    result = [torch.zeros(0)] * count
    for row, log_probs in zip(rows, policy.get_inference_log_probs(rows), strict=True):
        lengths = torch.bincount(row.label_segment, minlength=row.num_segments).tolist()
        for index, part in zip(row.segment_sample.tolist(), log_probs.cpu().split(lengths), strict=True):
            result[index] = part
    return result


def policy_batch(
    rows: Sequence[PackedRow],
    batch: RolloutBatch,
    advantages: Tensor,
    parameters: PolicyLossConfig,
    runtime: Runtime,
    *,
    max_response_length: int,
    old_log_probs: Sequence[Tensor] | None = None,
    reference_log_probs: Sequence[Tensor] | None = None,
) -> TrainingBatch:
    """The policy's step on rollouts, packed into `rows` (`policy_rows`), with advantages [B].

    Without `old_log_probs` (one tensor per rollout) the ratio is taken against the very log-probabilities that are being trained,
    detached: exact as long as no optimizer step lies between sampling and this one, and it saves a pass through the network.
    """
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
            reference_log_probs=reference_log_probs,
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
    reference_log_probs: Sequence[Tensor] | None,
) -> tuple[Tensor, MetricSums]:
    """The clipped policy loss of one row, and how far the sampler's log-probabilities are from the trainer's."""
    device = output.log_probs.device
    members = row.segment_sample.tolist()
    sampled = _concatenate([batch.rollouts[index].log_probs for index in members], device)
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
        reference_log_probs=None
        if reference_log_probs is None
        else _concatenate([reference_log_probs[index] for index in members], device),
        correction_weights=_correction(old, sampled, row.label_segment, parameters),
    )
    mismatch = mismatch_metrics(old, sampled, thresholds=MISMATCH_THRESHOLDS)
    metrics = {**result.metrics, **prefixed("mismatch", mismatch)}
    if output.entropy is not None:
        metrics["entropy"] = mean_of(output.entropy)
    return result.loss, metrics


def _correction(old: Tensor, sampled: Tensor, sequence_index: Tensor, parameters: PolicyLossConfig) -> Tensor | None:
    """Weights [N] that make tokens from the sampler's distribution count as if they were from the trainer's of that time."""
    if parameters.rollout_correction is RolloutCorrection.none:
        return None
    return correction_weights(
        old,
        sampled,
        sequence_index,
        per_sequence=parameters.rollout_correction is RolloutCorrection.sequence,
        truncation=parameters.correction_truncation,
        max_log_ratio=parameters.max_log_ratio,
    )


def _concatenate(parts: Sequence[Tensor], device: torch.device) -> Tensor:
    return torch.cat([torch.zeros(0), *parts]).to(device)
