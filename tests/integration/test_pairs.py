"""The `pairs` command: what it leaves out, that it goes on where it was stopped, and that a warm-up can read what it wrote."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.stages import run_stage, tiny_task, trained_discriminator, trained_policy, written
from helpers.stopped_runs import signal_behind_batch

import prism_nemo
from prism_nemo.data.readers import read_records
from prism_nemo.errors import DataError, PrismError
from prism_nemo.run_directory import read_json_lines
from prism_nemo.stages.parts import PartFiles

README = Path(prism_nemo.__file__).parent.parent / "README.md"
SMALL_BATCHES = ("rollout.max_batch_size=12", "limit_samples=24")  # four batches of six prompts, two rollouts each


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(tiny_task().data.root, tmp_path / "data")
    yield tmp_path / "data"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped."""
    return run_stage("pairs", tmp_path_factory.mktemp("pairs") / "run", *SMALL_BATCHES)


def pairs(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "pairs.jsonl").read_text().splitlines()]


def status(run: Path) -> str:
    return json.loads((run / "status.json").read_text())["state"]


def test_what_a_run_writes(whole: Path) -> None:
    found = pairs(whole)
    (row,) = [row for row in written(whole)[0] if "pairs" in row]
    assert row["pairs"] == len(found) > 10
    assert row["pairs"] + row["invalid_rollouts"] == 48
    assert row["bad_records"] == 0
    records = {record.id: record for record in read_records(tiny_task().data.teacher, image_root=None).records}
    order = [pair["id"] for pair in found]
    assert order == sorted(order), "the records' own order"
    for pair in found:
        record = records[pair["id"].rpartition("/")[0]]
        assert (pair["prompt"], pair["teacher_response"]) == (record.prompt, record.response)
        assert tiny_task().data.root / pair["images"][0] == record.images[0].path
    assert sorted(path.name for path in whole.iterdir() if path.name != ".lock") == [
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "pairs.jsonl",
        "status.json",
    ]


def test_the_size_of_the_batches_changes_nothing(whole: Path, tmp_path: Path) -> None:
    assert pairs(run_stage("pairs", tmp_path / "run", "limit_samples=24")) == pairs(whole)


def test_a_stopped_run_goes_on(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the second of four batches; a line of the third was being written when the process was killed."""
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_behind_batch(patch, 2)
        with pytest.raises(SystemExit) as caught:
            run_stage("pairs", run, *SMALL_BATCHES)
    assert caught.value.code == 75
    assert status(run) == "interrupted"
    assert not (run / "pairs.jsonl").exists()
    part = run / "parts" / "rank_00000.jsonl"
    assert [json.loads(line)["record"] for line in part.read_text().splitlines()] == list(range(12))
    with part.open("a") as file:
        file.write('{"record": 12, "pa')
    batches = []
    append = PartFiles.append

    def note(self: PartFiles, rows: Any) -> None:
        batches.append([row["record"] for row in rows])
        append(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(PartFiles, "append", note)
        run_stage("pairs", run, *SMALL_BATCHES)
    assert batches == [list(range(12, 18)), list(range(18, 24))]
    assert (run / "pairs.jsonl").read_bytes() == (whole / "pairs.jsonl").read_bytes()
    assert written(run)[0] == written(whole)[0]
    assert not (run / "parts").exists()


def test_a_stopped_run_does_not_go_on_with_another_policy_or_other_records(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, run = tmp_path / "policy", tmp_path / "run"
    shutil.copytree(trained_policy(), policy)
    given = (*SMALL_BATCHES, f"model.path={policy}", f"data.train={data / 'teacher.jsonl'}")
    with monkeypatch.context() as patch:
        signal_behind_batch(patch, 1)
        with pytest.raises(SystemExit):
            run_stage("pairs", run, *given)
    latest = policy / "checkpoints" / "latest"
    newest = latest.read_text()
    latest.write_text("step_00000030")
    with pytest.raises(PrismError, match=r"another policy: .*step_00000040/policy, now .*step_00000030/policy"):
        run_stage("pairs", run, *given)
    latest.write_text(newest)
    lines = (data / "teacher.jsonl").read_text().splitlines(keepends=True)
    (data / "teacher.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(PrismError, match="another list of records"):
        run_stage("pairs", run, *given)
    (data / "teacher.jsonl").write_text("".join(lines))
    run_stage("pairs", run, *given)
    assert len(pairs(run)) > 10


def test_unusable_records_are_left_out_counted_and_listed(whole: Path, data: Path, tmp_path: Path) -> None:
    """A line that is no record, an image that is not there, and an image outside the root; the other pairs are as they were."""
    lines = (data / "teacher.jsonl").read_text().splitlines()
    names = [json.loads(line)["id"] for line in lines]
    lines[5] = json.dumps(json.loads(lines[5]) | {"images": ["images/none.png"]})
    lines[7] = json.dumps(json.loads(lines[7]) | {"images": [str(tiny_task().data.root / json.loads(lines[7])["images"][0])]})
    (data / "teacher.jsonl").write_text("".join(line + "\n" for line in [*lines[:24], "{"]))
    run = run_stage("pairs", tmp_path / "run", f"data.train={data / 'teacher.jsonl'}", "data.max_bad_sample_share=0.1")
    listed = {row["id"]: row["reason"] for row in read_json_lines(run / "bad_samples.jsonl")}
    assert listed.keys() == {"teacher:25", names[5], names[7]}
    assert "the line is not JSON" in listed["teacher:25"]
    assert "does not exist" in listed[names[5]]
    assert "outside the image root" in listed[names[7]]
    assert [pair for pair in pairs(whole) if pair["id"].rpartition("/")[0] not in listed] == pairs(run)
    (row,) = [row for row in written(run)[0] if "pairs" in row]
    assert row["bad_records"] == 2


def test_too_many_unusable_records_stop_the_run_and_what_was_sampled_is_kept(data: Path, tmp_path: Path) -> None:
    lines = (data / "teacher.jsonl").read_text().splitlines()
    for number in (13, 14):
        lines[number] = json.dumps(json.loads(lines[number]) | {"images": ["images/none.png"]})
    (data / "teacher.jsonl").write_text("".join(line + "\n" for line in lines))
    given = (*SMALL_BATCHES, f"data.train={data / 'teacher.jsonl'}")
    with pytest.raises(DataError, match="2 of 18 records cannot be used"):
        run_stage("pairs", tmp_path / "run", *given, "data.max_bad_sample_share=0.05")
    assert len(list(read_json_lines(tmp_path / "run" / "bad_samples.jsonl"))) == 2
    assert len((tmp_path / "run" / "parts" / "rank_00000.jsonl").read_text().splitlines()) == 18
    run_stage("pairs", tmp_path / "run", *given, "data.max_bad_sample_share=0.1")
    assert len(pairs(tmp_path / "run")) > 10


def test_absolute_image_paths_below_a_root_that_is_a_link(whole: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(data)
    lines = [json.loads(line) for line in (data / "teacher.jsonl").read_text().splitlines()]
    lines = [line | {"images": [str(data / image) for image in line["images"]]} for line in lines]
    (data / "teacher.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = run_stage("pairs", tmp_path / "run", *SMALL_BATCHES, f"data.train={tmp_path / 'link' / 'teacher.jsonl'}")
    assert pairs(run) == pairs(whole)


def readme_commands() -> dict[str, list[str]]:
    """The settings of every stage in the README's sequence, by stage."""
    (block,) = re.findall(r"^( {4}prism-nemo sft .*?)\n\n", README.read_text(), re.MULTILINE | re.DOTALL)
    commands = (shlex.split(line) for line in block.replace("\\\n", " ").splitlines())
    return {words[1]: words[2:] for words in commands}


def test_the_commands_of_the_readme_follow_on_each_other(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The settings of `pairs`, `warmup` and `align` that say where things are, word by word, in a folder like a user's."""
    paths = ("data.", "experiment.dir=", "discriminator.path=runs/")
    given = {stage: [word for word in words if word.startswith(paths)] for stage, words in readme_commands().items()}
    assert "data.train=runs/pairs/pairs.jsonl" in given["warmup"]
    assert "discriminator.path=runs/warmup" in given["align"]
    held_out, policy = f"data.validation={data / 'test.jsonl'}", trained_policy()
    trained_discriminator()  # while the folder is still another
    monkeypatch.chdir(data)
    run_stage("pairs", Path("unused"), f"model.path={policy}", *given["pairs"])
    for stage in ("warmup", "align"):
        run_stage(stage, Path("unused"), held_out, "trainer.max_steps=1", *given[stage])
    assert (data / "runs" / "align" / "checkpoints" / "latest").exists()


def test_images_inside_the_data_file_become_files_that_the_warm_up_finds(whole: Path, tmp_path: Path) -> None:
    """The same records as parquet with bytes: the same pairs, and a warm-up that needs to be told nothing of images."""
    lines = [json.loads(line) for line in (tiny_task().data.teacher).read_text().splitlines()[:24]]
    for line in lines:
        line["images"] = [{"bytes": (tiny_task().data.root / image).read_bytes(), "path": None} for image in line["images"]]
    columns = ("id", "messages", "images", "answer", "caption", "probe_response")
    table = pa.Table.from_pylist([{name: line[name] for name in columns} for line in lines])
    pq.write_table(table, tmp_path / "teacher.parquet")
    run = run_stage("pairs", tmp_path / "run", *SMALL_BATCHES, f"data.train={tmp_path / 'teacher.parquet'}")
    without_images = [{name: value for name, value in pair.items() if name != "images"} for pair in pairs(run)]
    assert without_images == [{name: value for name, value in pair.items() if name != "images"} for pair in pairs(whole)]
    for pair, expected in zip(pairs(run), pairs(whole), strict=True):
        assert (run / pair["images"][0]).read_bytes() == (tiny_task().data.root / expected["images"][0]).read_bytes()
    files = [file for file in (run / "images").rglob("*") if file.is_file()]
    assert len(files) == len({pair["images"][0] for pair in pairs(run)}) < len(pairs(run))
    given = (f"data.train={run / 'pairs.jsonl'}", "data.image_root=null", "trainer.max_steps=1")
    run_stage("warmup", tmp_path / "warmup", *given)
    assert (tmp_path / "warmup" / "checkpoints" / "latest").exists()
