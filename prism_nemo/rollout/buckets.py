"""Weights in buckets: packed side by side in a buffer, checked, and taken apart again where they lie.

A bucket holds whole tensors, or one piece of a tensor that is larger than a bucket. The buffer has two halves, so that one is
packed while the other is read. It is shared memory that servers of this machine map; where there is none, ordinary memory that
is sent.
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
_ALIGNMENT = 64  # bytes; of every tensor in a bucket
_CHECKED_WORDS = 512  # of 8 bytes, that are summed before a bucket's sums are checked
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}


@dataclass(frozen=True)
class Piece:
    """`size` bytes from byte `start` on of a contiguous tensor, at byte `offset` of its bucket.

    Each has a checksum of its own: taken where its bytes are still in the processor's cache, it costs next to nothing.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size: int
    offset: int
    checksum: int = 0

    @property
    def whole_size(self) -> int:
        return prod(self.shape) * _DTYPES[self.dtype].itemsize


@dataclass(frozen=True, eq=False)
class Bucket:
    """One bucket on its way. `data` is valid until the buffer's half is packed again."""

    number: int
    at: int  # byte of the buffer
    data: Tensor  # uint8
    pieces: tuple[Piece, ...]


def checksum(data: Tensor) -> int:
    """Of uint8 [n]: CRC-32 over the sums of 4 KiB each, six times as fast as a CRC of every byte, which would outlast the copy.

    It sees every changed word and every block that is not where it belongs; not two words that changed places within a block.
    """
    blocks = data.numel() // (8 * _CHECKED_WORDS) * (8 * _CHECKED_WORDS)
    sums = data[:blocks].view(torch.int64).view(-1, _CHECKED_WORDS).sum(dim=1)
    return zlib.crc32(data[blocks:].numpy().tobytes(), zlib.crc32(sums.numpy().tobytes()))


class BucketBuffer:
    """Two halves of `bucket_bytes` each, in shared memory where there is room."""

    def __init__(self, bucket_bytes: int) -> None:
        self.bucket_bytes = -(-bucket_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self.name: str | None = None  # of the shared memory, as long as it can be mapped
        self._data = self._share()

    def _share(self) -> Tensor:
        """Memory under a new name; without one where the system has too little of it."""
        self.hide()
        name = f"prism-nemo-{secrets.token_hex(16)}"
        try:
            descriptor = os.open(SHARED_MEMORY / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError:
            return torch.empty(2 * self.bucket_bytes, dtype=torch.uint8)
        try:
            os.posix_fallocate(descriptor, 0, 2 * self.bucket_bytes)  # or a write would end the process when memory is short
            mapped = mmap.mmap(descriptor, 2 * self.bucket_bytes)
        except OSError:
            (SHARED_MEMORY / name).unlink()
            return torch.empty(2 * self.bucket_bytes, dtype=torch.uint8)
        finally:
            os.close(descriptor)
        self.name = name
        self._forget = weakref.finalize(self, (SHARED_MEMORY / name).unlink, missing_ok=True)  # should nobody hide it
        return torch.frombuffer(mapped, dtype=torch.uint8)

    def renew(self) -> None:
        """The memory gets a new name, by which servers can map it that could not before. No bucket may be on its way."""
        self._data = self._share()

    def hide(self) -> None:
        """Takes the name away: who has mapped the memory keeps it, and it goes with the last one, however that ends."""
        if self.name is not None:
            self._forget()
            self.name = None

    def pack(self, tensors: Iterable[tuple[str, Tensor]], free: Callable[[int], None]) -> Iterator[Bucket]:
        """The tensors in buckets, in the halves by turns; `free(half)` returns when the half may be overwritten.

        All of `tensors` is read. Raises WireError for a tensor whose type does not travel.
        """
        filling = _Filling(self._data, self.bucket_bytes, free)
        for name, tensor in tensors:
            kind = str(tensor.dtype).removeprefix("torch.")
            if kind not in _DTYPES:
                raise WireError(f"`{name}` is of type {kind}, and weights travel as {', '.join(_DTYPES)}")
            size = tensor.nbytes
            if size <= self.bucket_bytes:
                if not filling.has_room(size):
                    yield filling.take()
                filling.add(Piece(name, kind, tuple(tensor.shape), 0, size, 0), tensor)
                continue
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            for start in range(0, size, self.bucket_bytes):
                if filling.pieces:
                    yield filling.take()
                part = flat[start : start + self.bucket_bytes]
                filling.add(Piece(name, kind, tuple(tensor.shape), start, part.numel(), 0), part)
        if filling.pieces:
            yield filling.take()


class _Filling:
    """The bucket that is being packed."""

    def __init__(self, data: Tensor, bucket_bytes: int, free: Callable[[int], None]) -> None:
        self.pieces: list[Piece] = []
        self._data, self._bucket_bytes, self._free = data, bucket_bytes, free
        self._number = self._used = 0

    @property
    def _at(self) -> int:
        return self._number % 2 * self._bucket_bytes

    def has_room(self, size: int) -> bool:
        return self._used + size <= self._bucket_bytes

    def add(self, piece: Piece, source: Tensor) -> None:
        """`source`: the tensor, of any strides and on any device, or its bytes."""
        if not self.pieces:
            self._free(self._number % 2)
        start = self._at + self._used
        target = self._data[start : start + piece.size]
        target.view(source.dtype).view(source.shape).copy_(source.detach())
        self.pieces.append(replace(piece, offset=self._used, checksum=checksum(target)))
        self._used += -(-piece.size // _ALIGNMENT) * _ALIGNMENT

    def take(self) -> Bucket:
        size = self.pieces[-1].offset + self.pieces[-1].size
        data = self._data[self._at : self._at + size]
        bucket = Bucket(self._number, self._at, data, tuple(self.pieces))
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
    """A bucket's pieces and their bytes, views of `data`. Raises WireError for what does not lie within it."""
    try:
        pieces = [
            Piece(str(name), str(dtype), tuple(map(int, shape)), *map(int, numbers))
            for name, dtype, shape, *numbers in header["pieces"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise WireError(f"not a bucket of weights: {error!r}") from error
    for piece in pieces:
        inside = min(piece.offset, piece.size) >= 0 and piece.offset + piece.size <= data.numel()
        known = piece.dtype in _DTYPES and min(piece.shape, default=0) >= 0 and piece.offset % _ALIGNMENT == 0
        if not inside or not known or not 0 <= piece.start <= piece.start + piece.size <= piece.whole_size:
            raise WireError(f"`{piece.name:.80}` does not lie within its bucket")
    return [(piece, data[piece.offset : piece.offset + piece.size]) for piece in pieces]


def piece_header(bucket: Bucket) -> dict[str, Any]:
    """What `read_pieces` needs to know."""
    pieces = [[p.name, p.dtype, list(p.shape), p.start, p.size, p.offset, p.checksum] for p in bucket.pieces]
    return {"number": bucket.number, "pieces": pieces}


class Assembly:
    """Whole tensors from pieces. What lies in one bucket is used where it lies; only what is larger than a bucket is copied.

    The memory for that is kept between updates: to get it anew takes several times as long as to fill it.
    """

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._partial: Tensor | None = None
        self._piece: Piece | None = None

    def restart(self) -> None:
        """Forgets what is not complete."""
        self._partial = self._piece = None

    def add(self, pieces: Sequence[tuple[Piece, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The tensors that these pieces complete, each valid until the next is asked for.

        Raises WireError for a gap and for damaged bytes.
        """
        for piece, data in pieces:
            if checksum(data) != piece.checksum:
                raise WireError(f"the bytes of `{piece.name:.80}` are not those that were sent: their checksum differs")
            whole = piece.whole_size
            if piece.size == whole:
                self.check_complete()
                yield piece.name, data.view(_DTYPES[piece.dtype]).view(piece.shape)
                continue
            if piece.start == 0:
                self.check_complete()
                if self._memory.numel() < whole:
                    self._memory = torch.empty(whole, dtype=torch.uint8)
                self._partial = self._memory[:whole]
            last = self._piece
            follows = last is not None and (last.name, last.dtype, last.shape) == (piece.name, piece.dtype, piece.shape)
            if self._partial is None or (piece.start > 0 and not (follows and last and last.start + last.size == piece.start)):
                raise WireError(f"a part of `{piece.name:.80}` is missing")
            self._partial[piece.start : piece.start + piece.size] = data
            self._piece = piece
            if piece.start + piece.size == whole:
                full, self._partial, self._piece = self._partial, None, None
                yield piece.name, full.view(_DTYPES[piece.dtype]).view(piece.shape)

    def check_complete(self) -> None:
        """Raises WireError while a tensor lacks a part."""
        if self._partial is not None and self._piece is not None:
            raise WireError(f"a part of `{self._piece.name:.80}` is missing")
