"""Directories that are either complete or not there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prism_nemo.errors import DataError


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory to fill, which takes the place `out` when the block ends without an error.

    Raises DataError when `out` is already there and is not an empty directory.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError("the output directory is not empty", where=str(out), remedy="choose another, or remove it first")
    partial = out.with_name(f".{out.name}.partial")
    if partial.exists():  # of a run that was interrupted
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial)
        raise
    partial.replace(out)
