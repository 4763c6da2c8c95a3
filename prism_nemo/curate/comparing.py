"""Leaves out records that are nearly the same as earlier ones or as a benchmark's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from prism_nemo.config.endpoint import CurationConfig, excluded
from prism_nemo.config.schema import CurateConfig, DataConfig
from prism_nemo.curate.duplicates import Benchmarks, Duplicates
from prism_nemo.curate.fingerprints import Fingerprint
from prism_nemo.data.open import open_file
from prism_nemo.data.records import Record
from prism_nemo.engine.runtime import Runtime
from prism_nemo.errors import DataError
from prism_nemo.evaluation.benchmarks import read_benchmark

DUPLICATE = "duplicate"
AT_ONCE = 64  # records that a rank compares before it writes down what it found


def contents_digest(records: Sequence[Record]) -> str:
    """Of ids, prompts and answers, in order."""
    digest = hashlib.sha256()
    for record in records:
        fields = (record.id, record.prompt, record.answer, record.equivalent_answers, record.answer_kind)
        digest.update(repr(fields).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def open_benchmarks(config: CurateConfig) -> dict[str, list[Record]]:
    """The records of `curate.exclude` by entry, with images below each file's own folder.

    Raises DataError when one of them cannot be read: what it would have kept out would come in.
    """
    data = DataConfig(max_bad_sample_share=0.0)
    found: dict[str, list[Record]] = {}
    for entry in config.curate.exclude:
        benchmark, path = excluded(entry)
        if benchmark is None:
            found[entry] = open_file(entry, data, required=()).records
        else:
            found[entry] = list(read_benchmark(benchmark, path))
        if not found[entry]:
            raise DataError("there are no records", where=f"curate.exclude: {entry}", remedy="check the path")
    return found


def benchmark_fingerprints(benchmarks: Mapping[str, Sequence[Record]], runtime: Runtime) -> Iterator[tuple[str, Fingerprint]]:
    """Each benchmark record's name (file and id) and its fingerprint, made by all ranks together. A collective."""
    records = [(f"{_label(entry)}: {record.id}", record) for entry, found in benchmarks.items() for record in found]
    for start in range(0, len(records), AT_ONCE * runtime.world_size):
        mine: list[tuple[str, Fingerprint] | DataError] = []
        for name, record in records[start + runtime.rank * AT_ONCE :][:AT_ONCE]:
            try:
                mine.append((name, Fingerprint.of(record)))
            except DataError as error:
                mine.append(DataError(f"the benchmark record {name} cannot be used: {error.what}"))
        for share in runtime.gather_objects_over_all(mine):
            for found in share:
                if isinstance(found, DataError):
                    raise DataError(found.what, where="curate.exclude", remedy="mend it: what it should keep out would come in")
                yield found


def _label(entry: str) -> str:
    benchmark, path = excluded(entry)
    return path.name if benchmark is None else benchmark.value


def find_overlap(
    rows: Iterable[Mapping[str, Any]],
    records: Sequence[Record],
    benchmarks: Iterable[tuple[str, Fingerprint]],
    config: CurationConfig,
) -> dict[int, tuple[str, str]]:
    """Why records are left out, by their number: a reason and what they are like. `rows`: {"record", "fingerprint"}, in order."""
    known = Benchmarks(config)
    for name, found in benchmarks:
        known.add(name, found)
    earlier = Duplicates(config)
    left_out: dict[int, tuple[str, str]] = {}
    for row in rows:
        number, found = row["record"], Fingerprint.from_json(row["fingerprint"])
        overlap = known.overlap(found)
        if overlap is not None:
            left_out[number] = overlap
        elif config.deduplicate:
            like = earlier.first_like(records[number].id, found)
            if like is not None:
                left_out[number] = (DUPLICATE, like)
    return left_out
