"""Data files as sequences of items: what is written for each record, read at any place, without holding the file.

    .jsonl, .json    one JSON value per line, or per item of one list; byte ranges from an index
    .tar             WebDataset: members with one key, one after another, are an item; byte ranges from an index
    .parquet         rows; the file's own footer is the index, and a row group is read as a whole

Reading an item raises DataError where that item is broken; opening raises it where the whole file is.
"""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from prism_nemo.data.index import Digest, Index, open_index, scan_in_memory
from prism_nemo.data.spans import CHUNK_BYTES, item_spans, line_spans
from prism_nemo.errors import DataError, PrismError

MAX_ITEM_BYTES = 64 * 2**20  # of one record's JSON
MAX_OPEN_FILES = 64  # of one process, whatever the number of shards
_BOM = "\ufeff"


@dataclass(frozen=True)
class Block:
    """Items that are read together: how many, and how many bytes they take in memory."""

    items: int
    num_bytes: int


class ItemFile(Protocol):
    """path, and a digest of the content; blocks: None where every item is read by itself."""

    path: Path
    digest: str
    blocks: list[Block] | None

    def __len__(self) -> int: ...
    def number(self, index: int) -> int:
        """The item's line or number, from 1."""
        ...

    def read(self, index: int) -> tuple[object, str | None]:
        """The item, and the name that the file itself gives it. Raises DataError."""
        ...


class OpenFiles:
    """Descriptors of the files read last, at most `MAX_OPEN_FILES`."""

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[Path, int, int], int] = OrderedDict()  # by path, size and time of change

    def read(self, path: Path, start: int, end: int, *, size: int, mtime_ns: int) -> bytes:
        """Bytes [start, end) of a file, or fewer where it ends.

        Raises PrismError, which no record is skipped for, where the file is gone, is another than was indexed, or fails.
        """
        key = (path, size, mtime_ns)
        try:
            descriptor = self._open.pop(key, None)
            if descriptor is None:
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                status = os.fstat(descriptor)
                if (status.st_size, status.st_mtime_ns) != (size, mtime_ns):
                    os.close(descriptor)
                    raise PrismError(
                        "the data file changed while it is in use",
                        where=str(path),
                        remedy="leave it as it is while a run reads it",
                    )
            self._open[key] = descriptor
            if len(self._open) > MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            return _pread(descriptor, start, end)
        except OSError as error:
            raise PrismError(f"the data file cannot be read: {error.strerror or error}", where=str(path)) from error


OPEN_FILES = OpenFiles()  # one process reads its files through one set of descriptors


class SpannedFile:
    """A file whose items are byte ranges."""

    blocks: list[Block] | None = None

    def __init__(self, path: Path, index: Index) -> None:
        self.path = path
        self._file = path.absolute()  # wherever the process goes
        self.digest = index.digest
        self._spans = index.spans
        self._identity = {"size": index.size, "mtime_ns": index.mtime_ns}

    def __len__(self) -> int:
        return len(self._spans)

    def number(self, index: int) -> int:
        return int(self._spans[index, 2])

    def span(self, index: int) -> tuple[int, int]:
        return int(self._spans[index, 0]), int(self._spans[index, 1])

    def bytes_of(self, index: int, *, limit: int) -> bytes:
        """An item's bytes. Raises DataError for more than `limit`, before reading them."""
        start, end = self.span(index)
        if end - start > limit:
            raise DataError(f"the record has {end - start} bytes, the limit is {limit}", remedy="put large things into files")
        return OPEN_FILES.read(self._file, start, end, **self._identity)


class JsonItems(SpannedFile):
    """Values on lines of their own (.jsonl), or in one list (.json)."""

    def __init__(self, path: Path, cache_dir: Path | None, *, lines: bool) -> None:
        scan = _scan_lines if lines else _scan_list
        super().__init__(path, scan_in_memory(path, scan) if cache_dir is None else open_index(path, scan, cache_dir))
        self._what, self._remedy = (
            ("line", "one JSON object per line, in UTF-8") if lines else ("item", "one list of JSON objects, in UTF-8")
        )

    def read(self, index: int) -> tuple[object, str | None]:
        raw = self.bytes_of(index, limit=MAX_ITEM_BYTES)
        try:
            return parse_json(raw), None
        except DataError as error:
            raise DataError(f"the {self._what} is not JSON: {error.what}", remedy=self._remedy) from error


def parse_json(raw: bytes) -> object:
    """The JSON value. Raises DataError for other text, NaN and infinities, and characters that no UTF-8 can hold."""
    try:
        text = raw.decode("utf-8").removeprefix(_BOM)
        value = json.loads(text, parse_constant=_refuse_constant)
        if "\\ud" in text or "\\uD" in text:  # half of a pair, by itself, is no character
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise DataError("it is nested too deeply") from error
    except ValueError as error:
        raise DataError(str(error)) from error
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON's")


def _scan_lines(path: Path, digest: Digest) -> Iterator[np.ndarray]:
    return line_spans(_chunks(path, digest))


def _scan_list(path: Path, digest: Digest) -> Iterator[np.ndarray]:
    return item_spans(_chunks(path, digest), str(path))


def _chunks(path: Path, digest: Digest) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            yield chunk


def _pread(descriptor: int, start: int, end: int) -> bytes:
    parts = []
    while start < end:
        part = os.pread(descriptor, end - start, start)
        if not part:
            break
        parts.append(part)
        start += len(part)
    return b"".join(parts) if len(parts) != 1 else parts[0]
