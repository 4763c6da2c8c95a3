"""Weights in buckets: packed side by side in a buffer, checked, and taken apart again where they lie.

A bucket holds whole tensors, or rows of one that is larger than a bucket. The buffer has several slots, so that one is packed
while others are read. It is shared memory that servers of this machine map; where there is none, or it is to lie on a GPU,
memory whose bytes are sent.
"""

from __future__ import annotations

import mmap
import os
import re
import secrets
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism_nemo.rollout.wire import WireError

SHARED_MEMORY = Path("/dev/shm")
_SHARED_NAME = re.compile(r"prism-nemo-[0-9a-f]{32}")
_CPU = torch.device("cpu")
_ALIGNMENT = 64  # bytes; of every tensor in a bucket
_CHECKED_WORDS = 512  # of 8 bytes, that are summed before a bucket's sums are checked
NUM_SLOTS = 3  # one is packed, one is read, and one is waiting, so that neither side waits for a message
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class Piece:
    """`size` bytes from byte `start` on of a contiguous tensor, at byte `offset` of its bucket."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int
    offset: int

    @property
    def whole_size(self) -> int:
        return prod(self.shape) * _DTYPES[self.dtype].itemsize

    @property
    def row_size(self) -> int:
        """Bytes."""
        return prod(self.shape[1:]) * _DTYPES[self.dtype].itemsize


@dataclass(frozen=True, eq=False)
class Bucket:
    """One bucket on its way. `data` is valid until the buffer's slot is packed again."""

    number: int
    at: int  # byte of the buffer
    data: Tensor  # uint8
    pieces: tuple[Piece, ...]
    checksum: int  # of `data`, taken while it is still in the processor's cache


def checksum(data: Tensor) -> int:
    """Of uint8 [n], on any device: CRC-32 over the sums of 4 KiB each. A CRC of every byte would outlast the copy.

    It sees every changed word and every block that is not where it belongs; not two words that changed places within a block.
    """
    blocks = data.numel() // (8 * _CHECKED_WORDS) * (8 * _CHECKED_WORDS)
    sums = data[:blocks].view(torch.int64).view(-1, _CHECKED_WORDS).sum(dim=1).cpu()
    return zlib.crc32(data[blocks:].cpu().numpy().tobytes(), zlib.crc32(sums.numpy().tobytes()))


class BucketBuffer:
    """Slots of `bucket_bytes` each: on the CPU in shared memory where there is room, else on the device."""

    def __init__(self, bucket_bytes: int, device: torch.device = _CPU) -> None:
        self.bucket_bytes = -(-bucket_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.name: str | None = None  # of the shared memory, as long as it can be mapped
        self.device = device
        size = NUM_SLOTS * self.bucket_bytes
        self._data = self._share(size) if device.type == "cpu" else torch.empty(size, dtype=torch.uint8, device=device)

    def _share(self, size: int) -> Tensor:
        """Memory under a new name; without one where the system has too little of it."""
        self.hide()
        name = f"prism-nemo-{secrets.token_hex(16)}"
        try:
            descriptor = os.open(SHARED_MEMORY / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError:
            return torch.empty(size, dtype=torch.uint8)
        try:
            os.posix_fallocate(descriptor, 0, size)  # or a write would end the process when memory is short
            mapped = mmap.mmap(descriptor, size)
        except OSError:
            (SHARED_MEMORY / name).unlink()
            return torch.empty(size, dtype=torch.uint8)
        finally:
            os.close(descriptor)
        self.name = name
        self._forget = weakref.finalize(self, (SHARED_MEMORY / name).unlink, missing_ok=True)  # should nobody hide it
        return torch.frombuffer(mapped, dtype=torch.uint8)

    def renew(self) -> None:
        """The memory gets a new name, by which servers can map it that could not before. No bucket may be on its way."""
        if self.device.type == "cpu":
            self._data = self._share(NUM_SLOTS * self.bucket_bytes)

    def hide(self) -> None:
        """Takes the name away: who has mapped the memory keeps it, and it goes with the last one, however that ends."""
        if self.name is not None:
            self._forget()
            self.name = None

    def pack(self, tensors: Iterable[tuple[str, Tensor]], free: Callable[[int], None]) -> Iterator[Bucket]:
        """The tensors in buckets, in the slots by turns; `free(number)` returns when that bucket's slot may be overwritten.

        All of `tensors` is read. Raises WireError for a tensor whose type does not travel.
        """
        filling = _Filling(self._data, self.bucket_bytes, free)
        for name, tensor in tensors:
            kind = str(tensor.dtype).removeprefix("torch.")
            if kind not in _DTYPES:
                raise WireError(f"`{name}` is of type {kind}, and weights travel as {', '.join(_DTYPES)}")
            shape, size = tuple(tensor.shape), tensor.nbytes
            if size <= self.bucket_bytes:
                if not filling.has_room(size):
                    yield filling.take()
                filling.add(name, kind, shape, 0, tensor.detach())
                continue
            for start, part in _parts(tensor.detach(), self.bucket_bytes):
                if filling.pieces:
                    yield filling.take()
                filling.add(name, kind, shape, start, part)
        if filling.pieces:
            yield filling.take()


def _parts(tensor: Tensor, most: int) -> Iterator[tuple[int, Tensor]]:
    """Parts of `most` bytes at most, each behind its first byte's place: whole rows, of any strides, unless one is too long."""
    row = tensor[0].nbytes
    if row <= most:
        count = most // row
        yield from ((first * row, tensor[first : first + count]) for first in range(0, tensor.shape[0], count))
        return
    flat = tensor.contiguous().view(-1).view(torch.uint8)
    yield from ((start, flat[start : start + most]) for start in range(0, flat.numel(), most))


class _Filling:
    """The bucket that is being packed."""

    def __init__(self, data: Tensor, bucket_bytes: int, free: Callable[[int], None]) -> None:
        self.pieces: list[Piece] = []
        self._data, self._bucket_bytes, self._free = data, bucket_bytes, free
        self._number = self._used = 0

    @property
    def _at(self) -> int:
        return self._number % NUM_SLOTS * self._bucket_bytes

    def has_room(self, size: int) -> bool:
        return self._used + size <= self._bucket_bytes

    def add(self, name: str, kind: str, shape: tuple[int, ...], first: int, source: Tensor) -> None:
        """`source`: the tensor, or a part of it from byte `first` on, of any strides and on any device."""
        if not self.pieces:
            self._free(self._number)
        start, size = self._at + self._used, source.nbytes
        self._data[start : start + size].view(source.dtype).view(source.shape).copy_(source)
        self.pieces.append(Piece(name, kind, shape, first, size, self._used))
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT

    def take(self) -> Bucket:
        size = self.pieces[-1].offset + self.pieces[-1].size
        data = self._data[self._at : self._at + size]
        bucket = Bucket(self._number, self._at, data, tuple(self.pieces), checksum(data))
        self.pieces, self._used = [], 0
        self._number += 1
        return bucket


def map_shared(name: str) -> Tensor | None:
    """The shared memory of that name, uint8; None where this machine has none, or it belongs to another user."""
    if not _SHARED_NAME.fullmatch(name):
        raise WireError(f"{name[:60]!r} is no name of shared memory")
    try:
        descriptor = os.open(SHARED_MEMORY / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.getuid() or status.st_size == 0:
            return None
        return torch.frombuffer(mmap.mmap(descriptor, status.st_size), dtype=torch.uint8)
    finally:
        os.close(descriptor)


def read_pieces(header: Mapping[str, Any], data: Tensor) -> list[tuple[Piece, Tensor]]:
    """A bucket's pieces and their bytes, views of `data`.

    Raises WireError for damaged bytes, and for pieces that do not lie within them.
    """
    try:
        pieces = [
            Piece(str(name), str(dtype), tuple(map(int, shape)), *map(int, numbers))
            for name, dtype, shape, *numbers in header["pieces"]
        ]
        number, expected = int(header["number"]), int(header["checksum"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise WireError(f"not a bucket of weights: {error!r}") from error
    if checksum(data) != expected:
        raise WireError(f"the bytes of bucket {number} are not those that were sent: their checksum differs")
    for piece in pieces:
        inside = min(piece.offset, piece.size) >= 0 and piece.offset + piece.size <= data.numel()
        known = piece.dtype in _DTYPES and min(piece.shape, default=0) >= 0 and piece.offset % _ALIGNMENT == 0
        if not inside or not known or not 0 <= piece.start <= piece.start + piece.size <= piece.whole_size:
            raise WireError(f"`{piece.name:.80}` does not lie within its bucket")
    return [(piece, data[piece.offset : piece.offset + piece.size]) for piece in pieces]


def bucket_header(bucket: Bucket) -> dict[str, Any]:
    """What `read_pieces` needs to know."""
    pieces = [[p.name, p.dtype, p.shape, p.start, p.size, p.offset] for p in bucket.pieces]
    return {"number": bucket.number, "checksum": bucket.checksum, "pieces": pieces}


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a tensor of shape `shape`, from row `first` on; all of them, where it is not larger than a bucket."""

    name: str
    shape: tuple[int, ...]
    first: int
    values: Tensor


class Assembly:
    """Rows, or whole tensors, from pieces. What lies in one bucket is used where it lies.

    Whole tensors that are larger than a bucket are put together in memory that is kept between updates: to get it anew takes
    several times as long as to fill it.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._piece: Piece | None = None  # the last, of a tensor that is not complete

    def restart(self) -> None:
        """Forgets what is not complete."""
        self._piece = None

    def tensors(self, pieces: Sequence[tuple[Piece, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors that these pieces complete, each valid until the next is asked for. Raises WireError for a gap."""
        return ((rows.name, rows.values) for rows in self._add(pieces, cut=False))

    def rows(self, pieces: Sequence[tuple[Piece, Tensor]]) -> Iterator[Rows]:
        """The rows that these pieces are, or complete, each valid until the next is asked for. Raises WireError for a gap."""
        return self._add(pieces, cut=True)

    def _add(self, pieces: Sequence[tuple[Piece, Tensor]], *, cut: bool) -> Iterator[Rows]:
        for piece, data in pieces:
            last, end = self._piece, piece.start + piece.size
            if piece.start == 0:
                self.check_complete()
            elif (
                last is None
                or replace(last, start=piece.start, size=piece.size, offset=piece.offset) != piece
                or last.start + last.size != piece.start
            ):
                raise WireError(f"a part of `{piece.name:.80}` is missing")
            complete = end == piece.whole_size
            self._piece = None if complete else piece
            dtype, row = _DTYPES[piece.dtype], piece.row_size
            if piece.size == piece.whole_size:
                yield Rows(piece.name, piece.shape, 0, data.view(dtype).view(piece.shape))
            elif cut and piece.start % row == 0 and piece.size % row == 0:
                yield Rows(piece.name, piece.shape, piece.start // row, data.view(dtype).view(-1, *piece.shape[1:]))
            else:
                full = self._collect(piece, data)
                if complete:
                    yield Rows(piece.name, piece.shape, 0, full.view(dtype).view(piece.shape))

    def _collect(self, piece: Piece, data: Tensor) -> Tensor:
        """The memory of a whole tensor, with this piece of it filled."""
        if self._memory.numel() < piece.whole_size or self._memory.device != data.device:
            self._memory = torch.empty(piece.whole_size, dtype=torch.uint8, device=data.device)
        self._memory[piece.start : piece.start + piece.size] = data
        return self._memory[: piece.whole_size]

    def check_complete(self) -> None:
        """Raises WireError while a tensor lacks a part."""
        if self._piece is not None:
            raise WireError(f"a part of `{self._piece.name:.80}` is missing")
