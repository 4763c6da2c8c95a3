"""Records as a sequence: a list that was read at the start, or files whose records are read when they are asked for."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from prism_nemo.data.bad_records import BadRecord
from prism_nemo.data.forms import Reading, record_id, to_record
from prism_nemo.data.items import Block, ItemFile
from prism_nemo.data.records import Record
from prism_nemo.errors import DataError

_BLOCK_ITEMS = 4096  # of a file without blocks of its own beside files with some


class UnusableRecord(DataError):
    """A record that cannot be read, or lacks what the stage needs."""

    def __init__(self, bad: BadRecord) -> None:
        self.bad = bad
        super().__init__(bad.reason, where=f"record {bad.id} [{bad.where}]")


class RecordSource(Protocol):
    """fingerprint: of the records and their order; blocks: None where every record can be read by itself."""

    fingerprint: str
    blocks: list[Block] | None

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Record:
        """Raises UnusableRecord."""
        ...


class RecordList:
    """Records in memory."""

    blocks: list[Block] | None = None

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = records
        self.fingerprint = fingerprint(records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int, /) -> Record:
        return self._records[index]


@dataclass(frozen=True)
class RecordFile:
    """A data file and how its items are read."""

    items: ItemFile
    reading: Reading

    def read(self, index: int, required: Sequence[str] = ()) -> Record:
        """Raises UnusableRecord, also for a record without a `required` field."""
        path = self.items.path
        number = self.items.number(index)
        identifier, where = f"{path.stem}:{number}", f"{path}:{number}"
        try:
            item, name = self.items.read(index)
            identifier = record_id(item, name or identifier, self.reading.columns)
            record = to_record(item, identifier, self.reading)
            missing = [name for name in required if getattr(record, name) is None]
            if missing:
                raise DataError(f"the record has no {' and no '.join(missing)}")
            return record
        except DataError as error:
            raise UnusableRecord(BadRecord.from_error(identifier, where, error)) from error


class RecordFiles:
    """The records of several files, one file after the other, of which none is held in memory."""

    def __init__(self, files: Sequence[RecordFile], *, required: Sequence[str] = ()) -> None:
        self.files = list(files)
        self.required = tuple(required)
        self._starts = [0, *accumulate(len(file.items) for file in files)]
        self.blocks = _blocks([file.items for file in files])
        told = "\n".join(f"{file.items.path.name}\0{file.items.digest}" for file in files)
        self.fingerprint = hashlib.sha256(told.encode("utf-8", "surrogateescape")).hexdigest()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int, /) -> Record:
        number = bisect_right(self._starts, index) - 1
        return self.files[number].read(index - self._starts[number], self.required)

    def item(self, index: int) -> object:
        """What the file holds for a record. Raises DataError where that is broken."""
        number = bisect_right(self._starts, index) - 1
        return self.files[number].items.read(index - self._starts[number])[0]

    def where(self, index: int) -> tuple[Path, int]:
        """The file of a record and its line or number there."""
        number = bisect_right(self._starts, index) - 1
        items = self.files[number].items
        return items.path, items.number(index - self._starts[number])


class JoinedRecords:
    """Sources one after the other; a mixture's, whose order goes by weights."""

    blocks: list[Block] | None = None  # every source is ordered by itself

    def __init__(self, sources: dict[str, RecordSource], weights: Sequence[float]) -> None:
        self._sources = list(sources.values())
        self._starts = [0, *accumulate(len(source) for source in self._sources)]
        told = "\n".join(
            f"{name}\0{weight!r}\0{source.fingerprint}" for (name, source), weight in zip(sources.items(), weights, strict=True)
        )
        self.fingerprint = hashlib.sha256(told.encode("utf-8", "surrogateescape")).hexdigest()

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int, /) -> Record:
        number = bisect_right(self._starts, index) - 1
        return self._sources[number][index - self._starts[number]]


def usable(files: Sequence[RecordFile]) -> Iterator[Record | UnusableRecord]:
    """Every record in order, or why it is none."""
    for file in files:
        for index in range(len(file.items)):
            try:
                yield file.read(index)
            except UnusableRecord as error:
                yield error


def fingerprint(records: Sequence[Record]) -> str:
    """Of the records' ids and their order."""
    return hashlib.sha256("\n".join(record.id for record in records).encode("utf-8", "surrogatepass")).hexdigest()


def _blocks(items: Sequence[ItemFile]) -> list[Block] | None:
    if all(one.blocks is None for one in items):
        return None
    blocks: list[Block] = []
    for one in items:
        if one.blocks is not None:
            blocks += one.blocks
        else:  # its own bytes are not held
            blocks += [Block(min(_BLOCK_ITEMS, len(one) - start), 0) for start in range(0, len(one), _BLOCK_ITEMS)]
    return blocks
