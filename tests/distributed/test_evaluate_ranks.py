"""An evaluation on two ranks is one rank's, byte by byte; one that was stopped goes on with another number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.stages import run_stage, written
from helpers.stopped_runs import run_on_two_ranks

GIVEN = ("rollout.num_rollouts_per_prompt=4", "rollout.max_batch_size=8", "category=question", "bootstrap_samples=200")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two_ranks")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    return run_stage("eval", folder / "alone", *GIVEN)


@pytest.fixture(scope="module")
def launched(folder: Path, alone: Path) -> list[dict[str, str]]:
    return run_on_two_ranks("eval", folder, *GIVEN, stopped_behind=3)


def assert_same_evaluation(run: Path, alone: Path) -> None:
    for name in ("samples.jsonl", "evaluation.json"):
        assert (run / name).read_bytes() == (alone / name).read_bytes(), name
    assert written(run) == written(alone)
    assert not (run / "parts").exists()


@pytest.mark.parametrize("name", ["two", "begun_on_one", "tp"])
def test_two_ranks_write_what_one_does(name: str, launched: list[dict[str, str]], folder: Path, alone: Path) -> None:
    assert [ends[name] for ends in launched] == ["finished", "finished"]
    assert_same_evaluation(folder / name, alone)


def test_what_two_ranks_began_one_finishes(launched: list[dict[str, str]], folder: Path, alone: Path) -> None:
    assert [ends["begun_on_two"] for ends in launched] == ["status 75", "status 75"]
    run = folder / "begun_on_two"
    parts = sorted((run / "parts").glob("rank_*.jsonl"))
    assert len(parts) == 2 and all(json.loads(line) for part in parts for line in part.read_text().splitlines())
    run_stage("eval", run, *GIVEN)
    assert_same_evaluation(run, alone)
