"""Figures of an evaluation, each as (sum, count) per prompt, so that they add up over prompts and can be resampled.

docs/evaluation.md gives the formulas. No torch here.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prism_nemo.evaluation.samples import Sample

CONFIDENCE = 0.95
_WORD = re.compile(r"\w+")

PromptFigures = dict[str, tuple[float, float]]
"""By name, (sum, count) over one prompt's responses; count 0 where there is nothing to measure."""


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, … up to `limit`, and `limit` itself."""
    found = [2**exponent for exponent in range(limit.bit_length()) if 2**exponent <= limit]
    return found if limit in found else [*found, limit]


def pass_at_k(num_samples: int, num_solved: int, k: int) -> float:
    """The probability that one of k responses drawn without replacement from these is right: 1 - C(n - c, k) / C(n, k).

    The unbiased estimate of pass@k from n >= k responses (Chen et al. 2021, arXiv 2107.03374, equation 1).
    """
    assert 1 <= k <= num_samples and 0 <= num_solved <= num_samples, (num_samples, num_solved, k)
    return 1.0 - math.comb(num_samples - num_solved, k) / math.comb(num_samples, k)


def majority(samples: Sequence[Sample]) -> Sample | None:
    """The first response with the answer that has the most votes; None where no response has an answer.

    Of answers with equally many votes the one that was given first wins.
    """
    votes = Counter(sample.vote for sample in samples if sample.vote is not None)
    if not votes:
        return None
    most = max(votes.values())
    return samples[min(vote for vote, count in votes.items() if count == most)]


def token_f1(given: str, truth: str) -> float:
    """The harmonic mean of precision and recall over words: runs of letters and digits, in lower case, with multiplicity.

    1 when neither has a word, 0 when one has none.
    """
    words, wanted = (Counter(_WORD.findall(text.casefold())) for text in (given, truth))
    shared = (words & wanted).total()
    if not words or not wanted:
        return float(not words and not wanted)
    return 2.0 * shared / (words.total() + wanted.total())


def prompt_figures(samples: Sequence[Sample], ks: Sequence[int]) -> PromptFigures:
    """All figures of one prompt. Which names there are depends on `ks` alone."""
    figures = {
        "accuracy": _sum(sample.correct for sample in samples),
        "caption_accuracy": _sum(sample.caption_correct for sample in samples),
        "format_rate": _sum(sample.valid for sample in samples),
        "response_length": _sum(sample.tokens for sample in samples),
        "truncated": _sum(sample.truncated for sample in samples),
        "reward": _sum(sample.reward for sample in samples),
        "caption_f1": _sum(sample.caption_f1 for sample in samples),
    }
    graded = all(sample.correct is not None for sample in samples)
    solved = sum(sample.solved for sample in samples)
    for k in ks:
        if not graded:
            figures[f"pass@{k}"] = figures[f"majority@{k}"] = (0.0, 0.0)
            continue
        figures[f"pass@{k}"] = (pass_at_k(len(samples), solved, k), 1.0)
        winner = majority(samples[:k])
        figures[f"majority@{k}"] = (float(winner is not None and winner.solved), 1.0)
    return figures


def means(prompts: Sequence[PromptFigures]) -> dict[str, float]:
    """`sum / count` of every figure over the prompts, whatever their order; one that nothing was measured of is absent."""
    names = prompts[0] if prompts else {}
    totals = {name: [math.fsum(figures[name][part] for figures in prompts) for part in (0, 1)] for name in names}
    return {name: total / count for name, (total, count) in totals.items() if count}


def bootstrap_intervals(prompts: Sequence[PromptFigures], *, resamples: int, seed: int) -> dict[str, list[float]]:
    """95% confidence intervals [low, high] of `means`: percentiles over resamplings of the prompts with replacement.

    All figures are taken of the same resamplings, which depend on the seed and the number of prompts alone. A resampling in which
    nothing of a figure was measured does not count for it. Empty without resamplings or prompts.
    """
    if not prompts or not resamples:
        return {}
    measured = [name for name in prompts[0] if any(figures[name][1] for figures in prompts)]
    sums, counts = (np.array([[figures[name][part] for name in measured] for figures in prompts]) for part in (0, 1))
    draws = resampled_ratios(sums, counts, resamples=resamples, seed=seed)
    tail = (1 - CONFIDENCE) / 2
    bounds = np.nanquantile(draws, [tail, 1 - tail], axis=0)
    return {name: [float(low), float(high)] for name, low, high in zip(measured, *bounds, strict=True)}


def resampled_ratios(sums: NDArray[np.float64], counts: NDArray[np.float64], *, resamples: int, seed: int) -> NDArray[np.float64]:
    """Column sums of `sums` over those of `counts`, both [N, M], for resamplings of the N rows: [resamples, M]; 0/0 is NaN."""
    rows = len(sums)
    generator = np.random.default_rng([seed, rows])
    draws = np.full((resamples, sums.shape[1]), math.nan)
    for index in range(resamples):
        weight = np.bincount(generator.integers(0, rows, rows), minlength=rows)[:, None]
        total, count = (weight * sums).sum(axis=0), (weight * counts).sum(axis=0)
        np.divide(total, count, out=draws[index], where=count > 0)
    return draws


def _sum(values: object) -> tuple[float, float]:
    known = [float(value) for value in values if value is not None]  # type: ignore[attr-defined]
    return math.fsum(known), float(len(known))
