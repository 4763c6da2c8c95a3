"""Where every record of a large data file lies, found once, kept on the disk and memory-mapped: 24 bytes a record.

An index file is a header (one line of JSON, padded) and int64 [records, 3] of (first byte, byte behind the last, number). It is
named by the data file's path and belongs to its size and time of change; one that does not fit, or is damaged, is made anew. It
appears by renaming, so nobody sees half of one, and of several processes that want the same one, one makes it while the others
wait. The data's own folder is only read.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import uuid
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from prism_nemo.errors import ConfigError, DataError, PrismError
from prism_nemo.waiting import waiting

VERSION = 1
_HEADER_BYTES = 4096
_ROW_BYTES = 24


class Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...


Scan = Callable[[Path, Digest], Iterator[np.ndarray]]  # the spans of a file; what it reads goes into the digest


@dataclass(frozen=True, eq=False)
class Index:
    """spans: int64 [records, 3] of (first byte, byte behind the last, number); digest: of the file's content.

    size, mtime_ns: the state of the file that was scanned.
    """

    spans: np.ndarray
    digest: str
    size: int
    mtime_ns: int

    def __len__(self) -> int:
        return len(self.spans)


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/prism_nemo`, by default `~/.cache/prism_nemo`. Raises ConfigError where there is no home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "prism_nemo"
    except RuntimeError as error:
        raise ConfigError(
            "there is no home folder to keep the index of large data in", where="data.cache_dir", remedy="set it"
        ) from error


def scan_in_memory(path: Path, scan: Scan) -> Index:
    """The index of a file, kept nowhere."""
    digest = hashlib.sha256()
    key = _key_of(path)
    spans = np.concatenate([np.empty((0, 3), dtype=np.int64), *scan(path, digest)])
    _refuse_change(path, key)
    return Index(spans, digest.hexdigest(), key["size"], key["mtime_ns"])


def open_index(path: Path, scan: Scan, cache_dir: Path) -> Index:
    """The index of a file from `cache_dir`, made first where it is not there.

    Raises DataError for a file that `scan` refuses or that changes meanwhile, PrismError for a cache that cannot be written.
    """
    path = path.absolute()
    key = _key_of(path)
    name = hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    file = cache_dir / f"{path.stem[:40]}-{name}.index"
    found = _load(file, key)
    if found is not None:
        return found
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _lock(file.with_suffix(".lock")) as alone:
            found = _load(file, key)  # another process may have made it
            for left in cache_dir.glob(f".{file.name}.*.new") if alone else ():
                left.unlink(missing_ok=True)  # of a process that was killed
            if found is None:
                _build(file, key, path, scan)
                found = _load(file, key)
    except OSError as error:
        raise _cannot_write(cache_dir, error) from error
    assert found is not None, "an index that was just written can be read"
    return found


def _key_of(path: Path) -> dict[str, Any]:
    """What an index must have been made of to be used. Raises DataError where there is no such file."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"the data file cannot be read: {error.strerror}", where=str(path), remedy="check the path") from error
    return {"version": VERSION, "path": str(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def _refuse_change(path: Path, key: dict[str, Any]) -> None:
    if _key_of(path) != key:
        raise DataError("the data file changed while it was read", where=str(path), remedy="let it be finished first")


def _build(file: Path, key: dict[str, Any], path: Path, scan: Scan) -> None:
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.new")  # hosts share folders
    digest, crc, records = hashlib.sha256(), 0, 0
    try:
        with temporary.open("wb") as out:
            out.write(b" " * _HEADER_BYTES)
            for spans in scan(path, digest):
                data = np.ascontiguousarray(spans, dtype=np.int64).tobytes()
                out.write(data)
                crc, records = zlib.crc32(data, crc), records + len(spans)
            _refuse_change(path, key)
            header = json.dumps({**key, "records": records, "digest": digest.hexdigest(), "crc": crc}).encode()
            if len(header) >= _HEADER_BYTES:
                raise DataError("the data file's path is too long", where=str(path))
            out.seek(0)
            out.write(header)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _load(file: Path, key: dict[str, Any]) -> Index | None:
    """The index, or None where it is missing, of another state of the data, or damaged."""
    try:
        with file.open("rb") as opened:
            header = json.loads(opened.read(_HEADER_BYTES))
        size = file.stat().st_size
        if not isinstance(header, dict) or any(header.get(name) != value for name, value in key.items()):
            return None
        records = header["records"]
        if size != _HEADER_BYTES + records * _ROW_BYTES:
            return None
        if records == 0:
            return Index(np.empty((0, 3), dtype=np.int64), header["digest"], key["size"], key["mtime_ns"])
        spans = np.memmap(file, dtype=np.int64, mode="r", offset=_HEADER_BYTES, shape=(records, 3))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    index = Index(spans, header["digest"], key["size"], key["mtime_ns"])
    return index if zlib.crc32(spans.data) == header.get("crc") else None


@contextlib.contextmanager
def _lock(file: Path) -> Iterator[bool]:
    """Holds the file's lock; False where the file system has none: then several processes may do the same work, without harm."""
    with file.open("a") as opened:
        held = True
        try:
            with waiting("another process that indexes the data"):
                fcntl.flock(opened, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            held = False
        yield held


def _cannot_write(cache_dir: Path, error: OSError) -> PrismError:
    return PrismError(
        f"the index of large data cannot be written: {error.strerror or error}",
        where=str(cache_dir),
        remedy="set data.cache_dir to a folder that can be written and has room for 24 bytes a record",
    )
