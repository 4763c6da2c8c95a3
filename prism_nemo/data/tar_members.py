"""The members of a tar archive, header by header: ustar, GNU's long names, and pax.

Python's `tarfile` reads one header's blocks; what stands between members is read here. `tarfile` itself follows sizes below zero
for ever, goes a call deeper for every header before a header, and takes minutes over crafted pax records.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from prism_nemo.errors import DataError

BLOCK = tarfile.BLOCKSIZE
MAX_EXTRA_BYTES = 1 << 20  # of one header before a member: long names and pax records
MAX_EXTRA_HEADERS = 16  # before one member
_LONG_NAME = tarfile.GNUTYPE_LONGNAME
_PAX = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_EXTRA = (_LONG_NAME, tarfile.GNUTYPE_LONGLINK, *_PAX, tarfile.XGLTYPE)  # the last is for all members: none of ours
_WITHOUT_CONTENT = (
    tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE,
)  # fmt: skip
_MAX_DIGITS = 18  # of a size


@dataclass(frozen=True)
class Member:
    """A member and where it lies: from the first of its headers at `start`, its `size` bytes at `content`, up to `end`.

    mtime   in seconds, of pax records with its fraction
    plain   it is a file with a content of its own: no folder, link, device, sparse file or unknown kind
    """

    name: str
    start: int
    content: int
    end: int
    size: int
    mtime: float
    plain: bool
    folder: bool


class DamagedTar(DataError):
    """What stands at byte `offset` is no member."""

    def __init__(self, what: str, offset: int) -> None:
        super().__init__(f"the shard is damaged here: {what}", remedy="copy or write it again")
        self.offset = offset


def members(file: IO[bytes]) -> Iterator[Member]:
    """All members of an uncompressed archive, up to its closing block or its end; the last may end behind that.

    Raises DamagedTar.
    """
    at, size = 0, file.seek(0, 2)
    while at < size or not at:
        start, records = at, dict[str, str]()
        for _ in range(MAX_EXTRA_HEADERS + 1):
            head = _header(file, at, may_end=0 < at == start)
            if head is None:
                return
            if head.type not in _EXTRA:
                break
            records |= _extra(file, head, at)
            at = min(at + BLOCK + _padded(head.size), size)
        else:
            raise DamagedTar(f"more than {MAX_EXTRA_HEADERS} headers before a member", start)
        member = _member(file, head, records, start, at)
        yield member
        at = member.end


def _header(file: IO[bytes], at: int, *, may_end: bool) -> tarfile.TarInfo | None:
    """The header at a place; None where the archive ends and may do so."""
    file.seek(at)
    block = file.read(BLOCK)
    if may_end and not block.strip(b"\0"):
        return None
    try:
        head = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError) as error:
        raise DamagedTar(str(error), at) from error
    if head.size < 0:
        raise DamagedTar("a size below 0", at)
    return head


def _extra(file: IO[bytes], head: tarfile.TarInfo, at: int) -> dict[str, str]:
    """The records of a header that belongs to a member behind it."""
    if head.size > MAX_EXTRA_BYTES:
        raise DamagedTar(f"a header of {head.size} bytes before a member, the limit is {MAX_EXTRA_BYTES}", at)
    content = file.read(head.size)
    if len(content) < head.size:
        raise DamagedTar("unexpected end of data", at)
    if head.type == _LONG_NAME:
        return {"path": _text(content.partition(b"\0")[0])}
    return _pax_records(content, at) if head.type in _PAX else {}


def _pax_records(content: bytes, at: int) -> dict[str, str]:
    """`LENGTH KEY=VALUE\\n`, one behind the other."""
    records, place = dict[str, str](), 0
    while place < len(content) and content[place] != 0:
        digits, space, _ = content[place : place + _MAX_DIGITS + 1].partition(b" ")
        length = int(digits) if space and digits.isdigit() else 0
        key, equals, value = content[place + len(digits) + 1 : place + length].partition(b"=")
        if place + length > len(content) or not equals or not value.endswith(b"\n"):
            raise DamagedTar("a pax record that is none", at)
        records[_text(key)] = _text(value[:-1])
        place += length
    return records


def _member(file: IO[bytes], head: tarfile.TarInfo, records: dict[str, str], start: int, at: int) -> Member:
    name, folder = records.get("path", head.name), head.type == tarfile.DIRTYPE
    sparse = head.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse.") for key in records)
    content, size = at + BLOCK, _number(records.get("size"), head.size, start)
    if head.type == tarfile.GNUTYPE_SPARSE:
        content = _behind_sparse_maps(file, at)
    return Member(
        name=name.rstrip("/") if folder or "path" in records else name,
        start=start,
        content=content,
        end=content + (0 if head.type in _WITHOUT_CONTENT else _padded(size)),
        size=size,
        mtime=_seconds(records.get("mtime"), head.mtime),
        plain=head.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE) and not sparse,
        folder=folder,
    )


def _behind_sparse_maps(file: IO[bytes], at: int) -> int:
    """Where the content of GNU's oldest sparse files begins: behind blocks that say whether there is another one."""
    file.seek(at + 482)
    more, at = file.read(1), at + BLOCK
    while more not in (b"", b"\0"):
        file.seek(at + 504)
        more, at = file.read(1), at + BLOCK
    return at


def _number(text: str | None, default: int, at: int) -> int:
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise DamagedTar(f"a size of {text[:20]!r}", at)
    return int(text)


def _seconds(text: str | None, default: float) -> float:
    try:
        return default if text is None else float(text)
    except ValueError:
        return 0


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _text(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")
