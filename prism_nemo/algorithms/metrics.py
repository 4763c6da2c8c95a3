"""Metrics as sums and counts, so that micro-batches and ranks add up before the one division.

A function that measures returns, under each name, the pair (sum, count). Which names it returns depends on its arguments'
presence and never on their values, so that every rank holds the same names; where there was nothing to measure the count is 0,
and `finalize` leaves the metric out instead of inventing a value.
"""

from __future__ import annotations

from torch import Tensor

MetricSums = dict[str, tuple[Tensor | float, Tensor | float]]


def merge(a: MetricSums, b: MetricSums) -> MetricSums:
    """Sums and counts of both. A name that only one of them has is kept as it is; `a` and `b` stay unchanged."""
    merged = dict(a)
    for name, (total, count) in b.items():
        if name in merged:
            merged_total, merged_count = merged[name]
            merged[name] = (merged_total + total, merged_count + count)
        else:
            merged[name] = (total, count)
    return merged


def finalize(sums: MetricSums) -> dict[str, float]:
    """`sum / count` of every metric; one with count 0 is absent."""
    values = {name: (float(total), float(count)) for name, (total, count) in sums.items()}
    return {name: total / count for name, (total, count) in values.items() if count != 0}


def prefixed(prefix: str, sums: MetricSums) -> MetricSums:
    """The same metrics under `prefix/name`."""
    return {f"{prefix}/{name}": value for name, value in sums.items()}


def mean_of(values: Tensor) -> tuple[Tensor, Tensor]:
    """(sum, count) of a tensor of any shape and type, as float64 scalars on its device, without gradient."""
    values = values.detach().double()
    return values.sum(), values.new_tensor(values.numel())
