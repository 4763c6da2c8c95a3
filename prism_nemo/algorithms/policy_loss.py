"""The clipped policy loss; GRPO, DAPO, GSPO and Dr.GRPO are values of its parameters (`config.schema.PolicyLossConfig`).

A token's ratio r is exp(log_prob - old_log_prob), or for GSPO that of its sequence, exp(mean_t(log_prob - old_log_prob)).
Its loss is `-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`, bounded from above by `-dual_clip * A` where A < 0, plus
`kl_coefficient` times the estimated
divergence from a reference policy. Losses are summed and divided by counts of the whole global batch, so that the result does not
depend on how the batch is cut into micro-batches or spread over ranks: add the losses, do not average them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prism_nemo.algorithms.kl import kl_estimate, kl_k3
from prism_nemo.algorithms.metrics import MetricSums, mean_of
from prism_nemo.config.enums import Aggregation, RatioKind
from prism_nemo.config.schema import PolicyLossConfig


@dataclass(frozen=True, eq=False)
class PolicyLossOutput:
    """`loss` a scalar with gradient; `metrics` sums and counts over this micro-batch's tokens, without gradient."""

    loss: Tensor
    metrics: MetricSums


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    sequence_index: Tensor,
    *,
    global_tokens: Tensor | float,
    global_sequences: Tensor | float,
    parameters: PolicyLossConfig,
    max_response_length: int | None = None,
    reference_log_probs: Tensor | None = None,
    correction_weights: Tensor | None = None,
) -> PolicyLossOutput:
    """Loss of the response tokens of one micro-batch; N may be 0, the loss is then a zero that keeps the graph.

    log_probs            float [N]  of the policy being trained; the only argument that receives a gradient
    old_log_probs        float [N]  of the policy that the ratio is taken against
    advantages           float [N]  every token carries its sequence's advantage
    sequence_index       int   [N]  which sequence a token belongs to; a sequence lies wholly inside one micro-batch
    global_tokens        response tokens of the global batch (all micro-batches, all ranks)
    global_sequences     sequences of the global batch
    max_response_length  tokens; needed by `Aggregation.constant_length` alone
    reference_log_probs  float [N]  of the reference policy; needed when `kl_coefficient` is not 0
    correction_weights   float [N]  factors on the surrogate from `rollout_correction.correction_weights`

    Computes in float32, in float64 when log_probs are float64. With the sequence ratio, the gradient is that of the ratio
    itself and reaches every token of the sequence; where a sequence's tokens share one advantage it equals GSPO's token form.

    Metrics: `clip_fraction_low`, `clip_fraction_high`, `clip_fraction_dual` (share of tokens without a surrogate gradient
    for that reason), `ratio`, `ratio_is_one` (share of tokens with a ratio of exactly 1: at 1.0 no clipping can act),
    `approx_kl` (k3 estimate of KL(old || new)), and with a reference `reference_kl`.
    """
    _check_shapes(log_probs, old_log_probs, advantages, sequence_index, reference_log_probs, correction_weights)
    dtype = torch.float64 if log_probs.dtype == torch.float64 else torch.float32
    log_probs = log_probs.to(dtype)
    old_log_probs = old_log_probs.detach().to(dtype)
    advantages = advantages.detach().to(dtype)
    sequences = _Sequences.of(sequence_index)

    log_ratio = log_probs - old_log_probs
    if parameters.ratio == RatioKind.sequence:
        log_ratio = sequences.mean(log_ratio)[sequences.index]
    ratio = log_ratio.clamp(-parameters.max_log_ratio, parameters.max_log_ratio).exp()
    losses = -_surrogate(ratio, advantages, parameters)
    if correction_weights is not None:
        losses = losses * correction_weights.detach().to(dtype)

    metrics = _metrics(log_probs.detach(), old_log_probs, ratio.detach(), advantages, parameters)
    if reference_log_probs is not None:
        reference = reference_log_probs.detach().to(dtype)
        kl = kl_estimate(log_probs, reference, parameters.kl_estimator, max_log_ratio=parameters.max_log_ratio)
        metrics["reference_kl"] = mean_of(kl)
        if parameters.kl_coefficient != 0:
            losses = losses + parameters.kl_coefficient * kl
    elif parameters.kl_coefficient != 0:
        raise ValueError("kl_coefficient is not 0, so reference_log_probs are needed")

    loss = _aggregate(losses, sequences, parameters.aggregation, global_tokens, global_sequences, max_response_length)
    if log_probs.numel() == 0:
        loss = log_probs.sum() * 0  # global counts may be 0 as well: no division
    return PolicyLossOutput(loss=loss, metrics=metrics)


@dataclass(frozen=True, eq=False)
class _Sequences:
    """Sequence numbers made dense: `index` int64 [N] in 0 .. sequences - 1, `lengths` int64 [sequences] in tokens."""

    index: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, sequence_index: Tensor) -> _Sequences:
        _, index, lengths = torch.unique(sequence_index, return_inverse=True, return_counts=True)
        return cls(index=index, lengths=lengths)

    def mean(self, values: Tensor) -> Tensor:
        """[N] -> [sequences]."""
        return values.new_zeros(self.lengths.shape).index_add(0, self.index, values) / self.lengths


def _surrogate(ratio: Tensor, advantages: Tensor, parameters: PolicyLossConfig) -> Tensor:
    clipped = ratio.clamp(1 - parameters.clip_low, 1 + parameters.clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    if parameters.dual_clip is not None:
        bounded = torch.maximum(surrogate, parameters.dual_clip * advantages)
        surrogate = torch.where(advantages < 0, bounded, surrogate)
    return surrogate


def _aggregate(
    losses: Tensor,
    sequences: _Sequences,
    aggregation: Aggregation,
    global_tokens: Tensor | float,
    global_sequences: Tensor | float,
    max_response_length: int | None,
) -> Tensor:
    if losses.numel() == 0:
        return losses.sum()
    if aggregation == Aggregation.token_mean:
        return losses.sum() / global_tokens
    if aggregation == Aggregation.sequence_mean:
        return sequences.mean(losses).sum() / global_sequences
    if max_response_length is None:
        raise ValueError("constant_length aggregation needs max_response_length")
    return losses.sum() / (global_sequences * max_response_length)


def _metrics(
    log_probs: Tensor, old_log_probs: Tensor, ratio: Tensor, advantages: Tensor, parameters: PolicyLossConfig
) -> MetricSums:
    metrics: MetricSums = {
        "clip_fraction_low": mean_of((advantages < 0) & (ratio < 1 - parameters.clip_low)),
        "clip_fraction_high": mean_of((advantages > 0) & (ratio > 1 + parameters.clip_high)),
        "ratio": mean_of(ratio),
        "ratio_is_one": mean_of(ratio == 1),
        "approx_kl": mean_of(kl_k3(old_log_probs, log_probs, max_log_ratio=parameters.max_log_ratio)),
    }
    if parameters.dual_clip is not None:
        metrics["clip_fraction_dual"] = mean_of((advantages < 0) & (ratio > parameters.dual_clip))
    return metrics


def _check_shapes(log_probs: Tensor, *others: Tensor | None) -> None:
    if log_probs.dim() != 1 or any(other is not None and other.shape != log_probs.shape for other in others):
        shapes = [list(tensor.shape) for tensor in (log_probs, *others) if tensor is not None]
        raise ValueError(f"all per-token tensors must be [N] with one N, they are {shapes}")
