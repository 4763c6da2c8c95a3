"""Published benchmark files -> rows, and what the benchmarks' readers share. Images are not opened."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_nemo.data.parquet_growth import check_growth, growing_columns
from prism_nemo.data.parquet_items import MAX_GROWN_BYTES
from prism_nemo.data.records import IMAGE_PLACEHOLDER, ImageSource
from prism_nemo.data.sources import image_source
from prism_nemo.errors import DataError

SUFFIXES = (".parquet", ".jsonl", ".json")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_ROWS_AT_ONCE = 64  # a parquet row holds up to seven images
_LONGEST_LITERAL = 100_000  # characters; Python's parser takes time and memory by the hundredfold
_LOOKS_LIKE_A_CHOICE = re.compile(r"\W*(?:(?:option|choice)\s+)?[A-Za-z]\W*", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """One row of a published file; asking for a column that it must have names file and row where it has none."""

    values: Mapping[str, Any]
    where: str
    root: Path  # paths in the row start here

    def __getitem__(self, column: str) -> Any:
        value = self.values.get(column)
        if value is None:
            raise DataError(
                f"the row has no `{column}`",
                where=self.where,
                remedy="give the benchmark's files as they were published; docs/evaluation.md says which",
            )
        return value

    def text(self, column: str, default: str | None = None) -> str:
        """A column as text: numbers are written out. Without a default, the column must be there."""
        value = self.values.get(column)
        if value is None and default is not None:
            return default
        value = self[column]
        if not isinstance(value, str | int | float) or isinstance(value, bool):
            raise DataError(f"`{column}` is not text", where=self.where)
        return str(value)

    def texts(self, column: str) -> list[str]:
        """A column of texts: a list, one written as a Python literal, or nothing."""
        value: Any = self.values.get(column)
        if isinstance(value, str):
            if len(value) > _LONGEST_LITERAL:
                raise DataError(f"`{column}` has {len(value)} characters, the limit is {_LONGEST_LITERAL}", where=self.where)
            try:
                value = ast.literal_eval(value) if value.strip() else None
            except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
                raise DataError(f"`{column}` is not a list: {value[:80]!r}", where=self.where) from error
        if value is None:
            return []
        if not isinstance(value, list | tuple):
            raise DataError(f"`{column}` is not a list", where=self.where)
        return [str(item) for item in value]

    def integer(self, column: str) -> int:
        """A column with a whole number, perhaps as a float; 0 where it is empty."""
        value = self.values.get(column)
        if value is None:
            return 0
        if not isinstance(value, int | float) or not -1e6 < value < 1e6 or value != int(value):
            raise DataError(f"`{column}` is {value!r:.40}, not a whole number", where=self.where)
        return int(value)

    def fields(self, column: str) -> Mapping[str, Any]:
        """A column with fields of its own; none where it is empty."""
        value = self.values.get(column)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise DataError(f"`{column}` has no fields", where=self.where)
        return value

    def choice(self, column: str, known: Sequence[str]) -> str:
        """A column with one of the known words."""
        value = self.text(column)
        if value not in known:
            raise DataError(f"`{column}` is {value[:40]!r}", where=self.where, remedy=f"one of {', '.join(known)}")
        return value

    def image(self, column: str) -> ImageSource | None:
        """A column with an image, as bytes or as a path below the image root; None where it is empty."""
        value = self.values.get(column)
        if value is None or value in ("", b"") or value == {"bytes": None, "path": None}:
            return None
        try:
            return image_source(value, self.root)
        except DataError as error:
            raise DataError(f"`{column}`: {error.what}", where=self.where, remedy=error.remedy) from error


def rows(path: Path, *splits: str, image_root: Path | None = None) -> Iterator[Row]:
    """Every row of a published file, or of the files below a folder that belong to a split, in their names' order.

    splits  patterns, searched for in the files' paths below the folder; the first that is found in any counts

    A .json file holds a list of rows, or one object with a row under each key. Relative image paths start at `image_root`, by
    default the file's folder. Raises DataError for a folder without such a file and for files that cannot be read.
    """
    path = Path(path)
    for file in _files(path, splits):
        root = (file.parent if image_root is None else Path(image_root)).absolute()
        for number, values in _read(file):
            where = f"{file}:{number}"
            if not isinstance(values, Mapping):
                raise DataError("a row is not an object", where=where)
            yield Row(values, where, root)


def _files(path: Path, splits: Sequence[str]) -> list[Path]:
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"a benchmark's file ends in {', '.join(SUFFIXES)}", where=str(path))
        return [path]
    found = [file for file in sorted(path.rglob("*")) if file.suffix.lower() in SUFFIXES and file.is_file()]
    of_split = ([file for file in found if re.search(split, file.relative_to(path).as_posix())] for split in splits)
    matching = next(filter(None, of_split), [])
    if not matching:
        raise DataError(
            f"no file below this folder is one of {' or '.join(splits)} and ends in {', '.join(SUFFIXES)}",
            where=str(path),
            remedy=f"name the file itself; there are {', '.join(file.name for file in found[:5]) or 'none'}",
        )
    kinds = {file.suffix.lower() for file in matching}
    if len(kinds) > 1:  # the same rows in another form, most likely
        raise DataError(
            f"the folder holds files of {' and '.join(sorted(kinds))}",
            where=str(path),
            remedy="name one of them, or a folder of one",
        )
    return matching


def _read(file: Path) -> Iterator[tuple[int, Any]]:
    if file.suffix.lower() == ".parquet":
        yield from _parquet(file)
        return
    try:
        if file.suffix.lower() == ".jsonl":
            lines = (line for line in file.read_bytes().splitlines() if line.strip())
            yield from enumerate((json.loads(line) for line in lines), start=1)
        else:
            content = json.loads(file.read_bytes())
            yield from enumerate(content.values() if isinstance(content, dict) else content, start=1)
    except (ValueError, RecursionError, TypeError) as error:
        raise DataError(f"the file is not JSON: {error}", where=str(file)) from error


def _parquet(file: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(file) as opened:
            growing = growing_columns(opened.metadata, MAX_GROWN_BYTES)
        with pq.ParquetFile(file, read_dictionary=growing) as opened:
            for batch in opened.iter_batches(batch_size=_ROWS_AT_ONCE):
                if growing:
                    check_growth(batch, MAX_GROWN_BYTES)
                for values in batch.to_pylist():
                    number += 1
                    yield number, values
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"the file is not readable parquet: {error}", where=str(file)) from error


def option_lines(options: Sequence[str]) -> str:
    """`(A) …`, `(B) …`, one a line."""
    return "\n".join(f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))


def option_answers(letter: str, options: Sequence[str]) -> tuple[str, ...]:
    """The other ways to give the option `letter`: its text, where no other option has it and it cannot be taken for a letter."""
    place = LETTERS.find(letter) if len(letter) == 1 else -1
    if not 0 <= place < len(options):
        return ()
    text = options[place].strip()
    same = sum(option.strip().casefold() == text.casefold() for option in options)
    return (text,) if text and same == 1 and not _LOOKS_LIKE_A_CHOICE.fullmatch(text) else ()


def with_images(text: str, images: Sequence[ImageSource]) -> str:
    """The images, one after another, and the text below them."""
    return f"{IMAGE_PLACEHOLDER * len(images)}\n{text}" if images else text
