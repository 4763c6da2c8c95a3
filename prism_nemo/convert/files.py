"""The files of a HuggingFace model directory: finding, opening and writing them with errors that say what is wrong."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prism_nemo.errors import CheckpointError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


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

    The library checks the header; where values lie is then read from it, so that they can be read without mapping the file, whose
    pages would count as this process's memory.
    """
    try:
        with safe_open(path, framework="pt"), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {
            name: StoredWeight(path, 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), entry["dtype"])
            for name, entry in header.items()
        }
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"not a whole safetensors file ({error})",
            where=f"{path} ({path.stat().st_size} bytes)",
            remedy="copy or download it again; a file of about 130 bytes is a Git LFS pointer, not the weights",
        ) from error


def shortened(items: list[str], separator: str = "\n  ", limit: int = 12) -> str:
    """The items in one string, the last ones as a count where there are many."""
    more = [f"and {len(items) - limit} more"] if len(items) > limit else []
    return separator.join(items[:limit] + more)


def save_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one safetensors file and have it on disk."""
    save_file(tensors, path, metadata={"format": "pt"})  # transformers refuses a file that does not name its format
    sync(path)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; CheckpointError when it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
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
