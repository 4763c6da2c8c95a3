"""The manifest of a model's checkpoint folder: every file and its size. It tells a truncated copy from a whole one."""

from __future__ import annotations

import json
from pathlib import Path

from prism_nemo.convert.files import sync
from prism_nemo.errors import CheckpointError

MANIFEST = "manifest.json"


def seal(directory: Path) -> None:
    """Writes the manifest; the last thing that goes into the folder. One of an earlier, cut-off run is replaced."""
    (directory / MANIFEST).unlink(missing_ok=True)
    files = {str(file.relative_to(directory)): file.stat().st_size for file in sorted(directory.rglob("*")) if file.is_file()}
    (directory / MANIFEST).write_text(json.dumps(files, indent=1))
    sync(directory / MANIFEST)


def problems(directory: Path) -> list[str]:
    """What differs from the manifest, one line each; empty when the folder is whole."""
    manifest = directory / MANIFEST
    if not manifest.is_file():
        return ["incomplete: it has no manifest"]
    try:
        sizes = {name: int(size) for name, size in json.loads(manifest.read_text()).items()}
    except (ValueError, AttributeError, TypeError):
        return ["incomplete: its manifest is not JSON"]
    found = []
    for name, size in sizes.items():
        file = directory / name
        state = f"{file.stat().st_size} bytes" if file.is_file() else "missing"
        if state != f"{size} bytes":
            found.append(f"truncated: {name} is {state}, it had {size} bytes")
    return found


def check_manifest(directory: Path) -> None:
    """CheckpointError when a file that was written is missing or has another size."""
    found = problems(directory)
    if found:
        raise CheckpointError(
            f"the checkpoint is {found[0]}",
            where=str(directory),
            remedy="use an earlier checkpoint, or copy this one again",
        )
