"""What an evaluation found: figures over all records and by category, their intervals, and a benchmark's own scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prism_nemo.config.enums import Benchmark
from prism_nemo.evaluation.benchmarks import score_benchmark
from prism_nemo.evaluation.metrics import bootstrap_intervals, means, powers_of_two, prompt_figures
from prism_nemo.evaluation.samples import Answered, by_category


def summarize(
    answered: Sequence[Answered],
    *,
    pass_at_k: Sequence[int] = (),
    category: str = "category",
    bootstrap_samples: int = 1000,
    seed: int = 0,
    benchmark: Benchmark | None = None,
) -> dict[str, Any]:
    """The figures by name, and

    num_prompts, num_responses   what they are of
    intervals    95% confidence intervals by figure (`bootstrap_intervals`); absent without resamplings
    categories   figures and num_prompts by category (`by_category`); absent without categories
    benchmark    its name and its scores by its own rule; absent for records of our own

    pass@k and majority@k are there where there are several responses a prompt, for each k of `pass_at_k`, by default the powers
    of two up to their number.
    """
    num_samples = min((len(one.samples) for one in answered), default=0)
    ks = [k for k in (pass_at_k or powers_of_two(num_samples)) if k <= num_samples] if num_samples > 1 else []
    figures = {id(one): prompt_figures(one.samples, ks) for one in answered}
    prompts = [figures[id(one)] for one in answered]
    result: dict[str, Any] = {
        **means(prompts),
        "num_prompts": len(answered),
        "num_responses": sum(len(one.samples) for one in answered),
    }
    intervals = bootstrap_intervals(prompts, resamples=bootstrap_samples, seed=seed)
    if intervals:
        result["intervals"] = intervals
    groups = by_category(answered, category)
    if groups:
        result["categories"] = {
            name: {"num_prompts": len(group), **means([figures[id(one)] for one in group])} for name, group in groups.items()
        }
    if benchmark is not None:
        result["benchmark"] = {"name": str(benchmark), **score_benchmark(benchmark, answered)}
    return result


def scalars(result: dict[str, Any]) -> dict[str, float]:
    """The figures of `summarize` alone, without counts, intervals and tables."""
    return {name: value for name, value in result.items() if isinstance(value, float)}
