"""Estimators of KL(p || q) per token, from the log-probabilities of tokens that were sampled from p.

With `d = log q - log p`: k1 = -d (unbiased, high variance, may be negative), k2 = d^2 / 2 (biased, low variance),
k3 = exp(d) - 1 - d (unbiased, never negative). Source: J. Schulman, "Approximating KL Divergence" (2020).
All take and return float tensors of one shape and are differentiable in both arguments.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prism_nemo.config.enums import KLEstimator


def kl_k1(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`log p - log q`."""
    return log_p - log_q


def kl_k2(log_p: Tensor, log_q: Tensor) -> Tensor:
    """`(log q - log p)^2 / 2`."""
    return 0.5 * (log_q - log_p).square()


def kl_k3(log_p: Tensor, log_q: Tensor, *, max_log_ratio: float = math.inf) -> Tensor:
    """`exp(d) - 1 - d` with `d = log q - log p` clamped to [-max_log_ratio, max_log_ratio].

    `expm1` keeps the digits near d = 0. The clamp bounds the value; beyond it the gradient is zero.
    """
    difference = (log_q - log_p).clamp(-max_log_ratio, max_log_ratio)
    return torch.expm1(difference) - difference


def kl_estimate(log_p: Tensor, log_q: Tensor, estimator: KLEstimator, *, max_log_ratio: float) -> Tensor:
    """The estimator of that name."""
    if estimator is KLEstimator.k2:
        return kl_k2(log_p, log_q)
    return kl_k3(log_p, log_q, max_log_ratio=max_log_ratio)
