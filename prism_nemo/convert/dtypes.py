"""The element types of stored tensors, without torch: most of a conversion moves bytes and needs no more than their width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DType:
    """`name` is torch's, `code` is safetensors', `storage` is torch's storage class where there is one."""

    name: str
    itemsize: int
    code: str
    storage: str | None = None

    def __str__(self) -> str:
        return self.name

    @property
    def torch(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.name)
        return dtype


FLOAT32 = DType("float32", 4, "F32", "FloatStorage")
BFLOAT16 = DType("bfloat16", 2, "BF16", "BFloat16Storage")
_ALL = (
    FLOAT32,
    BFLOAT16,
    DType("float64", 8, "F64", "DoubleStorage"),
    DType("float16", 2, "F16", "HalfStorage"),
    DType("float8_e4m3fn", 1, "F8_E4M3"),
    DType("float8_e5m2", 1, "F8_E5M2"),
    DType("int64", 8, "I64", "LongStorage"),
    DType("int32", 4, "I32", "IntStorage"),
    DType("int16", 2, "I16", "ShortStorage"),
    DType("int8", 1, "I8", "CharStorage"),
    DType("uint8", 1, "U8", "ByteStorage"),
    DType("bool", 1, "BOOL", "BoolStorage"),
)
BY_NAME = {dtype.name: dtype for dtype in _ALL}
BY_CODE = {dtype.code: dtype for dtype in _ALL}
BY_STORAGE = {dtype.storage: dtype for dtype in _ALL if dtype.storage is not None}


def dtype_of(dtype: torch.dtype) -> DType:
    return BY_NAME[str(dtype).removeprefix("torch.")]
