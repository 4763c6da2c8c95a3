"""Opens a data file of any kind, and refuses what only looks like one."""

from __future__ import annotations

from pathlib import Path

from prism_nemo.data.items import ItemFile, JsonItems
from prism_nemo.data.parquet_items import ParquetItems
from prism_nemo.data.paths import check_suffix
from prism_nemo.data.tar_items import TarItems
from prism_nemo.errors import DataError

_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"PK\x03\x04": "zip",
}


def open_items(path: Path, cache_dir: Path | None) -> ItemFile:
    """A data file's items. With a `cache_dir` its index is kept there, otherwise made anew in memory.

    Raises DataError when the file is missing, of no known kind, empty, or broken as a whole.
    """
    if not path.is_file():
        raise DataError("the data file does not exist", where=str(path), remedy="check data.train and data.validation")
    check_suffix(path)
    _refuse_compressed(path)
    suffix = path.suffix.lower()
    try:
        items: ItemFile
        if suffix == ".parquet":
            items = ParquetItems(path)
        elif suffix == ".tar":
            items = TarItems(path, cache_dir)
        else:
            items = JsonItems(path, cache_dir, lines=suffix == ".jsonl")
    except OSError as error:
        raise DataError(f"the data file cannot be read: {error.strerror or error}", where=str(path)) from error
    if not len(items):
        raise DataError("the data file holds no records", where=str(path))
    return items


def _refuse_compressed(path: Path) -> None:
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise DataError(f"the data file cannot be read: {error.strerror or error}", where=str(path)) from error
    for magic, name in _MAGIC.items():
        if head.startswith(magic):
            raise DataError(
                f"the file is {name}-compressed, whatever its name says",
                where=str(path),
                remedy="unpack it: its records are read at any place",
            )
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") and path.suffix.lower() in (".json", ".jsonl"):
        raise DataError("the file is text in UTF-16", where=str(path), remedy="save it as UTF-8")
