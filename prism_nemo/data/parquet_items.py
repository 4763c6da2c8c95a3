"""Parquet files: rows by their number, a row group at a time.

A row group is the least that can be read, so the groups read last are kept, up to a number of bytes, and whoever wants rows in
another order than the file's goes from block to block (`Block`). Bytes are as the footer tells them, uncompressed, for the cache
and for the windows of a shuffled epoch alike: so a window's groups are all kept while it lasts. A group too large to be kept can
be read in the file's order alone, some rows at a time.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from prism_nemo.data.items import Block, ItemFile
from prism_nemo.data.parquet_growth import check_growth, group_bytes, growing_columns
from prism_nemo.errors import DataError, PrismError

MAX_GROUP_BYTES = 2**30  # of one row group in memory
MAX_GROWN_BYTES = 2**30  # of what is read at a time, once values that are stored for many rows stand in each
_ROWS_AT_ONCE = 64  # of a larger one
_BUFFER_BYTES = 2**20
CACHED_BYTES = 256 * 2**20  # of the row groups that are kept


class GroupCache:
    """The row groups read last, of all files of this process; always at least the newest."""

    def __init__(self, limit: int = CACHED_BYTES) -> None:
        self.limit = limit
        self._held: OrderedDict[tuple[str, int], tuple[Any, int]] = OrderedDict()
        self._bytes = 0

    def get(self, key: tuple[str, int]) -> Any:
        """The table, or None."""
        if key not in self._held:
            return None
        self._held.move_to_end(key)
        return self._held[key][0]

    def add(self, key: tuple[str, int], table: Any, num_bytes: int) -> None:
        self._held[key] = (table, num_bytes)
        self._bytes += num_bytes
        while self._bytes > self.limit and len(self._held) > 1:
            self._bytes -= self._held.popitem(last=False)[1][1]


GROUPS = GroupCache()


class ParquetItems:
    """The rows of a file. Raises DataError for one that is not readable parquet."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self.path = path
        try:
            with pq.ParquetFile(path) as file:
                metadata = file.metadata
                groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
                self.blocks: list[Block] | None = [Block(group.num_rows, group_bytes(group, MAX_GROUP_BYTES)) for group in groups]
                self._growing = growing_columns(metadata, MAX_GROWN_BYTES)
                self.digest = _digest(path, metadata.serialized_size)
        except Exception as error:  # decoders of foreign bytes raise anything, here and below
            raise DataError(f"the file is not readable parquet: {error}", where=str(path)) from error
        self._file = path.absolute()  # wherever the process goes
        self._identity = self._state()
        self._starts = [0, *accumulate(block.items for block in self.blocks)]
        self._place: _Place | None = None

    def __len__(self) -> int:
        return self._starts[-1]

    def number(self, index: int) -> int:
        return index + 1

    def read(self, index: int) -> tuple[object, str | None]:
        group = bisect_right(self._starts, index) - 1
        row = index - self._starts[group]
        assert self.blocks is not None
        try:
            if self.blocks[group].num_bytes > MAX_GROUP_BYTES:
                return self._row_in_order(group, row), None
            return self._group(group).slice(row, 1).to_pylist()[0], None
        except PrismError:
            raise
        except Exception as error:  # text that is not UTF-8, times out of range
            raise DataError(f"the row cannot be read: {error}", remedy="write the file again") from error

    def _group(self, group: int) -> Any:
        """The row group as a table; raises DataError where it is damaged."""
        import pyarrow.parquet as pq

        table = GROUPS.get((self._identity, group))
        if table is not None:
            return table
        self._refuse_change()
        assert self.blocks is not None
        try:
            with pq.ParquetFile(self._file, read_dictionary=self._growing) as file:
                table = file.read_row_group(group, use_threads=False)
            if self._growing:
                check_growth(table, MAX_GROWN_BYTES)
        except DataError:
            raise
        except Exception as error:
            raise self._damaged(group, error) from error
        GROUPS.add((self._identity, group), table, self.blocks[group].num_bytes)
        return table

    def _row_in_order(self, group: int, row: int) -> Any:
        """A row of a group that is too large to be kept, going on from the row read before it."""
        if self._place is None or self._place.group != group or row < self._place.first:
            self._refuse_change()
            self._place = _Place(group, _batches(self._file, group, self._growing))
        place = self._place
        try:
            while row >= place.first + len(place.rows):
                place.first += len(place.rows)
                place.rows = next(place.batches)
        except DataError:
            self._place = None
            raise
        except Exception as error:
            self._place = None
            raise self._damaged(group, error) from error
        return place.rows[row - place.first]

    def _state(self) -> str:
        try:
            status = self._file.stat()
        except OSError as error:
            raise PrismError(f"the data file cannot be read: {error.strerror or error}", where=str(self.path)) from error
        return f"{self._file}\0{status.st_size}\0{status.st_mtime_ns}"

    def _refuse_change(self) -> None:
        """Raises PrismError, which no record is skipped for, where the file is gone or is another than was opened."""
        if self._state() != self._identity:
            raise PrismError(
                "the data file changed while it is in use", where=str(self.path), remedy="leave it as it is while a run reads it"
            )

    def _damaged(self, group: int, error: BaseException) -> DataError:
        return DataError(
            f"row group {group} cannot be read: {error}", where=str(self.path), remedy="copy or write the file again"
        )


@dataclass
class _Place:
    """How far a large row group has been read."""

    group: int
    batches: Iterator[list[Any]]
    first: int = 0
    rows: list[Any] = field(default_factory=list)


def _batches(path: Path, group: int, growing: list[str]) -> Iterator[list[Any]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False, read_dictionary=growing) as file:
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, row_groups=[group], use_threads=False):
            if growing:
                check_growth(batch, MAX_GROWN_BYTES)
            yield batch.to_pylist()


def refuse_large_groups(items: ItemFile) -> None:
    """Raises DataError for a file whose row groups cannot be read in any order but the file's."""
    for group, block in enumerate(items.blocks or ()):
        if block.num_bytes > MAX_GROUP_BYTES:
            raise DataError(
                f"row group {group} has {block.num_bytes} bytes, and more than {MAX_GROUP_BYTES} cannot be shuffled",
                where=str(items.path),
                remedy="write smaller row groups: prism-nemo data convert FILE --out NEW.parquet; or data.shuffle=false",
            )


def _digest(path: Path, footer_bytes: int) -> str:
    """Of the footer, which knows every column chunk's place, size and statistics, and of the file's size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - footer_bytes - 8))
        return hashlib.sha256(str(size).encode() + file.read()).hexdigest()
