"""The held-out records that a run is judged on: all of them usable, or an error before its first step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from prism_nemo.config.enums import Benchmark
from prism_nemo.config.schema import DataConfig
from prism_nemo.data.bad_records import BadRecord, listing
from prism_nemo.data.open import open_file
from prism_nemo.data.records import Record
from prism_nemo.engine.runtime import Runtime
from prism_nemo.errors import DataError
from prism_nemo.evaluation.benchmarks import read_benchmark


@dataclass(frozen=True)
class HeldOut:
    """Records of `data.validation`: all ranks', and this data-parallel rank's."""

    all: Sequence[Record]
    mine: Sequence[Record]

    @property
    def total(self) -> int:
        return len(self.all)


def open_held_out(
    data: DataConfig,
    encode: Callable[[Record], object],
    runtime: Runtime,
    *,
    required: tuple[str, ...] = (),
    limit: int | None = None,
    wanted: Callable[[Record], bool] | None = None,
    benchmark: Benchmark | None = None,
) -> HeldOut:
    """The first `limit` records of `data.validation`, of these the `wanted`; none without a file. A collective.

    benchmark   what the files there were published as; None: they are records of our own

    Every record is encoded once, only to see that it can be: what is encoded as late as the first validation fails there, hours
    into a run, and again whenever that is resumed. Raises DataError, on every rank, that names file and records when any cannot
    be read or encoded: a validation leaves nothing out.
    """
    if data.validation is None:
        return HeldOut((), ())
    found = _read(data, data.validation, benchmark, required)
    records = [record for record in found[:limit] if wanted is None or wanted(record)]
    mine = records[runtime.data_parallel_rank :: runtime.data_parallel_size]
    bad = [error for record in mine if (error := _problem(record, encode)) is not None]
    _refuse([record for part in runtime.gather_objects(bad) for record in part], data.validation)
    return HeldOut(records, mine)


def _read(data: DataConfig, path: str, benchmark: Benchmark | None, required: tuple[str, ...]) -> Sequence[Record]:
    if benchmark is not None:
        records = list(read_benchmark(benchmark, Path(path), None if data.image_root is None else Path(data.image_root)))
        if not records:
            raise DataError(f"the files of {benchmark} hold no records", where=path)
        return records
    found = open_file(path, replace(data, max_bad_sample_share=1.0), required=required)
    _refuse(found.bad, path)
    return found.records


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
