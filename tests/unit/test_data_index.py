"""Indexes on the disk: made once, made anew when they do not fit, never half there."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest

from prism_nemo.data.index import open_index, scan_in_memory
from prism_nemo.data.items import JsonItems, _scan_lines
from prism_nemo.errors import DataError, PrismError

SCANS = 0


def scan(path: Path, digest: object) -> object:
    global SCANS
    SCANS += 1
    return _scan_lines(path, digest)  # type: ignore[arg-type]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps({"prompt": str(number)}) + "\n" for number in range(100)))
    return path


def opened(data: Path, cache: Path) -> tuple[list[list[int]], int]:
    """The spans, and how often the file was scanned for them."""
    before = SCANS
    return open_index(data, scan, cache).spans.tolist(), SCANS - before  # type: ignore[arg-type]


def test_it_is_made_once_and_equals_a_scan(data: Path, tmp_path: Path) -> None:
    expected = scan_in_memory(data, _scan_lines)
    cache = tmp_path / "a" / "cache"
    assert opened(data, cache) == (expected.spans.tolist(), 1)
    assert opened(data, cache) == (expected.spans.tolist(), 0)
    assert open_index(data, _scan_lines, cache).digest == expected.digest
    assert isinstance(open_index(data, _scan_lines, cache).spans, np.memmap)


def test_a_changed_file_is_indexed_anew(data: Path, tmp_path: Path) -> None:
    opened(data, tmp_path / "cache")
    with data.open("a") as file:
        file.write('{"prompt": "more"}\n')
    spans, scans = opened(data, tmp_path / "cache")
    assert (len(spans), scans) == (101, 1)
    os.utime(data, ns=(0, 0))
    assert opened(data, tmp_path / "cache")[1] == 1
    assert len(list((tmp_path / "cache").glob("*.index"))) == 1


@pytest.mark.parametrize("damage", ["empty", "short", "header", "spans", "long", "not json", "records"])
def test_a_damaged_index_is_made_anew(damage: str, data: Path, tmp_path: Path) -> None:
    expected, _ = opened(data, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*.index")
    good = file.read_bytes()
    header = json.loads(good[:4096])
    bad = {
        "empty": b"",
        "short": good[:-24],
        "header": b"\0" * 4096 + good[4096:],
        "spans": good[:-1] + b"\x07",
        "long": good + b"x",
        "not json": b"[" * 4096 + good[4096:],
        "records": json.dumps({**header, "records": "many"}).encode().ljust(4096) + good[4096:],
    }[damage]
    file.write_bytes(bad)
    assert opened(data, tmp_path / "cache") == (expected, 1)
    assert file.read_bytes() == good


def test_a_cache_that_cannot_be_written(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PrismError, match=r"cannot be written") as caught:
        open_index(data, _scan_lines, tmp_path / "file" / "cache")
    assert "data.cache_dir" in (caught.value.remedy or "")


def test_a_read_only_data_folder_is_enough(data: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    open_index(data, _scan_lines, tmp_path / "cache")
    assert sorted(path for path in tmp_path.iterdir() if path.name != "cache") == before


def test_what_a_killed_process_left_is_removed(data: Path, tmp_path: Path) -> None:
    opened(data, tmp_path / "cache")
    (file,) = (tmp_path / "cache").glob("*.index")
    left = file.with_name(f".{file.name}.99999.new")
    left.write_bytes(b"half")
    file.unlink()
    assert opened(data, tmp_path / "cache")[1] == 1
    assert not left.exists()


def test_a_failed_scan_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text('[{"a": 1},')
    with pytest.raises(DataError, match="ends within item 2"):
        JsonItems(path, tmp_path / "cache", lines=False)
    assert [file.suffix for file in (tmp_path / "cache").iterdir()] == [".lock"]


def _open_and_count(arguments: tuple[Path, Path, Path]) -> int:
    data, cache, log = arguments

    def counted(path: Path, digest: object) -> object:
        with log.open("a") as file:
            file.write("x")
        return _scan_lines(path, digest)  # type: ignore[arg-type]

    return len(open_index(data, counted, cache))  # type: ignore[arg-type]


def test_several_processes_make_it_once(data: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.map(_open_and_count, [(data, tmp_path / "cache", log)] * 6, chunksize=1) == [100] * 6
    assert log.read_text() == "x"


def test_a_file_that_changes_while_it_is_read(data: Path, tmp_path: Path) -> None:
    items = JsonItems(data, tmp_path / "cache", lines=True)
    with data.open("a") as file:
        file.write("{}\n")
    with pytest.raises(PrismError, match="changed while it is in use") as caught:
        items.read(0)
    assert not isinstance(caught.value, DataError)  # no record is skipped for it


def test_a_file_that_takes_anothers_place(data: Path, tmp_path: Path) -> None:
    """Even while the old one is still open: every index is read with its own file."""
    old = JsonItems(data, tmp_path / "cache", lines=True)
    assert old.read(1) == ({"prompt": "1"}, None)
    (tmp_path / "new").write_text('{"prompt": "longer than before"}\n{"prompt": "new"}\n')
    (tmp_path / "new").replace(data)
    new = JsonItems(data, tmp_path / "cache", lines=True)
    assert new.read(1) == ({"prompt": "new"}, None)
    assert old.read(2) == ({"prompt": "2"}, None)
