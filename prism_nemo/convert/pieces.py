"""Tensors as bytes that lie in files: what conversion moves without holding a tensor.

Most tensors of the two formats are the same rows in another order, so that a target tensor is a list of byte ranges of source
files (`Runs`). What has to be worked out, such as a transposed expert, is `Computed`, one piece at a time.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from prism_nemo.convert.dtypes import DType
from prism_nemo.convert.ops import Op, RowRun, joined_runs
from prism_nemo.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

# Small enough to stay in a core's cache between reading and writing. For larger blocks Linux takes larger pieces of unbroken
# memory into its page cache; on a virtual machine, writing a megabyte at a time was measured several times slower.
BUFFER_BYTES = 1 << 18


class Blob(Protocol):
    """One tensor, or a part of one, as it lies in a file from byte `start` on."""

    @property
    def path(self) -> Path: ...

    @property
    def start(self) -> int: ...


@dataclass(frozen=True)
class Run:
    """`length` bytes from byte `offset` of a blob on."""

    blob: Blob
    offset: int
    length: int


@dataclass(frozen=True)
class Runs:
    """Bytes that are copied as they are."""

    runs: tuple[Run, ...]

    @property
    def nbytes(self) -> int:
        return sum(run.length for run in self.runs)


@dataclass(frozen=True)
class Computed:
    """Bytes of a tensor that is made when it is written. `compute` returns it, `nbytes` long."""

    nbytes: int
    compute: Callable[[], Tensor]


Piece = Runs | Computed


@dataclass(frozen=True)
class Literal:
    """Bytes that are known already."""

    content: bytes

    @property
    def nbytes(self) -> int:
        return len(self.content)


class Files:
    """Open files by path, shared by the threads of a process: reads name their own positions."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                try:
                    self._descriptors[path] = os.open(path, os.O_RDONLY)
                except OSError as error:
                    raise CheckpointError(f"the file cannot be read ({error.strerror})", where=str(path)) from error
            return self._descriptors[path]

    def read_into(self, path: Path, target: memoryview, offset: int) -> None:
        """Fill `target` from byte `offset` of the file on; CheckpointError when the file ends before."""
        descriptor = self.descriptor(path)
        while target:
            count = os.preadv(descriptor, [target], offset)
            if count == 0:
                raise CheckpointError("the file ends too early", where=str(path), remedy="copy or download it again")
            target, offset = target[count:], offset + count

    def read(self, path: Path, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self.read_into(path, memoryview(buffer), offset)
        return bytes(buffer)

    def close(self) -> None:
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()


_buffers = threading.local()


def _buffer() -> memoryview:
    """This thread's own."""
    if not hasattr(_buffers, "buffer"):
        _buffers.buffer = memoryview(bytearray(BUFFER_BYTES))
    buffer: memoryview = _buffers.buffer
    return buffer


def byte_chunks(pieces: Sequence[Piece | Literal], files: Files) -> Iterator[memoryview]:
    """The pieces' bytes one after another, in blocks that are valid until the next one is asked for."""
    buffer, filled = _buffer(), 0
    for piece in pieces:
        if isinstance(piece, Runs):
            for run in piece.runs:
                position, end = run.blob.start + run.offset, run.blob.start + run.offset + run.length
                while position < end:
                    count = min(end - position, BUFFER_BYTES - filled)
                    files.read_into(run.blob.path, buffer[filled : filled + count], position)
                    position, filled = position + count, filled + count
                    if filled == BUFFER_BYTES:
                        yield buffer
                        filled = 0
            continue
        if filled:
            yield buffer[:filled]
            filled = 0
        content = memoryview(piece.content) if isinstance(piece, Literal) else tensor_bytes(piece.compute())
        assert len(content) == piece.nbytes, f"{len(content)} bytes instead of {piece.nbytes}"
        for start in range(0, len(content), BUFFER_BYTES):
            yield content[start : start + BUFFER_BYTES]
    if filled:
        yield buffer[:filled]


def copy_pieces(pieces: Sequence[Piece | Literal], files: Files, target: int, offset: int) -> None:
    """Writes the pieces' bytes into an open file from byte `offset` on."""
    for chunk in byte_chunks(pieces, files):
        write_all(target, chunk, offset)
        offset += len(chunk)


def write_all(target: int, content: memoryview | bytes, offset: int) -> None:
    view = memoryview(content)
    while view:
        count = os.pwrite(target, view, offset)
        view, offset = view[count:], offset + count


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The tensor's values as bytes, without a copy where it is contiguous on the CPU."""
    return memory_of(tensor.detach().cpu().contiguous())


def memory_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    import torch

    if not tensor.numel():
        return memoryview(b"")
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def read_tensor(pieces: Sequence[Piece], files: Files, shape: Sequence[int], dtype: DType) -> Tensor:
    """The pieces' bytes as one tensor in memory."""
    import torch

    tensor = torch.empty(tuple(shape), dtype=dtype.torch)
    target, position = memory_of(tensor), 0
    for piece in pieces:
        if isinstance(piece, Computed):
            target[position : position + piece.nbytes] = tensor_bytes(piece.compute())
            position += piece.nbytes
            continue
        for run in piece.runs:
            files.read_into(run.blob.path, target[position : position + run.length], run.blob.start + run.offset)
            position += run.length
    assert position == len(target), f"{position} bytes for a tensor of {len(target)}"
    return tensor


@lru_cache(maxsize=256)
def rows_to_hf(op: Op, rows: tuple[int, ...]) -> tuple[tuple[RowRun, ...], ...]:
    """For each HuggingFace tensor, of so many rows, which rows of the Megatron tensor make it; `RowRun.source` is 0."""
    order = op.row_order(*rows)
    assert order is not None, f"{op} does more than move rows"
    parts: list[list[tuple[int, RowRun]]] = [[] for _ in rows]
    position = 0
    for run in order:
        parts[run.source].append((run.start, RowRun(0, position, run.count)))
        position += run.count
    return tuple(joined_runs([run for _, run in sorted(part, key=lambda placed: placed[0])]) for part in parts)


def select_rows(runs: Sequence[RowRun], first: int, last: int) -> Iterator[RowRun]:
    """The part of the runs that makes rows `first` to `last` (exclusive) of what they make."""
    position = 0
    for run in runs:
        low, high = max(first, position), min(last, position + run.count)
        if low < high:
            yield RowRun(run.source, run.start + low - position, high - low)
        position += run.count
