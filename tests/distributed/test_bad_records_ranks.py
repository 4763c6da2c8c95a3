"""Bad records that come up on one of two data-parallel ranks: both ranks know, and go on or stop together. One launch."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import run_ranks
from helpers.stages import run_stage, settings, tiny_task, written

from prism_nemo.config.compose import load_config
from prism_nemo.config.enums import Device
from prism_nemo.config.schema import ParallelConfig, RuntimeConfig
from prism_nemo.engine.runtime import session
from prism_nemo.errors import DataError
from prism_nemo.run_directory import read_json_lines

SHARED = ("data.shuffle=false", "trainer.max_steps=2", "trainer.log_samples=99")


def on_two_ranks(jobs: dict[str, tuple[str, list[str]]]) -> dict[str, str]:
    """Runs stages; the error that each ended with on this rank, or nothing."""
    ended = {}
    with session(ParallelConfig(), RuntimeConfig(device=Device.cpu)):
        for name, (stage, overrides) in jobs.items():
            try:
                importlib.import_module(f"prism_nemo.stages.{stage}").run(load_config(stage, overrides))
                ended[name] = ""
            except DataError as error:
                ended[name] = error.what
    return ended


def with_bad_answers(folder: Path, numbers: list[int], file: str) -> Path:
    """A copy of the task in which these records' answers are empty."""
    shutil.copytree(tiny_task().data.root, folder)
    lines = [json.loads(line) for line in (folder / file).read_text().splitlines()]
    for number in numbers:
        lines[number]["answer"] = "."
    (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bad_records")


@pytest.fixture(scope="module")
def jobs(folder: Path) -> dict[str, tuple[str, list[str]]]:
    few = with_bad_answers(folder / "few", [1, 3], "prompts.jsonl")  # the second rank's part of the first batch
    held_out = with_bad_answers(folder / "held_out", [3], "test.jsonl")
    pairs = folder / "pairs_data"
    shutil.copytree(tiny_task().data.root, pairs)
    lines = [json.loads(line) for line in (pairs / "teacher.jsonl").read_text().splitlines()]
    for number in (3, 5):
        lines[number]["images"] = ["images/none.png"]
    (pairs / "teacher.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def job(name: str, stage: str, *overrides: str) -> tuple[str, list[str]]:
        return stage, settings(stage, folder / "two" / name, *overrides)

    return {
        "goes_on": job("goes_on", "rlvr", *SHARED, f"data.train={few}", "data.max_bad_sample_share=0.1"),
        "stops": job("stops", "rlvr", *SHARED, f"data.train={few}", "data.max_bad_sample_share=0.02"),
        "held_out": job(
            "held_out", "rlvr", *SHARED, f"data.validation={held_out}", f"data.train={held_out.parent / 'prompts.jsonl'}"
        ),
        "pairs": job(
            "pairs", "pairs", f"data.train={pairs / 'teacher.jsonl'}", "limit_samples=23", "data.max_bad_sample_share=0.1"
        ),
    }


@pytest.fixture(scope="module")
def ended(jobs: dict[str, tuple[str, list[str]]]) -> list[dict[str, str]]:
    return run_ranks(on_two_ranks, 2, jobs, timeout_seconds=300)


def listed(run: Path) -> list[str]:
    return sorted(row["id"] for row in read_json_lines(run / "bad_samples.jsonl"))


def overrides_of(job: tuple[str, list[str]], run: Path) -> list[str]:
    return [*job[1], f"experiment.dir={run}"]


def test_a_rank_without_a_usable_record_takes_part(ended: list[dict[str, Any]], folder: Path, jobs: Any) -> None:
    """The first batch is the first rank's alone; the metrics are those of one rank that was given the same."""
    assert [rank["goes_on"] for rank in ended] == ["", ""]
    run = folder / "two" / "goes_on"
    assert listed(run) == ["prompts-00001", "prompts-00003"]
    one = run_stage("rlvr", folder / "one" / "goes_on", *overrides_of(jobs["goes_on"], folder / "one" / "goes_on"))
    assert listed(one) == listed(run)
    metrics, expected = written(run)[0], written(one)[0]
    assert [row["step"] for row in metrics] == [1, 2]
    for found, want in zip(metrics, expected, strict=True):
        assert found["reward"] == pytest.approx(want["reward"], rel=1e-6)
        assert found["loss"] == pytest.approx(want["loss"], abs=1e-4)
        assert found["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-3)


def test_both_ranks_stop_and_the_records_are_listed(ended: list[dict[str, Any]], folder: Path) -> None:
    """The share is that of both ranks' records."""
    assert all("2 of 4 records cannot be used" in rank["stops"] for rank in ended)
    assert all("prompts-00001" in rank["stops"] and "prompts-00003" in rank["stops"] for rank in ended)
    run = folder / "two" / "stops"
    assert listed(run) == ["prompts-00001", "prompts-00003"]
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
    assert not (run / "metrics.jsonl").exists()


def test_a_held_out_record_of_one_rank_stops_both(ended: list[dict[str, Any]]) -> None:
    assert all("test-00003" in rank["held_out"] and "the verified answer is empty" in rank["held_out"] for rank in ended)


def test_pairs_of_two_ranks_are_those_of_one(ended: list[dict[str, Any]], folder: Path, jobs: Any) -> None:
    """In the records' order; a number of prompts that does not divide, and bad ones on one rank alone."""
    assert [rank["pairs"] for rank in ended] == ["", ""]
    run = folder / "two" / "pairs"
    one = run_stage("pairs", folder / "one" / "pairs", *overrides_of(jobs["pairs"], folder / "one" / "pairs"))
    assert (run / "pairs.jsonl").read_bytes() == (one / "pairs.jsonl").read_bytes()
    assert written(run)[0] == written(one)[0]
    assert listed(run) == listed(one) == ["teacher-00003", "teacher-00005"]
    assert not (run / "parts").exists()
