"""What `torch.save` writes for one tensor, as bytes around the tensor's own, so that a tensor can be written as it streams by.

The format is a ZIP archive of stored entries. The checksum of the tensor's bytes is left out (zero), as `torch.save` leaves it
out after `torch.serialization.set_crc32_options(False)`: torch's reader does not look at it. So all is known beforehand.
"""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

from prism_nemo.convert import pickles
from prism_nemo.convert.dtypes import BY_STORAGE, DType
from prism_nemo.errors import CheckpointError

_NAME = "archive"
_DATA_ALIGNMENT = 64  # as torch writes it, counted from the start of the archive
_LIMIT = (1 << 32) - (1 << 20)  # ZIP without its 64-bit extension
_LOCAL, _CENTRAL, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"


@dataclass(frozen=True)
class TensorArchive:
    """The archive of one contiguous tensor."""

    shape: tuple[int, ...]
    dtype: DType

    @property
    def data_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def data_offset(self) -> int:
        """Where the tensor's bytes begin."""
        return len(self.render()[0])

    @property
    def total_bytes(self) -> int:
        before, after = self.render()
        return len(before) + self.data_bytes + len(after)

    def render(self) -> tuple[bytes, bytes]:
        """What goes before and after the tensor's bytes."""
        if self.data_bytes > _LIMIT:
            raise CheckpointError(f"a tensor of {list(self.shape)} is larger than 4 GiB", remedy="a checkpoint in bfloat16")
        return _render(_described_tensor(self.shape, self.dtype), self.data_bytes)


def object_archive(value: Any) -> bytes:
    """What `torch.save` writes for an object without tensors. What may be in it: see `pickles`."""
    before, after = _render(pickles.dumps(value), None)
    return before + after


@lru_cache(maxsize=256)
def _render(description: bytes, data_bytes: int | None) -> tuple[bytes, bytes]:
    """What goes before and after an archive's data; None: it has none."""
    before, directory, entries = bytearray(), bytearray(), 0

    def entry(name: str, size: int, checksum: int, at: int, pad_to: int = 1) -> bytes:
        """The local header of an entry that starts `at` bytes into the archive; notes it in the directory."""
        nonlocal entries
        path = f"{_NAME}/{name}".encode()
        padding = -(at + 30 + len(path)) % pad_to
        if 0 < padding < 4:  # an extra field has a header of four bytes
            padding += pad_to
        extra = struct.pack("<2sH", b"FB", padding - 4) + bytes(padding - 4) if padding else b""
        common = struct.pack("<HHHHHIIIHH", 20, 0x800, 0, 0, 0x21, checksum, size, size, len(path), len(extra))
        directory.extend(_CENTRAL + struct.pack("<H", 20) + struct.pack("<HHHHHIIIHH", *_without_extra(common)))
        directory.extend(struct.pack("<HHHII", 0, 0, 0, 0, at) + path)
        entries += 1
        return _LOCAL + common + path + extra

    def small(target: bytearray, name: str, content: bytes, start: int) -> None:
        target.extend(entry(name, len(content), zlib.crc32(content), start + len(target)) + content)

    small(before, "data.pkl", description, 0)
    small(before, "byteorder", b"little", 0)
    if data_bytes is not None:
        before.extend(entry("data/0", data_bytes, 0, len(before), _DATA_ALIGNMENT))
    start, after = len(before) + (data_bytes or 0), bytearray()
    small(after, "version", b"3\n", start)
    small(after, ".data/serialization_id", b"0" * 40, start)
    end = struct.pack("<HHHHIIH", 0, 0, entries, entries, len(directory), start + len(after), 0)
    return bytes(before), bytes(after + directory) + _END + end


def _without_extra(common: bytes) -> tuple[int, ...]:
    return (*struct.unpack("<HHHHHIIIHH", common)[:-1], 0)


@lru_cache(maxsize=256)
def _described_tensor(shape: tuple[int, ...], dtype: DType) -> bytes:
    """The pickle by which torch rebuilds a contiguous tensor from its storage."""
    storage = pickles.Persistent(("storage", pickles.Global("torch", dtype.storage or ""), "0", "cpu", prod(shape)))
    hooks = pickles.Call(pickles.Global("collections", "OrderedDict"), ())
    rebuild = pickles.Global("torch._utils", "_rebuild_tensor_v2")
    return pickles.dumps(pickles.Call(rebuild, (storage, 0, shape, _contiguous(shape), False, hooks)))


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, as torch gives them."""
    return tuple(prod(max(size, 1) for size in shape[axis + 1 :]) for axis in range(len(shape)))


@dataclass(frozen=True)
class _Described:
    """What an archive says of its tensor."""

    dtype: DType
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class _Unpickler(pickle.Unpickler):
    """Reads such a description and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _described
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in BY_STORAGE:
            return BY_STORAGE[name]
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a tensor")

    def persistent_load(self, pid: Any) -> Any:
        return pid[1]


def _described(dtype: DType, offset: int, shape: Sequence[int], stride: Sequence[int], *rest: Any) -> _Described:
    return _Described(dtype, offset, tuple(shape), tuple(stride))


def locate_tensor(stream: io.RawIOBase | io.BufferedIOBase, shape: Sequence[int], dtype: DType) -> int:
    """Where the bytes of the archive's tensor begin; ValueError unless it is contiguous, of that shape and type, and alone."""
    import zipfile

    try:
        with zipfile.ZipFile(stream) as archive:
            infos = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos.values()):
            raise ValueError("it is compressed")
        places = {name: (_begin(stream, info.header_offset), info.file_size) for name, info in infos.items()}
        described = _Unpickler(io.BytesIO(_read(stream, *places["data.pkl"]))).load()
        if "byteorder" in places and _read(stream, *places["byteorder"]) != b"little":
            raise ValueError("the tensor is big-endian")
    except (zipfile.BadZipFile, KeyError, struct.error, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"not a saved tensor: {error}") from error
    expected = _Described(dtype, 0, tuple(shape), _contiguous(shape))
    if described != expected:
        raise ValueError(f"{described} instead of {expected}")
    begin, size = places.get("data/0", (0, -1))
    if size != prod(shape) * dtype.itemsize:
        raise ValueError(f"its data are not {prod(shape) * dtype.itemsize} bytes")
    return begin


def _begin(stream: io.RawIOBase | io.BufferedIOBase, header: int) -> int:
    """Where an entry's content begins."""
    name_length, extra_length = struct.unpack("<HH", _read(stream, header + 26, 4))
    return int(header + 30 + name_length + extra_length)


def _read(stream: io.RawIOBase | io.BufferedIOBase, offset: int, size: int) -> bytes:
    """Checksums are not looked at: torch can be told to leave them out."""
    stream.seek(offset)
    return stream.read(size) or b""
