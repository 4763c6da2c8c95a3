"""What no step can be taken on: unusable records, as they come up on any rank, and values that are not finite.

Both are listed in the run directory first, and counted then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from prism_nemo.data.bad_records import BadRecord, BadTally
from prism_nemo.engine.runtime import Runtime
from prism_nemo.experiment import BAD_SAMPLES, Experiment


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


def record_step_without_update(
    step: int, what: str, sample_ids: Sequence[str], at_fault: bool, runtime: Runtime, experiment: Experiment
) -> str:
    """Lists the samples of step `step` (from 1), in which `what` was not finite, and says on which ranks: "on rank 3".

    at_fault     whether it was on this rank, before ranks were summed
    sample_ids   this rank's

    A collective. `samples_of_ranks` are those of the ranks at fault; ranks that share a model have the same ones.
    """
    parts = runtime.gather_objects_over_all((at_fault, list(sample_ids)))
    ranks = [rank for rank, (fault, _) in enumerate(parts) if fault]
    row: dict[str, object] = {"reason": f"{what} is not finite", "step": step, "ranks": ranks}
    if ranks:
        row["samples_of_ranks"] = list(dict.fromkeys(identifier for rank in ranks for identifier in parts[rank][1]))
    row["samples"] = list(dict.fromkeys(identifier for _, ids in parts for identifier in ids))
    experiment.record_bad_samples([row])
    named = f"on rank {', '.join(map(str, ranks))}" if ranks else "on no rank by itself, only their sum"
    experiment.notice(f"step {step}: {what} is not finite ({named}); no step is taken, its samples are in {BAD_SAMPLES}")
    return named
