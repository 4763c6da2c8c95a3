"""The held-out records that a run is judged on: all of them usable, or an error before its first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from prism_nemo.config.schema import DataConfig
from prism_nemo.data.bad_records import BadRecord, listing
from prism_nemo.data.open import open_file
from prism_nemo.data.records import Record
from prism_nemo.engine.runtime import Runtime
from prism_nemo.errors import DataError


@dataclass(frozen=True)
class HeldOut:
    """Records of `data.validation`: this data-parallel rank's, and how many all ranks have."""

    mine: Sequence[Record]
    total: int


def open_held_out(
    data: DataConfig,
    encode: Callable[[Record], object],
    runtime: Runtime,
    *,
    required: tuple[str, ...] = (),
    limit: int | None = None,
    wanted: Callable[[Record], bool] | None = None,
) -> HeldOut:
    """The first `limit` records of `data.validation`, of these the `wanted`; none without a file. A collective.

    Every record is encoded once, only to see that it can be: what is encoded as late as the first validation fails there, hours
    into a run, and again whenever that is resumed. Raises DataError, on every rank, that names file and records when any cannot
    be read or encoded: a validation leaves nothing out.
    """
    if data.validation is None:
        return HeldOut((), 0)
    found = open_file(data.validation, replace(data, max_bad_sample_share=1.0), required=required)
    _refuse(found.bad, data.validation)
    records = [record for record in found.records[:limit] if wanted is None or wanted(record)]
    mine = records[runtime.data_parallel_rank :: runtime.data_parallel_size]
    bad = [error for record in mine if (error := _problem(record, encode)) is not None]
    _refuse([record for part in runtime.gather_objects(bad) for record in part], data.validation)
    return HeldOut(mine, len(records))


def _problem(record: Record, encode: Callable[[Record], object]) -> BadRecord | None:
    try:
        encode(record)
    except DataError as error:
        return BadRecord.from_error(record.id, f"record {record.id}", error)
    return None


def _refuse(bad: Sequence[BadRecord], file: str) -> None:
    if bad:
        raise DataError(
            f"{len(bad)} held-out record{'s' * (len(bad) > 1)} cannot be used:\n{listing(bad)}",
            where=f"data.validation: {file}",
            remedy="mend or remove them: a validation leaves nothing out",
        )
