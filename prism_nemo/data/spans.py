"""Where the records of a text file lie: byte ranges found in one pass over chunks of the file, never holding more than one.

Both functions yield int64 arrays [k, 3] of (first byte, byte behind the last, number): a line's number counts blank lines too,
an item's does not. Nothing is parsed here beyond what separates records, so that a malformed one is found, and named, when it is
read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from prism_nemo.errors import DataError

CHUNK_BYTES = 4 * 2**20
_BLANKS = b" \t\n\r\x0b\x0c"
_BOM = b"\xef\xbb\xbf"
_IS_BLANK = np.zeros(256, dtype=bool)
_IS_BLANK[list(_BLANKS)] = True
_OTHER, _QUOTE, _OPEN, _CLOSE, _COMMA, _BACKSLASH = range(6)
_KINDS = np.zeros(256, dtype=np.uint8)
for _characters, _kind in ((b'"', _QUOTE), (b"[{", _OPEN), (b"]}", _CLOSE), (b",", _COMMA), (b"\\", _BACKSLASH)):
    _KINDS[list(_characters)] = _kind


def line_spans(chunks: Iterable[bytes]) -> Iterator[np.ndarray]:
    """Of every line that is not blank; numbers start at 1."""
    base = start = 0  # bytes before this chunk; where the open line starts
    visible = False  # whether the open line has shown anything but blanks
    number = 1
    for chunk in chunks:
        data = np.frombuffer(chunk, dtype=np.uint8)
        ends = np.flatnonzero(data == ord("\n"))
        starts = np.concatenate([[start], ends + 1 + base])
        begins = np.maximum(starts - base, 0)  # within this chunk
        keep = np.ones(len(starts), dtype=bool)
        keep[:-1] = ~_IS_BLANK[data[begins[:-1]]]
        for line in np.flatnonzero(~keep[:-1]):
            keep[line] = bool(chunk[begins[line] : ends[line]].strip(_BLANKS))
        keep[0] |= visible and len(ends) > 0
        yield np.stack([starts[:-1], ends + base, number + np.arange(len(ends))], axis=1)[keep[:-1]]
        rest = bool(chunk[begins[-1] :].strip(_BLANKS))
        visible = rest if len(ends) else visible or rest
        number += len(ends)
        start = int(starts[-1])
        base += len(data)
    if visible:
        yield np.array([[start, base, number]], dtype=np.int64)


def item_spans(chunks: Iterable[bytes], where: str) -> Iterator[np.ndarray]:
    """Of every item of the one list that the file is; numbers start at 1.

    Raises DataError when the file is not one list, and when it ends within it.
    """
    scanner = _ListScanner(where)
    for chunk in chunks:
        yield scanner.feed(chunk)
    scanner.finish()


class _ListScanner:
    """The state between two chunks."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._base = 0  # bytes before this chunk
        self._opened: int | None = None  # the byte behind the list's bracket
        self._closed = False
        self._item = 0  # where the open item starts
        self._number = 1
        self._depth = 0
        self._in_string = False
        self._escaped = False  # the first byte of the next chunk follows a backslash that escapes it

    def feed(self, chunk: bytes) -> np.ndarray:
        """The items that end in this chunk, int64 [k, 3]."""
        found = np.empty((0, 3), dtype=np.int64)
        if self._closed:
            self._only_blanks(chunk)
        elif self._opened is not None or self._opens(chunk):
            found = self._items(chunk)
        self._base += len(chunk)
        return found

    def finish(self) -> None:
        if self._opened is None:
            raise self._error("it is empty")
        if not self._closed:
            raise self._error(f"it ends within item {self._number}, which starts at byte {self._item}")

    def _opens(self, chunk: bytes) -> bool:
        """Whether the list starts in this chunk; raises DataError for a file that is something else."""
        text = chunk.removeprefix(_BOM) if self._base == 0 else chunk
        first = text.lstrip(_BLANKS)[:1]
        if first == b"[":
            self._opened = 0
            return True
        if first == b"{":
            raise DataError(
                "the file holds an object, not a list of records",
                where=self._where,
                remedy="use .jsonl for one record per line",
            )
        if first:
            raise self._error(f"it starts with {first!r}, a list starts with [")
        return False

    def _items(self, chunk: bytes) -> np.ndarray:
        at, kinds = self._structure(chunk)
        depth = self._depth + np.cumsum(np.where(kinds == _OPEN, 1, np.where(kinds == _CLOSE, -1, 0)))
        if self._opened == 0:
            self._opened = self._item = self._base + int(at[0]) + 1
        ends = np.flatnonzero((kinds == _CLOSE) & (depth == 0))
        if len(ends):
            at, kinds, depth = at[: ends[0] + 1], kinds[: ends[0] + 1], depth[: ends[0] + 1]
            self._closed = True
            self._only_blanks(chunk[int(at[-1]) + 1 :])
        self._depth = int(depth[-1]) if len(depth) else self._depth
        bounds = at[(kinds == _COMMA) & (depth == 1)] + self._base
        if self._closed:
            last = int(at[-1]) + self._base
            first = int(bounds[-1]) + 1 if len(bounds) else self._item
            blank = not chunk[max(0, first - self._base) : last - self._base].strip(_BLANKS) and first >= self._base
            if not (blank and self._number == 1 and not len(bounds)):  # an empty list has no item
                bounds = np.append(bounds, last)
        starts = np.concatenate([[self._item], bounds + 1])
        found = np.stack([starts[:-1], bounds, self._number + np.arange(len(bounds))], axis=1)
        self._item, self._number = int(starts[-1]), self._number + len(bounds)
        return found

    def _structure(self, chunk: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Places and kinds of the brackets and commas outside of strings."""
        kinds = _KINDS[np.frombuffer(chunk, dtype=np.uint8)]
        self._drop_escaped(kinds)
        at = np.flatnonzero(kinds)
        found = kinds[at]
        quotes = found == _QUOTE
        inside = (np.cumsum(quotes) + self._in_string) % 2 == 1
        self._in_string = bool(inside[-1]) if len(inside) else self._in_string
        outside = ~inside & ~quotes
        return at[outside], found[outside]

    def _drop_escaped(self, kinds: np.ndarray) -> None:
        """Takes backslashes, and what they escape, out of `kinds`: the byte behind an odd run of them."""
        slashes = np.flatnonzero(kinds == _BACKSLASH)
        carried, self._escaped = self._escaped, False
        kinds[slashes] = _OTHER
        if carried and len(kinds):
            if len(slashes) and slashes[0] == 0:
                slashes = slashes[1:]  # escaped itself, it escapes nothing
            kinds[0] = _OTHER
        if not len(slashes):
            self._escaped = carried and not len(kinds)
            return
        first = np.flatnonzero(np.diff(slashes, prepend=-2) != 1)
        lengths = np.diff(np.append(first, len(slashes)))
        behind = slashes[first] + lengths
        escaped = behind[lengths % 2 == 1]
        if len(escaped) and escaped[-1] == len(kinds):
            self._escaped = True
            escaped = escaped[:-1]
        kinds[escaped] = _OTHER

    def _only_blanks(self, rest: bytes) -> None:
        if rest.strip(_BLANKS):
            raise self._error("there is more text behind the list")

    def _error(self, what: str) -> DataError:
        return DataError(
            f"the file is not JSON: {what}", where=self._where, remedy="a .json data file is one list of records, in UTF-8"
        )
