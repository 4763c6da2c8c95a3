"""What `pairs`, `generate` and `curate` do with records: sample a batch at a time, each on the disk before the next one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from prism_nemo.data.bad_records import BadRecord, BadTally
from prism_nemo.data.records import Record
from prism_nemo.errors import DataError
from prism_nemo.experiment import Experiment
from prism_nemo.packing.groups import EncodedPrompt
from prism_nemo.stages.bad_samples import settle_bad_records
from prism_nemo.stages.parts import PartFiles

Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class EncodedRecords:
    """Records as rows of the parts, {"record": its number, …}.

    rows     of all, in order; one that cannot be used has its reason as `bad`
    usable   of those that can, in the order of `batch`
    batch    to sample
    """

    rows: list[Row] = field(default_factory=list)
    usable: list[Row] = field(default_factory=list)
    batch: list[tuple[Record, EncodedPrompt]] = field(default_factory=list)

    @classmethod
    def of(
        cls, numbers: Sequence[int], records: Sequence[Record], encode: Callable[[Record], tuple[EncodedPrompt, Row]]
    ) -> EncodedRecords:
        """`encode`: a record's prompt, and what its row begins with. Raises DataError for one that cannot be used."""
        made = cls()
        for number in numbers:
            record = records[number]
            try:
                prompt, begun = encode(record)
            except DataError as error:
                bad = BadRecord.from_error(record.id, f"record {record.id}", error)
                made.rows.append({"record": number, "bad": asdict(bad)})
                continue
            made.rows.append({"record": number, **begun})
            made.usable.append(made.rows[-1])
            made.batch.append((record, prompt))
        return made


def sample_records(
    numbers: Sequence[int],
    parts: PartFiles,
    rows_of: Callable[[Sequence[int]], list[Row]],
    *,
    at_once: int,
    max_bad_share: float,
    experiment: Experiment,
    name: str,
    stop_if_told: Callable[[], None],
) -> None:
    """Does the records of these numbers that are in no part yet; `rows_of` samples some, on the ranks that hold one model.

    A batch of which a killed process wrote only some is sampled whole again: the others' log-probabilities are then those of an
    unbroken run to the last digit. A collective. Raises DataError when more records than `max_bad_share` cannot be used.
    """
    runtime = parts.runtime
    tally = BadTally(max_share=max_bad_share, num_records=len(numbers))
    done = set()
    for row in parts.in_order():
        done.add(row["record"])
        tally.tried += 1
        tally.failed += "bad" in row
    runtime.barrier()  # all have read before any writes
    mine = numbers[runtime.data_parallel_rank :: runtime.data_parallel_size]
    batches = [mine[start : start + at_once] for start in range(0, len(mine), at_once)]
    left = [batch for batch in batches if not done.issuperset(batch)]
    bar = experiment.progress_steps(0, runtime.max_over_data_parallel(len(left)), name)
    for step in bar:
        rows = [row for row in rows_of(left[step] if step < len(left) else ()) if row["record"] not in done]
        parts.append(rows)
        bad = [BadRecord(**row["bad"]) for row in rows if "bad" in row]
        settle_bad_records(tally, tried=len(rows), failed=len(bad), new=bad, runtime=runtime, experiment=experiment)
        bar.update(records=tally.tried)
        stop_if_told()
    runtime.barrier()
