"""Unusable records as they come up on any rank: listed in the run directory first, then counted against the allowed share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from prism_nemo.data.bad_records import BadRecord, BadTally
from prism_nemo.engine.runtime import Runtime
from prism_nemo.experiment import Experiment


def settle_bad_records(
    tally: BadTally, *, tried: int, failed: int, new: Sequence[BadRecord], runtime: Runtime, experiment: Experiment
) -> bool:
    """Adds what this rank tried, and what of it failed, to the tally of all ranks; whether any rank has a usable record.

    `new`: the bad records that this rank has not listed yet. A collective. Raises DataError, on every rank, past the share.
    """
    parts = runtime.gather_objects((tried, failed, list(new)))
    bad = list(dict.fromkeys(record for _, _, records in parts for record in records))
    experiment.record_bad_samples([asdict(record) for record in bad])
    all_tried, all_failed = sum(part[0] for part in parts), sum(part[1] for part in parts)
    tally.add(all_tried, all_failed, bad)
    return all_failed < all_tried
