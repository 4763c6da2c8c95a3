"""What `torch.save` writes for one tensor, as bytes around the tensor's own, so that a tensor can be written as it streams by.

The format is a ZIP archive of stored entries. All but the checksum of the tensor's bytes is known beforehand, the sizes too.
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
from typing import Any

import torch

from prism_nemo.errors import CheckpointError

_NAME = "archive"
_DATA_ALIGNMENT = 64  # as torch writes it, counted from the start of the archive
_LIMIT = (1 << 32) - (1 << 20)  # ZIP without its 64-bit extension
_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
_STORAGE_NAMES = {dtype: name for name, dtype in _STORAGES.items()}
_LOCAL, _CENTRAL, _END = b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06"


@dataclass(frozen=True)
class TensorArchive:
    """The archive of one contiguous tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def data_bytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize

    @property
    def data_offset(self) -> int:
        """Where the tensor's bytes begin."""
        return len(self.render(0)[0])

    @property
    def total_bytes(self) -> int:
        before, after = self.render(0)
        return len(before) + self.data_bytes + len(after)

    def render(self, crc: int) -> tuple[bytes, bytes]:
        """What goes before and after the tensor's bytes, whose CRC-32 is `crc`."""
        if self.data_bytes > _LIMIT:
            raise CheckpointError(f"a tensor of {list(self.shape)} is larger than 4 GiB", remedy="a checkpoint in bfloat16")
        return _render(self.shape, self.dtype, crc)


@lru_cache(maxsize=64)
def _render(shape: tuple[int, ...], dtype: torch.dtype, crc: int) -> tuple[bytes, bytes]:
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

    small(before, "data.pkl", _pickled(shape, dtype), 0)
    small(before, "byteorder", b"little", 0)
    size = int(torch.Size(shape).numel()) * dtype.itemsize
    before.extend(entry("data/0", size, crc, len(before), _DATA_ALIGNMENT))
    start, after = len(before) + size, bytearray()
    small(after, "version", b"3\n", start)
    small(after, ".data/serialization_id", b"0" * 40, start)
    end = struct.pack("<HHHHIIH", 0, 0, entries, entries, len(directory), start + len(after), 0)
    return bytes(before), bytes(after + directory) + _END + end


def _without_extra(common: bytes) -> tuple[int, ...]:
    return (*struct.unpack("<HHHHHIIIHH", common)[:-1], 0)


class _Storage:
    def __init__(self, dtype: torch.dtype, numel: int) -> None:
        self.dtype, self.numel = dtype, numel


class _Tensor:
    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.storage = shape, _Storage(dtype, int(torch.Size(shape).numel()))


class _Pickler(pickle.Pickler):
    """Describes a tensor as torch does, without having one."""

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return "storage", getattr(torch, _STORAGE_NAMES[obj.dtype]), "0", "cpu", obj.numel
        return None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, _Tensor):
            stride = tuple(torch.empty(obj.shape, device="meta").stride())
            hooks: OrderedDict[str, Any] = OrderedDict()
            return torch._utils._rebuild_tensor_v2, (obj.storage, 0, obj.shape, stride, False, hooks)
        return NotImplemented


def _pickled(shape: tuple[int, ...], dtype: torch.dtype) -> bytes:
    stream = io.BytesIO()
    _Pickler(stream, protocol=2).dump(_Tensor(shape, dtype))
    return stream.getvalue()


@dataclass(frozen=True)
class _Described:
    """What an archive says of its tensor."""

    dtype: torch.dtype
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
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a tensor")

    def persistent_load(self, pid: Any) -> Any:
        return pid[1]


def _described(dtype: torch.dtype, offset: int, shape: Sequence[int], stride: Sequence[int], *rest: Any) -> _Described:
    return _Described(dtype, offset, tuple(shape), tuple(stride))


def locate_tensor(stream: io.RawIOBase | io.BufferedIOBase, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Where the bytes of the archive's tensor begin; ValueError unless it is contiguous, of that shape and type, and alone."""
    import zipfile

    try:
        with zipfile.ZipFile(stream) as archive:
            infos = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            described = _Unpickler(io.BytesIO(archive.read(infos["data.pkl"]))).load()
            if "byteorder" in infos and archive.read(infos["byteorder"]) != b"little":
                raise ValueError("the tensor is big-endian")
    except (zipfile.BadZipFile, KeyError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"not a saved tensor: {error}") from error
    data = infos.get("data/0")
    stride = tuple(torch.empty(tuple(shape), device="meta").stride())
    expected = _Described(dtype, 0, tuple(shape), stride)
    if described != expected:
        raise ValueError(f"{described} instead of {expected}")
    nbytes = int(torch.Size(tuple(shape)).numel()) * dtype.itemsize
    if data is None or data.compress_type != zipfile.ZIP_STORED or data.file_size != nbytes:
        raise ValueError(f"its data are not {nbytes} bytes as they are")
    stream.seek(data.header_offset + 26)
    name_length, extra_length = struct.unpack("<HH", stream.read(4))
    return int(data.header_offset + 30 + name_length + extra_length)
