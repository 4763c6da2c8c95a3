"""The sampler's log-probabilities against the trainer's: importance weights, and how far the two are apart.

An inference engine and the trainer compute the same distribution with other kernels and precisions, so tokens come from a
slightly different policy than the one that is trained. Truncated importance weights correct for that (one-sided, as in
"truncated importance sampling"); the mismatch is measured whether they are used or not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prism_nemo.algorithms.kl import kl_k1, kl_k3
from prism_nemo.algorithms.metrics import MetricSums, mean_of


def correction_weights(
    trainer_log_probs: Tensor,
    sampler_log_probs: Tensor,
    sequence_index: Tensor,
    *,
    per_sequence: bool,
    truncation: float,
    max_log_ratio: float,
) -> Tensor:
    """`min(trainer probability / sampler probability, truncation)`, float [N] without gradient.

    Per token, or with `per_sequence` the probability ratio of the whole sequence (the product over its tokens), which every
    token of the sequence then carries. The log-ratio is clamped to [-max_log_ratio, max_log_ratio] first.

    trainer_log_probs, sampler_log_probs  float [N] of the response tokens, of one policy in two engines
    sequence_index                        int [N], a sequence lies wholly inside
    """
    log_ratio = trainer_log_probs.detach() - sampler_log_probs.detach()
    if per_sequence:
        unique, index = torch.unique(sequence_index, return_inverse=True)
        log_ratio = log_ratio.new_zeros(unique.shape).index_add_(0, index, log_ratio)[index]
    return log_ratio.clamp(-max_log_ratio, max_log_ratio).exp().clamp(max=truncation)


def mismatch_metrics(trainer_log_probs: Tensor, sampler_log_probs: Tensor, *, thresholds: Sequence[float]) -> MetricSums:
    """Mean |dlogp|, the k1 and k3 estimates of KL(sampler || trainer), and the share of tokens with |dlogp| above each threshold.

    Both tensors float [N]; thresholds in nats. Names: `abs_log_ratio`, `kl_k1`, `kl_k3`, `share_above_0.1` and so on.
    """
    trainer, sampler = trainer_log_probs.detach().double(), sampler_log_probs.detach().double()
    distance = (trainer - sampler).abs()
    metrics: MetricSums = {
        "abs_log_ratio": mean_of(distance),
        "kl_k1": mean_of(kl_k1(sampler, trainer)),
        "kl_k3": mean_of(kl_k3(sampler, trainer)),
    }
    for threshold in thresholds:
        metrics[f"share_above_{threshold:g}"] = mean_of(distance > threshold)
    return metrics
