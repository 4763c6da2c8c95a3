"""The manifest of a checkpoint's folder: every file with its size and its hash. It tells a damaged copy from a whole one.

    {"common.pt": {"bytes": 1310, "blake2b": "9f86…"}, …}

A file's hash is BLAKE2b over the BLAKE2b hashes of its blocks of 16 MiB, so that threads share a large file. A folder inside that
has a manifest of its own counts by that manifest alone. Manifests of earlier versions have the size in place of the entry.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

from prism_nemo.convert.files import sync
from prism_nemo.errors import CheckpointError

MANIFEST = "manifest.json"
STEP_MANIFEST = "checkpoint.json"  # in the folder of a run's step: its own files, and its models' manifests
BLOCK = 16 << 20  # bytes
THREADS = 4
_UNREADABLE = (ValueError, AttributeError, TypeError, KeyError, OverflowError)  # of JSON that is no manifest
REMEDY = "use an earlier checkpoint, or copy this one again"


def hash_files(directory: Path, names: Iterable[str]) -> dict[str, str]:
    """The hash of each file by name, in hexadecimal digits. OSError when one cannot be read."""
    with ThreadPoolExecutor(THREADS) as threads:
        blocks = {
            name: [threads.submit(_hash_block, directory / name, start) for start in range(0, size, BLOCK)]
            for name, size in ((name, (directory / name).stat().st_size) for name in names)
        }
        return {name: blake2b(b"".join(part.result() for part in parts)).hexdigest() for name, parts in blocks.items()}


def _hash_block(file: Path, start: int) -> bytes:
    with file.open("rb", buffering=0) as stream:
        descriptor = stream.fileno()
        seen, position, end = blake2b(), start, start + BLOCK
        while position < end and (piece := os.pread(descriptor, min(1 << 20, end - position), position)):
            seen.update(piece)
            position += len(piece)
    return seen.digest()


def files_of(directory: Path, manifest: str = MANIFEST) -> list[str]:
    """What `seal` lists, in order: every file but the manifest, and of a sealed folder inside its manifest alone."""
    sealed = [folder.parent for folder in directory.glob(f"*/{MANIFEST}")]
    return [
        str(file.relative_to(directory))
        for file in sorted(directory.rglob("*"))
        if file.is_file() and file != directory / manifest and not any(_is_inside(file, folder) for folder in sealed)
    ]


def _is_inside(file: Path, folder: Path) -> bool:
    return folder in file.parents and file != folder / MANIFEST


def seal(directory: Path, known: Mapping[str, str] | None = None, *, manifest: str = MANIFEST) -> None:
    """Writes the manifest; the last thing that goes into the folder. One of an earlier, cut-off run is replaced.

    `known`: hashes that have been computed already, by file name.
    """
    (directory / manifest).unlink(missing_ok=True)
    names = files_of(directory, manifest)
    hashes = {name: value for name, value in (known or {}).items() if name in names}
    hashes |= hash_files(directory, [name for name in names if name not in hashes])
    files = {name: {"bytes": (directory / name).stat().st_size, "blake2b": hashes[name]} for name in names}
    (directory / manifest).write_text(json.dumps(files, indent=1))
    sync(directory / manifest)


def problems(directory: Path, *, contents: bool = True, part: tuple[int, int] = (0, 1), manifest: str = MANIFEST) -> list[str]:
    """What differs from the manifest, one line each; empty when the folder is whole.

    `contents=False` looks at sizes alone, which costs no reading. `part` (n, of): only every `of`-th file from the n-th on, for
    ranks that share the work.
    """
    try:
        entries = _read(directory / manifest)
    except _UNREADABLE:
        return ["incomplete: its manifest is not JSON that lists its files"]
    if entries is None:
        return ["incomplete: it has no manifest"]
    mine = dict(list(entries.items())[part[0] :: part[1]])
    found, whole = [], []
    for name, (size, digest) in mine.items():
        file = directory / name
        state = f"{file.stat().st_size} bytes" if file.is_file() else "missing"
        if state != f"{size} bytes":
            found.append(f"truncated: {name} is {state}, it had {size} bytes")
        elif contents and digest is not None:
            whole.append(name)
    try:
        hashes = hash_files(directory, whole)
    except OSError as error:
        return [*found, f"unreadable: {error}"]
    return found + [f"damaged: {name} is not what was written" for name in whole if hashes[name] != mine[name][1]]


def count(directory: Path) -> int:
    """Files that the manifest lists with their hashes."""
    try:
        return sum(digest is not None for _, digest in (_read(directory / MANIFEST) or {}).values())
    except _UNREADABLE:
        return 0


def has_hashes(directory: Path) -> bool:
    """Whether the folder's manifest was written with hashes; earlier versions had none."""
    try:
        return any(digest is not None for _, digest in (_read(directory / MANIFEST) or {}).values())
    except _UNREADABLE:
        return True


def _read(file: Path) -> dict[str, tuple[int, str | None]] | None:
    """Size and hash of every file; no hash in a manifest of an earlier version. None when there is no manifest."""
    if not file.is_file():
        return None
    try:
        entries: Mapping[str, Any] = json.loads(file.read_text())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    found: dict[str, tuple[int, str | None]] = {
        name: (int(entry), None) if isinstance(entry, int | str) else (int(entry["bytes"]), str(entry["blake2b"]))
        for name, entry in entries.items()
    }
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in found):
        raise ValueError("it names files outside the folder")
    return found


def check_manifest(directory: Path) -> None:
    """CheckpointError when a file that was written is missing, or is not what was written."""
    found = problems(directory)
    if found:
        raise damaged(found[0], directory)


def damaged(problem: str, where: Path) -> CheckpointError:
    return CheckpointError(f"the checkpoint is {problem}", where=str(where), remedy=REMEDY)
