"""Data files -> records, all of them at once. What a file may hold is said in `prism_nemo.data.items` and `.forms`.

Training data of more than `data.index_above_mb` is not read this way, but record by record (`prism_nemo.data.record_files`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prism_nemo.config.schema import DataConfig
from prism_nemo.data.bad_records import BadRecord, refuse_bad_share
from prism_nemo.data.forms import Reading
from prism_nemo.data.item_files import open_items
from prism_nemo.data.record_files import RecordFile, UnusableRecord, usable
from prism_nemo.data.records import Record
from prism_nemo.errors import DataError


@dataclass(frozen=True)
class RecordSet:
    """What a data file, or several, hold: the usable records in the files' order, and the others."""

    path: Path
    records: list[Record]
    bad: list[BadRecord]

    def require(self, *fields: str) -> RecordSet:
        """This set, if every record has the named optional fields (`response`, `answer`, …); otherwise a DataError."""
        for record in self.records:
            missing = [name for name in fields if getattr(record, name) is None]
            if missing:
                raise DataError(
                    f"record {record.id} has no {' and no '.join(missing)}",
                    where=str(self.path),
                    remedy=f"this stage needs {', '.join(fields)} in every record",
                )
        return self


def read_records(
    path: Path, *, image_root: Path | None, max_bad_sample_share: float = DataConfig.max_bad_sample_share
) -> RecordSet:
    """Read every record of a .json, .jsonl, .parquet or .tar file. Images in files are not opened.

    Relative image paths are taken from `image_root`, or from the folder of the file when it is None. A record without an id
    is called `<file stem>:<line>` (the item's number in .json and .parquet; in .tar its key). Raises DataError when the file is
    missing, is not of these kinds, holds nothing, or when more than `max_bad_sample_share` of its records cannot be used.
    """
    return read_files([record_file(Path(path), image_root)], Path(path), max_bad_sample_share=max_bad_sample_share)


def read_files(files: Sequence[RecordFile], path: Path, *, max_bad_sample_share: float) -> RecordSet:
    """Every record of several files; `path` names them all."""
    records: list[Record] = []
    bad: list[BadRecord] = []
    for found in usable(files):
        if isinstance(found, UnusableRecord):
            bad.append(found.bad)
        else:
            records.append(found)
    refuse_bad_share(bad, num_bad=len(bad), num_seen=len(records) + len(bad), max_share=max_bad_sample_share, where=str(path))
    return RecordSet(path, records, bad)


def record_file(
    path: Path,
    image_root: Path | None,
    *,
    columns: Mapping[str, str] | None = None,
    source: str | None = None,
    cache_dir: Path | None = None,
) -> RecordFile:
    """A data file, opened. Paths stay right wherever they are used later."""
    root = (path.parent if image_root is None else Path(image_root)).absolute()
    return RecordFile(open_items(path, cache_dir), Reading(root, columns or {}, source))
