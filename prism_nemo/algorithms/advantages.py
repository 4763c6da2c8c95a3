"""Advantages: how much better a rollout is than the others of its group (ALGORITHM of PRISM, GRPO, Dr.GRPO).

A group is all rollouts of one prompt. Groups are told apart by an integer id per rollout, in any order and with any
values. Statistics are computed in float64 over deviations from the group's minimum, so that a group of large, nearly
equal scores keeps its digits and a group without spread gives exact zeros. Advantages are constants: no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prism_nemo.config.enums import AlignReward

EPS = 1e-6
"""Added to the standard deviation that scores are divided by."""


def group_normalize(scores: Tensor, group_ids: Tensor, *, eps: float = EPS) -> Tensor:
    """`(x - mean_g) / (std_g + eps)` with the unbiased standard deviation of x's group g.

    A group of one has mean 0 and standard deviation 1, so its score is returned divided by `1 + eps`.

    scores     float, integer or bool [batch]
    group_ids  integer [batch]
    Returns float [batch]: float64 for float64 scores, otherwise float32.
    Raises ValueError on unequal shapes and on non-finite scores, TypeError on ids that are not integers.
    """
    groups = _Groups.of(scores, group_ids)
    values = _finite_float64(scores, "scores")
    return _normalize(values, groups, eps=eps).to(_result_dtype(scores))


def grpo_advantages(rewards: Tensor, group_ids: Tensor, *, normalize_std: bool = True) -> Tensor:
    """GRPO's advantage `(R - mean_g) / (std_g + 1e-6)`, or Dr.GRPO's `R - mean_g` with `normalize_std=False`.

    A group of one has mean 0 and standard deviation 1. Shapes, types and errors as in `group_normalize`.
    """
    if normalize_std:
        return group_normalize(rewards, group_ids)
    groups = _Groups.of(rewards, group_ids)
    values = _finite_float64(rewards, "rewards")
    return _center(values, groups).to(_result_dtype(rewards))


def prism_advantages(
    perception: Tensor,
    reasoning: Tensor,
    valid: Tensor,
    group_ids: Tensor,
    *,
    perception_weight: float = 0.5,
    reasoning_weight: float = 0.5,
    format_penalty: float = 1.5,
) -> Tensor:
    """PRISM's advantage from the discriminator's scores of a rollout's two segments.

    `perception_weight * GN(perception) + reasoning_weight * GN(reasoning) - format_penalty * [invalid]`, GN being
    `group_normalize`. A rollout of invalid format takes `min(valid scores of its group) - 1` as its score, or `0 - 1` where
    the group has no valid rollout; what stands in its place in `perception` and `reasoning` is never read, it may be NaN.

    perception, reasoning  float, integer or bool [batch]   scores of the segments
    valid                  bool (or 0/1 integer) [batch]    the rollout has the response format
    group_ids              integer [batch]
    Returns float [batch]: float64 where a score tensor is, otherwise float32.
    Raises ValueError on unequal shapes and on non-finite scores of valid rollouts, TypeError on ids that are not integers.
    """
    groups = _Groups.of(perception, group_ids)
    for name, tensor in (("reasoning", reasoning), ("valid", valid)):
        if tensor.shape != perception.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, perception has {list(perception.shape)}")
    if valid.is_floating_point():
        raise TypeError(f"valid must be bool, it is {valid.dtype}")
    valid = valid.bool()
    advantages = torch.zeros(perception.shape, dtype=torch.float64, device=perception.device)
    for name, scores, weight in (("perception", perception, perception_weight), ("reasoning", reasoning, reasoning_weight)):
        filled = _fill_invalid(scores, valid, groups, name)
        advantages += weight * _normalize(filled, groups, eps=EPS)
    advantages -= format_penalty * (~valid).double()
    return advantages.to(torch.promote_types(_result_dtype(perception), _result_dtype(reasoning)))


def mixed_advantages(
    alignment: Tensor,
    valid: Tensor,
    correct: Tensor,
    rewards: Tensor,
    group_ids: Tensor,
    *,
    reward: AlignReward,
    alignment_weight: float = 1.0,
    wrong_penalty: float = 1.0,
    format_penalty: float = 1.5,
) -> Tensor:
    """The discriminator's advantage A together with verified answers, in one of three ways; W: valid and wrong, F: invalid.

    gated                 `alignment_weight * A * [correct] - wrong_penalty * W - format_penalty * F`
    verified_plus_gated   `GN(rewards) + alignment_weight * A * [correct]`
    verified_plus_signed  `GN(rewards) + alignment_weight * A * s`, s = 1 where correct, -1 where wrong, 0 where invalid

    alignment  float [batch]  `prism_advantages` with `format_penalty=0`
    valid      bool  [batch]  the rollout has the response format
    correct    bool  [batch]  its answer is the verified one; nothing that is not valid is correct
    rewards    float [batch]  verifiable rewards, in which the format has its share
    group_ids  integer [batch]
    Returns float [batch] of alignment's type. Raises ValueError on unequal shapes and non-finite rewards, and for
    `AlignReward.discriminator`, which mixes nothing.
    """
    if any(tensor.shape != alignment.shape for tensor in (valid, correct, rewards, group_ids)):
        raise ValueError("alignment, valid, correct, rewards and group_ids must be [batch] with one length")
    right = correct.bool() & valid.bool()
    wrong = valid.bool() & ~right
    if reward is AlignReward.gated:
        gated = alignment_weight * alignment * right
        return gated - wrong_penalty * wrong.to(alignment.dtype) - format_penalty * (~valid.bool()).to(alignment.dtype)
    verified = group_normalize(rewards, group_ids).to(alignment.dtype)
    if reward is AlignReward.verified_plus_gated:
        return verified + alignment_weight * alignment * right
    if reward is AlignReward.verified_plus_signed:
        return verified + alignment_weight * alignment * (right.to(alignment.dtype) - wrong.to(alignment.dtype))
    raise ValueError(f"{reward} mixes nothing")


@dataclass(frozen=True, eq=False)
class _Groups:
    """Group ids made dense: `index` int64 [batch] in 0 .. groups - 1, `sizes` int64 [groups]."""

    index: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, scores: Tensor, group_ids: Tensor) -> _Groups:
        if scores.dim() != 1 or group_ids.shape != scores.shape:
            raise ValueError(f"scores and group_ids must be [batch], they are {list(scores.shape)} and {list(group_ids.shape)}")
        if group_ids.is_floating_point() or group_ids.dtype == torch.bool:
            raise TypeError(f"group_ids must be integers, they are {group_ids.dtype}")
        _, index, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)
        return cls(index=index, sizes=sizes)

    def sum(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.sizes.shape).index_add_(0, self.index, values)

    def min(self, values: Tensor) -> Tensor:
        return values.new_full(self.sizes.shape, torch.inf).scatter_reduce_(0, self.index, values, "amin")


def _center(values: Tensor, groups: _Groups) -> Tensor:
    """Deviations from the group's mean; the value itself in a group of one."""
    shifted = values - groups.min(values)[groups.index]  # exact zeros without spread, no lost digits with a large mean
    mean = groups.sum(shifted) / groups.sizes
    alone = (groups.sizes == 1)[groups.index]
    return torch.where(alone, values, shifted - mean[groups.index])


def _normalize(values: Tensor, groups: _Groups, *, eps: float) -> Tensor:
    centered = _center(values, groups)
    variance = groups.sum(centered.square()) / (groups.sizes - 1).clamp(min=1)
    std = torch.where(groups.sizes == 1, torch.ones_like(variance), variance.sqrt())
    return centered / (std[groups.index] + eps)


def _fill_invalid(scores: Tensor, valid: Tensor, groups: _Groups, name: str) -> Tensor:
    """Scores float64 [batch] with those of invalid rollouts replaced by one below the group's worst valid score."""
    values = scores.detach().double()
    values = _finite_float64(torch.where(valid, values, torch.zeros_like(values)), f"{name} scores of valid rollouts")
    worst = groups.min(torch.where(valid, values, torch.full_like(values, torch.inf)))
    worst = torch.where(worst.isinf(), torch.zeros_like(worst), worst)
    return torch.where(valid, values, worst[groups.index] - 1.0)


def _finite_float64(values: Tensor, name: str) -> Tensor:
    values = values.detach().double()
    bad = int((~values.isfinite()).sum())
    if bad:
        raise ValueError(f"{bad} of {values.numel()} {name} are NaN or infinite")
    return values


def _result_dtype(scores: Tensor) -> torch.dtype:
    return torch.float64 if scores.dtype == torch.float64 else torch.float32
