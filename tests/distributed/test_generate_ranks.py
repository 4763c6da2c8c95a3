"""Responses of two ranks are one rank's, byte by byte; a run that was stopped goes on with another number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.stages import run_stage, tiny_task, written
from helpers.stopped_runs import run_on_two_ranks

GIVEN = ("rollout.num_rollouts_per_prompt=4", "rollout.max_batch_size=16", "generate.token_ids=true", "limit_samples=21")
FILES = ("responses.jsonl", "pass_rates.jsonl", "bad_samples.jsonl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two_ranks")


@pytest.fixture(scope="module")
def given(folder: Path) -> tuple[str, ...]:
    """Of 21 prompts one cannot be used."""
    task = tiny_task().data
    rows = [json.loads(line) for line in task.prompts.read_text().splitlines()]
    rows[6]["images"] = ["images/none.png"]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    root = f"data.image_root={task.root}"
    return (*GIVEN, f"data.train={folder / 'prompts.jsonl'}", root, "data.max_bad_sample_share=0.05")


@pytest.fixture(scope="module")
def alone(folder: Path, given: tuple[str, ...]) -> Path:
    return run_stage("generate", folder / "alone", *given)


@pytest.fixture(scope="module")
def launched(folder: Path, alone: Path, given: tuple[str, ...]) -> list[dict[str, str]]:
    return run_on_two_ranks("generate", folder, *given, stopped_behind=2)


def assert_same_responses(run: Path, alone: Path) -> None:
    for name in FILES:
        assert (run / name).read_bytes() == (alone / name).read_bytes(), name
    assert len((run / "responses.jsonl").read_text().splitlines()) == 20
    assert written(run) == written(alone)
    assert not (run / "parts").exists()


@pytest.mark.parametrize("name", ["two", "begun_on_one", "tp"])
def test_two_ranks_write_what_one_does(name: str, launched: list[dict[str, str]], folder: Path, alone: Path) -> None:
    assert [ends[name] for ends in launched] == ["finished", "finished"]
    assert_same_responses(folder / name, alone)


def test_what_two_ranks_began_one_finishes(
    launched: list[dict[str, str]], folder: Path, alone: Path, given: tuple[str, ...]
) -> None:
    assert [ends["begun_on_two"] for ends in launched] == ["status 75", "status 75"]
    run = folder / "begun_on_two"
    assert len(list((run / "parts").glob("rank_*.jsonl"))) == 2
    run_stage("generate", run, *given)
    assert_same_responses(run, alone)
