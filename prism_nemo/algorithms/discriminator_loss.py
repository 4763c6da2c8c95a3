"""The discriminator's loss, and how healthy the game between discriminator and policy is.

The same functions serve the perception and the reasoning segment, warm-up pairs and the alignment game. Nothing here clips a
score: a clamp would cut the gradient of the very pairs that are furthest apart.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from prism_nemo.algorithms.metrics import MetricSums, mean_of

TIE_TOLERANCE = 1e-5
"""Scores closer than this are a tie: one text at two places of a packed row differs by rounding alone."""


def bradley_terry_loss(teacher_scores: Tensor, student_scores: Tensor, *, global_pairs: Tensor | float) -> Tensor:
    """`sum(-log sigmoid(teacher - student)) / global_pairs`, a scalar; without a pair a zero that keeps the graph.

    teacher_scores, student_scores  float [pairs]; a teacher's score is repeated for each student it is compared with
    global_pairs                    pairs of the global batch (all micro-batches, all ranks)
    """
    _check_pairs(teacher_scores, student_scores)
    total = softplus(_widen(student_scores) - _widen(teacher_scores)).sum()
    return total / global_pairs if student_scores.numel() else total


def score_regularization(scores: Tensor, *, global_count: Tensor | float) -> Tensor:
    """`sum(score^2) / global_count`, a scalar that keeps scores near 0; the caller multiplies it by its coefficient.

    scores float [any shape]; global_count: scores of the global batch.
    """
    total = _widen(scores).square().sum()
    return total / global_count if scores.numel() else total


def discriminator_health(
    teacher_scores: Tensor, student_scores: Tensor, *, kind: str, tie_tolerance: float = TIE_TOLERANCE
) -> MetricSums:
    """How the discriminator tells teacher from student, over the pairs of valid rollouts.

    teacher_scores, student_scores  float [pairs]
    kind                            names the segment in the metrics' names: `perception`, `reasoning`

    `kind/accuracy` is the share of pairs that the teacher wins among those that are not tied, so that a student that writes the
    teacher's very text does not count as a failure of the discriminator; `kind/ties` is the share of tied pairs (scores at most
    `tie_tolerance` apart). `kind/margin` is mean(teacher - student), `kind/teacher_score` and `kind/student_score` are means.
    """
    _check_pairs(teacher_scores, student_scores)
    teacher, student = teacher_scores.detach().double(), student_scores.detach().double()
    margin = teacher - student
    tied = margin.abs() <= tie_tolerance
    won = (margin > 0) & ~tied
    return {
        f"{kind}/accuracy": (won.double().sum(), (~tied).double().sum()),
        f"{kind}/ties": mean_of(tied),
        f"{kind}/margin": mean_of(margin),
        f"{kind}/teacher_score": mean_of(teacher),
        f"{kind}/student_score": mean_of(student),
    }


def groups_without_spread(
    student_scores: Tensor, group_ids: Tensor, *, kind: str, tie_tolerance: float = TIE_TOLERANCE
) -> MetricSums:
    """`kind/groups_without_spread`: the share of groups whose students all tie, so that normalised scores carry no signal.

    student_scores  float [responses]
    group_ids       integer [responses], the prompt of each; a group lies wholly inside one call. Groups of one do not count.
    """
    _check_pairs(student_scores, group_ids)
    student = student_scores.detach().double()
    unique, index, sizes = torch.unique(group_ids, return_inverse=True, return_counts=True)
    highest = student.new_full(unique.shape, -torch.inf).scatter_reduce_(0, index, student, "amax")
    lowest = student.new_full(unique.shape, torch.inf).scatter_reduce_(0, index, student, "amin")
    comparable = sizes >= 2
    flat = comparable & (highest - lowest <= tie_tolerance)
    return {f"{kind}/groups_without_spread": (flat.double().sum(), comparable.double().sum())}


def content_probe(true_scores: Tensor, altered_scores: Tensor, *, kind: str, tie_tolerance: float = TIE_TOLERANCE) -> MetricSums:
    """Whether the discriminator reads content: teacher text against the same text with one fact changed.

    true_scores, altered_scores float [pairs], of held-out prompts. `kind/content_probe` is the share of pairs in which the true
    text wins; here a tie is half a win, since a discriminator that cannot tell is at chance (0.5). `kind/content_probe_margin` is
    mean(true - altered).
    """
    _check_pairs(true_scores, altered_scores)
    margin = true_scores.detach().double() - altered_scores.detach().double()
    tied = margin.abs() <= tie_tolerance
    wins = torch.where(tied, 0.5, (margin > 0).double())
    return {f"{kind}/content_probe": mean_of(wins), f"{kind}/content_probe_margin": mean_of(margin)}


def score_histogram(scores: Tensor, *, limit: float, bins: int) -> Tensor:
    """How many scores fall into each of `bins` equal bins over [-limit, limit), int64 [bins + 2].

    The first entry counts what lies below -limit, the last what lies at or above limit. Histograms of micro-batches and ranks
    add up. Raises ValueError on non-finite scores.
    """
    values = scores.detach().double().flatten()
    bad = int((~values.isfinite()).sum())
    if bad:
        raise ValueError(f"{bad} of {values.numel()} scores are NaN or infinite")
    edges = torch.linspace(-limit, limit, bins + 1, dtype=torch.float64, device=values.device)
    return torch.bincount(torch.bucketize(values, edges, right=True), minlength=bins + 2)


def histogram_shares(scores: Tensor, *, kind: str, role: str, limit: float = 10.0, bins: int = 8) -> MetricSums:
    """`score_histogram` as metrics: `kind/histogram/role/EDGE` is the share of scores in the bin that starts at EDGE.

    The lowest bin is called -inf. Non-finite scores are in no bin, and do not count.
    """
    finite = scores.detach()[scores.detach().isfinite()]
    counts = score_histogram(finite, limit=limit, bins=bins).double()
    edges = ["-inf", *(f"{-limit + 2 * limit * index / bins:g}" for index in range(bins + 1))]
    return {f"{kind}/histogram/{role}/{edge}": (count, counts.sum()) for edge, count in zip(edges, counts, strict=True)}


def _widen(scores: Tensor) -> Tensor:
    """At least float32: scores may come from a network in bfloat16."""
    return scores if scores.dtype == torch.float64 else scores.float()


def _check_pairs(first: Tensor, *others: Tensor) -> None:
    if first.dim() != 1 or any(other.shape != first.shape for other in others):
        shapes = [list(tensor.shape) for tensor in (first, *others)]
        raise ValueError(f"all tensors must be [pairs] with one length, they are {shapes}")
