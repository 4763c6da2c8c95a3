"""`prism-nemo data`: what it prints, what it refuses, and that converted records are the same records."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from helpers.stages import tiny_task
from PIL import Image

from prism_nemo.cli import main
from prism_nemo.data.chat import ChatEncoder
from prism_nemo.data.checking import STAGES
from prism_nemo.data.command import STAGES as STAGE_NAMES
from prism_nemo.data.inspection import rows_needed
from prism_nemo.data.readers import read_records
from prism_nemo.data.records import ImageSource, Record

RESPONSE = "<caption> two plates </caption> <think> 1 + 2 </think> <answer> 3 </answer>"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "prism_nemo"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Records that have everything, and one that has next to nothing."""
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (40 + number, 30), (number, 0, 0)).save(folder / "images" / f"{number}.png")
    Image.new("RGB", (50, 20)).save(folder / "images" / "3.jpg")
    turns = [{"role": "user", "content": "<image> and <image>?"}, {"role": "assistant", "content": RESPONSE}]
    full = {
        "id": "full ü",
        "messages": [{"role": "system", "content": "be brief"}, *turns],
        "images": ["images/0.png", "images/3.jpg"],
        "answer": 3,
        "equivalent_answers": ["three", "[3]"],
        "answer_kind": "number",
        "data_source": "kitchen",
        "caption": "two plates",
        "probe_response": RESPONSE.replace("two", "four"),
        "student_response": "none",
        "metadata": {"digits": [1, 2], "nested": {"a": None, "b": 1.5}},
    }
    items: list[dict[str, Any]] = [
        full,
        {"prompt": "how many?", "answer": "[1, 2)"},
        {"id": 7, "prompt": "q", "image": "images/1.png"},
    ]
    (folder / "d.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def run(*arguments: object) -> int:
    try:
        return main(["data", *map(str, arguments)])
    except SystemExit as stop:
        return int(stop.code or 0)


def same(record: Record) -> Record:
    """Without where the images lie: only what they are."""
    contents = [ImageSource(data=image.data or image.path.read_bytes()) for image in record.images if image.data or image.path]
    return replace(record, images=tuple(contents), image_root=None)


def records_of(path: Path, root: Path | None = None) -> list[Record]:
    return [same(record) for record in read_records(path, image_root=root, max_bad_sample_share=0).records]


# Conversion


@pytest.mark.parametrize("form", ["sharegpt", "rl", "pairwise"])
def test_records_come_back_from_every_kind_and_form(form: str, data: Path, tmp_path: Path) -> None:
    """From JSONL to each, and from each to each other kind."""
    expected = records_of(data / "d.jsonl")
    kinds = {"jsonl": "copy", "json": "copy", "parquet": "embed", "tar": "embed"}
    for kind, mode in kinds.items():
        first = tmp_path / f"first-{kind}" / f"out.{kind}"
        assert run("convert", data / "d.jsonl", "--out", first, "--form", form, "--images", mode) == 0
        assert records_of(first) == expected
    for first_kind, second_kind in itertools.permutations(kinds, 2):
        second = tmp_path / "second" / f"{first_kind}-{second_kind}" / f"out.{second_kind}"
        first = tmp_path / f"first-{first_kind}" / f"out.{first_kind}"
        assert run("convert", first, "--out", second, "--images", kinds[second_kind]) == 0
        assert records_of(second) == expected


def test_paths_are_kept_below_their_root(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in (data / "beside.jsonl", tmp_path / "elsewhere" / "d.parquet"):
        assert run("convert", data / "d.jsonl", "--out", out) == 0
        assert records_of(out, data) == records_of(data / "d.jsonl")
        assert ("set data.image_root" in capsys.readouterr().out) == (out.parent != data)
    table = pq.read_table(tmp_path / "elsewhere" / "d.parquet").to_pylist()
    assert table[0]["images"] == [{"bytes": None, "path": "images/0.png"}, {"bytes": None, "path": "images/3.jpg"}]


def test_videos_are_kept(tmp_path: Path) -> None:
    videos = [{"path": "clip", "fps": 2.0}, "a.mp4", {"frames": ["b/1.png", "b/2.png"], "timestamps": [0, 3]}]
    (tmp_path / "d.jsonl").write_text(json.dumps({"id": "v", "prompt": "q", "videos": videos}) + "\n")
    expected = read_records(tmp_path / "d.jsonl", image_root=None).records
    for name in ("e.jsonl", "e.json", "e.parquet"):
        assert run("convert", tmp_path / "d.jsonl", "--out", tmp_path / name) == 0
        assert read_records(tmp_path / name, image_root=None).records == expected
    assert run("convert", tmp_path / "d.jsonl", "--out", tmp_path / "e.tar") == 2


def test_shards(data: Path, tmp_path: Path) -> None:
    assert run("convert", data / "d.jsonl", "--out", tmp_path / "s.tar", "--shard-records", 2) == 0
    shards = sorted(tmp_path.glob("s-*.tar"))
    assert [path.name for path in shards] == ["s-00000.tar", "s-00001.tar"]
    assert [record for path in shards for record in records_of(path)][0::2] == records_of(data / "d.jsonl")[0::2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "e.csv"], "says no kind of file"),
        (["--out", "e.jsonl", "--images", "embed"], ".jsonl cannot hold images"),
        (["--out", "e.tar", "--images", "keep"], "a shard holds its images"),
        (["--out", "taken.jsonl"], "the output is already there"),
        (["--out", "e.jsonl", "--shard-records", "0"], "--shard-records is 0"),
        (["--out", "e.parquet", "--images", "embed"], "record 7"),
    ],
)
def test_conversions_that_cannot_be(
    arguments: list[str], message: str, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(data)
    (data / "taken.jsonl").write_text("")
    (data / "images" / "1.png").unlink()
    before = sorted(data.rglob("*"))
    assert run("convert", "d.jsonl", *arguments) == 2
    assert message in capsys.readouterr().err
    assert sorted(data.rglob("*")) == before


def test_images_inside_cannot_become_paths(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("convert", data / "d.jsonl", "--out", tmp_path / "s.tar")
    assert run("convert", tmp_path / "s.tar", "--out", tmp_path / "e.jsonl") == 2
    assert "--images copy" in capsys.readouterr().err
    assert not (tmp_path / "e.jsonl").exists()


def test_bad_records_stop_a_conversion_or_are_listed(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (data / "d.jsonl").open("a") as file:
        file.write("{\n")
    assert run("convert", data / "d.jsonl", "--out", data / "e.jsonl") == 2
    assert "d:4" in capsys.readouterr().err
    assert not (data / "e.jsonl").exists()
    assert run("convert", data / "d.jsonl", "--out", data / "e.jsonl", "--skip-bad") == 0
    assert "d:4" in capsys.readouterr().out
    assert len(records_of(data / "e.jsonl")) == 3


# Validation


@pytest.mark.parametrize("workers", [1, 2])
def test_everything_broken_is_listed(workers: int, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {"prompt": "q", "answer": "1"}
    items: list[Any] = [good | {"id": str(number)} for number in range(1100)]
    items[3] = "text"
    items[700]["images"] = ["images/none.png"]
    items[701]["images"] = ["images/cut.png"]
    items[702]["answer"] = " $ . $ "
    items[703]["prompt"] = ""
    items[900]["id"] = "5"
    (data / "images" / "cut.png").write_bytes((data / "images" / "0.png").read_bytes()[:40])
    path = data / "many.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    assert run("validate", path, "--images", "--workers", workers) == 1
    out, err = capsys.readouterr()
    found = [line.partition(" ")[0] for line in out.splitlines()]
    assert found == ["many:4", "700", "701", "702", "703", "warning:"]
    assert f"warning: 5 [{path}:901]: the id is that of {path}:6 too" in out
    assert "5 of 1100 records are broken, 1 repeat an id" in err
    assert run("validate", path, "--json", "--workers", workers) == 1
    told = json.loads(capsys.readouterr().out)
    assert [bad["id"] for bad in told["broken"]] == ["many:4", "700", "702", "703"]  # the cut image is not opened
    assert told["repeated_ids"] == [{"id": "5", "where": f"{path}:901", "first": f"{path}:6"}]


def test_what_a_stage_needs(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needs = {"sft": 2, "warmup": 2, "align": 2, "rlvr": 1, "eval": 1, "pairs": 2}
    for stage, broken in needs.items():
        assert run("validate", data / "d.jsonl", "--stage", stage) == 1
        expected = broken + (stage == "warmup")  # its student's response is not in the format
        assert len(capsys.readouterr().out.splitlines()) == expected, stage
    assert set(needs) == set(STAGES) == set(STAGE_NAMES)


def test_a_sound_file_and_a_broken_one(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("validate", data / "d.jsonl", "--images") == 0
    assert capsys.readouterr().out == ""
    (tmp_path / "cut.json").write_text('[{"prompt": "q"}, {')
    assert run("validate", tmp_path / "cut.json") == 1
    assert "it ends within item 2" in capsys.readouterr().out


# Inspection


def test_what_is_in_a_file(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", data / "d.jsonl", "--plot", tmp_path / "lengths.png") == 0
    text = capsys.readouterr().out
    assert "sharegpt 1 (33%)" in text
    assert "kitchen 1 (33%)" in text
    with Image.open(tmp_path / "lengths.png") as picture:
        assert picture.width > 500
    assert run("inspect", data / "d.jsonl", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["records"], told["forms"], told["images"]) == (3, {"pairwise": 2, "sharegpt": 1}, {"0": 1, "1": 1, "2": 1})
    assert (told["image_width"]["min"], told["image_width"]["max"], told["image_height"]["min"]) == (40, 50, 20)
    assert told["answer_kinds"] == {"number": 1, "(not told)": 1}
    assert told["lengths"]["response characters"]["max"] == len(RESPONSE)


def test_token_lengths_are_those_of_the_encoder_and_are_remembered(
    capsys: pytest.CaptureFixture[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = tiny_task()
    given = ["inspect", task.data.teacher, "--model", task.model, "--system-prompt", "<caption> <think> <answer>", "--json"]
    assert run(*given, "--limit", 20) == 0
    told = json.loads(capsys.readouterr().out)["lengths"]
    assert (told["prompt tokens"]["min"] > 0, len(list(cache.glob("lengths-*")))) == (True, 1)
    encoded: list[str] = []
    encode = ChatEncoder.encode_prompt

    def counted(self: ChatEncoder, record: Record) -> Any:
        encoded.append(record.id)
        return encode(self, record)

    monkeypatch.setattr(ChatEncoder, "encode_prompt", counted)
    assert run(*given, "--limit", 20) == 0
    assert json.loads(capsys.readouterr().out)["lengths"] == told
    assert encoded == []
    assert run(*given) == 0
    assert len(encoded) == 64 - 20
    whole = json.loads(capsys.readouterr().out)["lengths"]["prompt tokens"]
    monkeypatch.undo()
    from prism_nemo.config.schema import DataConfig

    data = DataConfig(train=str(task.data.teacher), system_prompt="<caption> <think> <answer>")
    encoder = ChatEncoder.from_directory(task.model, data, image_root=None)
    lengths = [len(encoder.encode_prompt(record)) for record in read_records(task.data.teacher, image_root=None).records]
    assert (whole["min"], whole["max"]) == (min(lengths), max(lengths))


def test_rows_needed() -> None:
    assert rows_needed([6, 4, 5, 5], 10) == (2, 1.0)
    assert rows_needed([6, 6, 11], 10) == (2, 0.6)
    assert rows_needed([], 10) == (0, 0.0)


# The command line


def test_help_costs_nothing() -> None:
    code = (
        "import sys; from prism_nemo.cli import main; main(['data', '--help']); "
        "print({'torch', 'numpy', 'pyarrow', 'PIL', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: prism-nemo data")
    assert done.stdout.endswith("set()\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["look"], "data cannot `look`"),
        (["inspect"], "required"),
        (["inspect", "none.jsonl"], "does not exist"),
        (["inspect", "x", "--columns", "a"], "no pair of names"),
        (["inspect", "x", "--columns", "a=b"], "no field of a record"),
        (["validate", "x", "--workers", "0"], "--workers is 0"),
        (["validate", "x", "--stage", "sfd"], "invalid choice"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
