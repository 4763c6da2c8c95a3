"""Items -> data files of every kind, one item at a time; a file takes its name when it is complete."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prism_nemo.errors import DataError

Write = Callable[[Mapping[str, Any]], None]
GROUP_ROWS = 1000  # of a row group of parquet, at most
GROUP_BYTES = 32 * 2**20  # of the bytes and texts in one


@contextmanager
def open_writer(out: Path, form: str) -> Iterator[Write]:
    """Writes items of one form to `out`, of the kind that its name says. On an error nothing is left.

    Items hold plain JSON values, and bytes as the images' in parquet and .tar.
    """
    temporary = out.with_name(f".{out.name}.new")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _KINDS[out.suffix.lower()](temporary, form) as write:
            yield write
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _jsonl(path: Path, form: str) -> Iterator[Write]:
    with path.open("w", encoding="utf-8") as file:
        yield lambda item: _ignore(file.write(_dump(item) + "\n"))


@contextmanager
def _json(path: Path, form: str) -> Iterator[Write]:
    with path.open("w", encoding="utf-8") as file:
        separator = "[\n"

        def write(item: Mapping[str, Any]) -> None:
            nonlocal separator
            file.write(separator + _dump(item))
            separator = ",\n"

        yield write
        file.write("\n]\n" if separator == ",\n" else "[]\n")


@contextmanager
def _parquet(path: Path, form: str) -> Iterator[Write]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[Mapping[str, Any]] = []
    held = 0
    schema = _schema(form)
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:

        def flush() -> None:
            nonlocal held
            if rows:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
            rows.clear()
            held = 0

        def write(item: Mapping[str, Any]) -> None:
            nonlocal held
            rows.append({name: _cell(name, value) for name, value in item.items()})
            held += _size(item)
            if len(rows) >= GROUP_ROWS or held >= GROUP_BYTES:
                flush()

        yield write
        flush()


@contextmanager
def _tar(path: Path, form: str) -> Iterator[Write]:
    """A sample per item, called by its number; the id is in the JSON."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        number = 0

        def write(item: Mapping[str, Any]) -> None:
            nonlocal number
            key = f"{number:09d}"
            number += 1
            images = [image["bytes"] for image in item.get("images") or []]
            _member(tar, f"{key}.json", _dump({name: value for name, value in item.items() if name != "images"}).encode())
            for place, data in enumerate(images):
                _member(tar, f"{key}.{place}.{image_suffix(data)}", data)
            tar.members = []  # type: ignore[attr-defined]  # it would keep every one

        yield write


_KINDS = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet, ".tar": _tar}


def image_suffix(data: bytes) -> str:
    """By the content; `jpg` for what is none of the formats that are read, whose reader then says so."""
    for suffix, magic in (("png", b"\x89PNG"), ("jpg", b"\xff\xd8"), ("gif", b"GIF8"), ("bmp", b"BM")):
        if data.startswith(magic):
            return suffix
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return "tif" if data[:4] in (b"II*\0", b"MM\0*") else "jpg"


def _member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def _dump(item: Mapping[str, Any]) -> str:
    try:
        return json.dumps(item, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"the record cannot be written as JSON: {error}") from error


def _schema(form: str) -> Any:
    import pyarrow as pa

    text = pa.string()
    image = pa.struct([("bytes", pa.binary()), ("path", text)])
    turns = pa.list_(pa.struct([("role", text), ("content", text)]))
    times = [("fps", pa.float64()), ("timestamps", pa.list_(pa.float64()))]
    video = pa.struct([("path", text), ("bytes", pa.binary()), ("frames", pa.list_(image)), *times])
    own = {
        "sharegpt": [("messages", turns), ("answer", text)],
        "rl": [
            ("prompt", turns),
            ("reward_model", pa.struct([("style", text), ("ground_truth", text)])),
            ("teacher_response", text),
        ],
        "pairwise": [("prompt", text), ("system", text), ("teacher_response", text), ("answer", text)],
    }[form]
    names = ("student_response", "answer_kind", "data_source", "caption", "probe_response", "metadata")
    shared = [("images", pa.list_(image)), ("videos", pa.list_(video)), ("equivalent_answers", pa.list_(text))]
    return pa.schema([("id", text), *own, *shared, *((name, text) for name in names)])


def _cell(name: str, value: Any) -> Any:
    if name == "metadata" and value is not None:
        return _dump(value)
    if name == "images" and value is not None:
        return [image if isinstance(image, Mapping) else {"path": image} for image in value]
    if name == "videos" and value is not None:
        return [{**video, "frames": _cell("images", video.get("frames"))} for video in value]
    return value


def _size(value: Any) -> int:
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else 8


def _ignore(_: object) -> None: ...
