"""The files of a HuggingFace model directory: finding, opening and writing them with errors that say what is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_nemo.convert.dtypes import BY_CODE
from prism_nemo.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LONGEST_HEADER = 100_000_000  # bytes, as the safetensors library allows


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that make up the directory's model; CheckpointError when there are none, or some are missing."""
    single, index = directory / WEIGHTS_FILE, directory / INDEX_FILE
    if single.is_file() and index.is_file():
        raise CheckpointError(f"both {WEIGHTS_FILE} and an index of shards", where=str(directory), remedy="remove the stale one")
    if single.is_file():
        return [single]
    if not index.is_file():
        raise CheckpointError(
            "there are no safetensors weights", where=str(directory), remedy=f"{WEIGHTS_FILE}, or shards with {INDEX_FILE}"
        )
    names = sorted(set(_weight_map(index).values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise CheckpointError(f"a shard lies outside of the directory: {outside[0]}", where=str(index))
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise CheckpointError(
            f"shards are missing: {shortened(missing, ', ')}", where=str(directory), remedy="download them again"
        )
    return [directory / name for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError("the index has no `weight_map` of names to files", where=str(index))
    return weight_map


def check_index(directory: Path, stored: Iterable[str]) -> None:
    """Every tensor that the index names must be in a shard. (What no index names shows as missing or unexpected later.)"""
    index = directory / INDEX_FILE
    if index.is_file():
        absent = sorted(set(_weight_map(index)) - set(stored))
        if absent:
            raise CheckpointError(
                f"no shard holds {shortened(absent, ', ')}", where=str(index), remedy="shards that belong to this index"
            )


@dataclass(frozen=True)
class StoredWeight:
    """One tensor of a safetensors file: `start` is the byte of the file at which its values begin."""

    path: Path
    start: int
    shape: tuple[int, ...]
    dtype: str  # as safetensors names it: F32, BF16, …


def read_weights_header(path: Path) -> dict[str, StoredWeight]:
    """The tensors of a safetensors file by name; CheckpointError when it is cut short or something else.

    Read here rather than by the library, which imports torch, and maps the file: its pages would count as this process's memory.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
                raise ValueError("the header's length is not one")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("the header is not a JSON object")
        header.pop("__metadata__", None)
        found = {name: _stored_weight(path, 8 + length, name, entry) for name, entry in header.items()}
        _check_spans(found.values(), 8 + length, size)
        return {name: weight for name, (weight, _) in found.items()}
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(
            f"not a whole safetensors file ({error})",
            where=f"{path} ({path.stat().st_size if path.exists() else 0} bytes)",
            remedy="copy or download it again; a file of about 130 bytes is a Git LFS pointer, not the weights",
        ) from error


def _stored_weight(path: Path, data: int, name: str, entry: Any) -> tuple[StoredWeight, int]:
    """A tensor of the header, and where its values end; `data` is where all values begin. ValueError when it makes no sense."""
    try:
        dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"the header does not describe `{name}`") from None
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, start, end)) or not isinstance(dtype, str):
        raise ValueError(f"the header does not describe `{name}`")
    if dtype in BY_CODE and end - start != prod(shape) * BY_CODE[dtype].itemsize:
        raise ValueError(f"`{name}` has {end - start} bytes for {list(shape)} of {dtype}")
    return StoredWeight(path, data + start, shape, dtype), data + end


def _check_spans(weights: Iterable[tuple[StoredWeight, int]], data: int, size: int) -> None:
    """The format leaves no byte out and uses none twice. ValueError where one is."""
    position = data
    for weight, end in sorted(weights, key=lambda placed: (placed[0].start, placed[1])):
        if weight.start != position:
            raise ValueError(f"its tensors do not lie one after another at byte {position}")
        position = end
    if position != size:
        raise ValueError(f"its tensors end at byte {position}, the file at {size}")


def shortened(items: list[str], separator: str = "\n  ", limit: int = 12) -> str:
    """The items in one string, the last ones as a count where there are many."""
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return separator.join(items[:limit] + more)


def save_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file and have it on disk."""
    from safetensors.torch import save_file

    save_file(tensors, path, metadata={"format": "pt"})  # transformers refuses a file that does not name its format
    sync(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError when it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"not a readable JSON file ({error})", where=str(path)) from error
    if not isinstance(content, dict):
        raise CheckpointError("not a JSON object", where=str(path))
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file and have it on disk."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync(path)


def sync(path: Path) -> None:
    """Have the file or directory on disk, so that a crash after the rename cannot leave an empty file behind it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
