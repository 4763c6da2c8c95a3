"""Corrupt data through a whole stage, read at the start and over an index.

Every broken record is listed with its reason while the run goes on, or the run stops with a summary; broken files stop it before
the first step.
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.stages import run_stage, tiny_task, written

from prism_nemo.errors import DataError, PrismError
from prism_nemo.run_directory import read_json_lines

ABOVE = {"at the start": "data.index_above_mb=32", "over an index": "data.index_above_mb=0"}
STEPS = 5  # of 8 records: all 40


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(tiny_task().data.root, tmp_path / "data")
    yield tmp_path / "data"


def items_of(data: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (data / "public.jsonl").read_text().splitlines()[: 8 * STEPS]]


def train(run: Path, file: Path, above: str, *overrides: str) -> Path:
    return run_stage(
        "sft",
        run,
        f"data.train={file}",
        f"data.image_root={file.parent}",
        f"data.cache_dir={run.parent / 'cache'}",
        "data.shuffle=false",
        f"trainer.max_steps={STEPS}",
        "data.max_bad_sample_share=0.6",
        ABOVE[above],
        *overrides,
    )


def listed(run: Path) -> dict[str, str]:
    return {row["id"]: f"{row['reason']} @ {row['where']}" for row in read_json_lines(run / "bad_samples.jsonl")}


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 pixels in 100 bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")


def corrupt_lines(data: Path) -> tuple[list[bytes], dict[str, str]]:
    """Forty lines, of which a part is broken, and the reason for each broken one by its record's name."""
    items = items_of(data)
    (data / "outside.png").write_bytes(b"x")
    (data / "images" / "link.png").symlink_to("/etc/passwd")
    (data / "images" / "bomb.png").write_bytes(bomb())
    (data / "images" / "huge.png").write_bytes(b"")
    with (data / "images" / "huge.png").open("r+b") as file:
        file.truncate(65 * 2**20)
    (data / "images" / "cut.png").write_bytes((data / items[0]["images"][0]).read_bytes()[:60])
    changed: dict[int, tuple[dict[str, Any], str]] = {
        2: ({"images": ["images/none.png"]}, "the image does not exist"),
        4: ({"images": ["images/huge.png"]}, "the image file has 68157440 bytes"),
        6: ({"images": ["images/bomb.png"]}, "the image has 3600000000 pixels|the image is too large"),
        7: ({"images": ["images/cut.png"]}, "the image cannot be decoded"),
        10: ({"images": ["../../../../../../etc/passwd"]}, "the image lies outside the image root|the image does not exist"),
        11: ({"images": ["images/link.png"]}, "the image lies outside the image root"),
        12: ({"images": ["https://example.com/a.png"]}, "is a URL"),
        14: ({"images": 7}, "an image is a number"),
        15: ({"messages": {"role": "user"}}, "`messages` is an object"),
        16: ({"messages": [{"role": "user", "content": 3}]}, "the user turn holds a number"),
    }
    raw: dict[int, tuple[bytes, str]] = {
        20: (b'{"messages": [', "the line is not JSON: Expecting value"),
        21: (b'{"id": "\xff\xfe"}', "the line is not JSON: 'utf-8' codec"),
        22: (b'{"messages": NaN}', "the line is not JSON: NaN"),
        23: (b'{"answer": -Infinity}', "the line is not JSON: -Infinity"),
        24: (b'["a list"]', "a record is an object, this is a list"),
        25: (b"\0" * 40, "the line is not JSON"),
        26: (b'{"prompt": "\\ud800"}', "the line is not JSON: 'utf-8' codec can't encode"),
        27: (b"[" * 100_000, "the line is not JSON: it is nested too deeply"),
    }
    lines, reasons = [], {}
    for number, one in enumerate(items):
        if number in raw:
            line, reasons[f"public:{number + 1}"] = raw[number]
        else:
            changes, reason = changed.get(number, ({}, ""))
            line = json.dumps({**one, **changes}).encode()
            if reason:
                reasons[one["id"]] = reason
        lines.append(line)
    return lines, reasons


def assert_reasons(found: dict[str, str], expected: dict[str, str]) -> None:
    assert found.keys() == expected.keys()
    for name, reason in expected.items():
        assert any(option in found[name] for option in reason.split("|")), (name, found[name])


@pytest.mark.parametrize("above", ABOVE)
def test_every_broken_line_is_listed_and_the_run_goes_on(above: str, data: Path, tmp_path: Path) -> None:
    """With a byte-order mark, CRLF, blank lines and repeated ids beside what is broken."""
    lines, reasons = corrupt_lines(data)
    lines[1] = json.dumps(json.loads(lines[1]) | {"id": json.loads(lines[0])["id"]}).encode()
    (data / "public.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines) + b"\r\n\r\n  \n")
    run = train(tmp_path / "run", data / "public.jsonl", above)
    assert [row["step"] for row in written(run)[0]] == list(range(1, STEPS + 1))
    assert_reasons(listed(run), reasons)
    assert f"{data / 'public.jsonl'}:21" in listed(run)["public:21"]


@pytest.mark.parametrize("above", ABOVE)
def test_past_the_share_the_run_stops_with_a_summary(above: str, data: Path, tmp_path: Path) -> None:
    lines, _ = corrupt_lines(data)
    (data / "public.jsonl").write_bytes(b"\n".join(lines))
    with pytest.raises(DataError) as caught:
        train(tmp_path / "run", data / "public.jsonl", above, "data.max_bad_sample_share=0.05")
    message = str(caught.value)
    assert "records cannot be used, more than the allowed share of 0.05" in message
    assert "data.max_bad_sample_share" in message
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("above", ABOVE)
def test_broken_items_of_a_json_list(above: str, data: Path, tmp_path: Path) -> None:
    texts = [json.dumps(one) for one in items_of(data)]
    texts[3], texts[9], texts[12] = '{"messages": tru}', "3", '{"id": "x", "messages": [NaN]}'
    (data / "public.json").write_text("[" + ",\n".join(texts) + "]")
    run = train(tmp_path / "run", data / "public.json", above)
    expected = {"public:4": "the item is not JSON", "public:10": "a record is an object", "public:13": "NaN is no number"}
    assert_reasons(listed(run), expected)


@pytest.mark.parametrize("above", ABOVE)
def test_parquet_with_broken_rows(above: str, data: Path, tmp_path: Path) -> None:
    """A row group whose pages were overwritten, an image that is none, and a wrong type."""
    rows = items_of(data)
    for one in rows:
        one["images"] = [{"bytes": (data / path).read_bytes(), "path": None} for path in one["images"]]
        one.pop("metadata")
    rows[5]["images"][0]["bytes"] = b"no image"
    file = data / "rl.parquet"
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=8, compression="none")
    with pq.ParquetFile(file) as opened:
        column = opened.metadata.row_group(2).column(0)
        start, size = column.data_page_offset, column.total_compressed_size
    content = bytearray(file.read_bytes())
    content[start : start + size] = b"\xff" * size
    file.write_bytes(content)
    run = train(tmp_path / "run", file, above)
    expected = {rows[5]["id"]: "the image cannot be decoded"}
    expected |= {f"rl:{number}": "row group 2 cannot be read" for number in range(17, 25)}
    assert_reasons(listed(run), expected)


@pytest.mark.parametrize("above", ABOVE)
def test_a_shard_with_broken_samples(above: str, data: Path, tmp_path: Path) -> None:
    items = items_of(data)
    file = data / "shard.tar"
    with tarfile.open(file, "w") as tar:
        for number, one in enumerate(items):
            image = (data / one["images"][0]).read_bytes()
            if number == 4:
                image = bomb()
            if number == 6:
                image = image[:50]
            key = f"../{number:03d}" if number == 8 else f"{number:03d}"
            text = json.dumps({name: value for name, value in one.items() if name != "images"}).encode()
            members = {f"{key}.json": b"{" if number == 10 else text, f"{key}.png": image}
            if number == 12:
                del members[f"{key}.json"]
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    content = file.read_bytes()
    file.write_bytes(content[: content.rindex(b"039.png")])  # the end is lost: the last sample would be one without an image
    run = train(tmp_path / "run", file, above)
    found = listed(run)
    expected = {
        items[4]["id"]: "pixels|too large",
        items[6]["id"]: "the image cannot be decoded",
        "shard:9": "leads out of the shard",
        "shard:11": "Expecting property name",
        "shard:13": "neither .json nor .txt",
        "shard:40": "the shard ends within this sample",
    }
    assert_reasons(found, expected)
    assert not (tmp_path.parent / "008.json").exists()


def broken_files(folder: Path) -> dict[str, tuple[Path, str]]:
    def file(name: str, content: bytes) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    (folder / "folder.jsonl").mkdir()
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([{"prompt": "q"}] * 100), table)
    return {
        "an empty file": (file("empty.jsonl", b""), "holds no records"),
        "an empty list": (file("empty.json", b" [ ]\n"), "holds no records"),
        "a list that was cut": (file("cut.json", b'[{"prompt": "q"}, {"prompt": '), "it ends within item 2"),
        "an object": (file("object.json", b'{"prompt": "q"}'), "holds an object, not a list"),
        "lines called .json": (file("lines.json", b'{"prompt": "q"}\n{"prompt": "q"}\n'), "holds an object, not a list"),
        "gzip by mistake": (file("zipped.jsonl", gzip.compress(b'{"prompt": "q"}\n')), "gzip-compressed"),
        "gzip by name": (file("z.jsonl.gz", gzip.compress(b"{}")), "is compressed"),
        "UTF-16": (file("wide.jsonl", '{"prompt": "q"}\n'.encode("utf-16")), "UTF-16"),
        "a folder": (folder / "folder.jsonl", "the folder holds no data files"),
        "parquet that was cut": (file("cut.parquet", table.getvalue()[:-20]), "not readable parquet"),
        "parquet without a start": (file("no.parquet", b"PAR1 and more"), "not readable parquet"),
        "no archive": (file("no.tar", b"x" * 5000), "not a tar archive"),
        "nothing usable": (file("wrong.jsonl", b'{"text": "q"}\n' * 50), "cannot be used|can be used"),
    }


@pytest.mark.parametrize("above", ABOVE)
def test_broken_files_stop_the_run_before_its_first_step(above: str, tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    for number, (case, (path, message)) in enumerate(broken_files(tmp_path / "files").items()):
        run = tmp_path / f"run-{number}"
        with pytest.raises(PrismError) as caught:
            train(run, path, above, "data.max_bad_sample_share=0.01")
        assert any(option in str(caught.value) for option in message.split("|")), (case, str(caught.value))
        assert path.name.partition(".")[0] in str(caught.value), case
        assert not (run / "metrics.jsonl").exists()


def test_a_mixture_with_a_broken_source_goes_on(data: Path, tmp_path: Path) -> None:
    """Its weights hold, and what is broken is listed."""
    lines = (data / "teacher.jsonl").read_text().splitlines()[:16]
    lines[3] = "{"
    (data / "small.jsonl").write_text("\n".join(lines))
    sources = {"public": {"path": str(data / "public.jsonl"), "weight": 3}, "small": {"path": str(data / "small.jsonl")}}
    run = run_stage(
        "sft",
        tmp_path / "run",
        "data.train=null",
        f"data.mixture={json.dumps(sources)}",
        f"data.image_root={data}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.index_above_mb=0",
        "data.max_bad_sample_share=0.1",
        "trainer.max_steps=8",
    )
    assert list(listed(run)) == ["small:4"]
    assert len(written(run)[0]) == 8
