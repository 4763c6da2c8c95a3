"""What `data.train` and its like name: a file, a folder of files, or a pattern of several.

demos.jsonl                   a file
shards/                       every data file directly below the folder, in the order of their names
shards/*.parquet              a pattern, with * ? and [abc]
shards/part-{000..099}.tar    numbers from .. to, with leading zeros kept; {a,b} are alternatives
"""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from pathlib import Path

from prism_nemo.errors import DataError

SUFFIXES = (".json", ".jsonl", ".parquet", ".tar")
MAX_FILES = 100_000  # that one pattern may name
_COMPRESSED = (".gz", ".tgz", ".zst", ".bz2", ".xz", ".zip")
_BRACES = re.compile(r"\{([^{}]*)\}")
_NUMBERS = re.compile(r"(\d+)\.\.(\d+)")


def expand_paths(spec: str) -> list[Path]:
    """The data files that `spec` names, at least one; patterns and folders in the order of the names.

    Raises DataError for a file that does not exist or is of no known kind, and for a folder or pattern without data files.
    """
    if Path(spec).exists():  # as it stands, whatever its name looks like
        return _of_path(Path(spec), spec)
    files: list[Path] = []
    for alternative in _braces(spec):
        if len(files) > MAX_FILES:
            raise DataError(f"the pattern names more than {MAX_FILES} files", where=spec)
        if glob.has_magic(alternative) and not Path(alternative).exists():
            names = sorted(glob.glob(alternative))  # noqa: PTH207 - Path.glob takes no absolute pattern
            found = [Path(name) for name in names if Path(name).suffix.lower() in SUFFIXES]
            if not found:
                raise DataError("no data file has a name of this pattern", where=alternative, remedy=_kinds())
            files += found
        else:
            files += _of_path(Path(alternative), spec)
    return files


def check_suffix(path: Path) -> None:
    """Raises DataError for a file whose name says that it is no data file."""
    suffix = path.suffix.lower()
    if suffix in _COMPRESSED:
        raise DataError(
            f"`{path.name}` is compressed, and compressed files cannot be read at any place",
            where=str(path),
            remedy=f"unpack it first: {_kinds()}",
        )
    if suffix not in SUFFIXES:
        raise DataError(f"`{path}` is not a data file", where=str(path), remedy=_kinds())


def _of_path(path: Path, spec: str) -> list[Path]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and _is_data(file))
        if not files:
            raise DataError("the folder holds no data files", where=spec, remedy=_kinds())
        return files
    check_suffix(path)
    if not path.is_file():
        raise DataError("the data file does not exist", where=str(path), remedy="check the path")
    return [path]


def _is_data(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".")


def _kinds() -> str:
    return f"use one that ends in {', '.join(SUFFIXES)}"


def _braces(spec: str) -> Iterator[str]:
    """The texts that `{000..099}` and `{a,b}` stand for, one after another."""
    match = _BRACES.search(spec)
    if match is None:
        yield spec
        return
    numbers = _NUMBERS.fullmatch(match[1])
    options: Iterator[str]
    if numbers:
        first, last = numbers.groups()
        if int(last) - int(first) >= MAX_FILES:
            raise DataError(f"the pattern names more than {MAX_FILES} files", where=spec)
        if int(last) < int(first):
            raise DataError(f"{match[0]} counts down", where=spec, remedy="give the smaller number first")
        options = (str(number).zfill(len(first)) for number in range(int(first), int(last) + 1))
    else:
        options = iter(match[1].split(","))
    for option in options:
        yield from _braces(spec[: match.start()] + option + spec[match.end() :])
