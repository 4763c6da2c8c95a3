"""An evaluation on two ranks is one rank's, byte by byte; one that was stopped goes on with another number of ranks."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import run_ranks
from helpers.stages import run_stage, settings, written

from prism_nemo.config.compose import load_config
from prism_nemo.config.enums import Device
from prism_nemo.config.schema import ParallelConfig, RuntimeConfig
from prism_nemo.engine.runtime import session
from prism_nemo.stages import evaluate
from prism_nemo.stages.parts import PartFiles

GIVEN = ("rollout.num_rollouts_per_prompt=4", "rollout.max_batch_size=8", "category=question", "bootstrap_samples=200")
TP = ("parallel.tensor_model_parallel_size=2",)


def stop_behind(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    append = PartFiles.append
    count = []

    def append_and_signal(self: PartFiles, rows: Any) -> None:
        append(self, rows)
        count.append(len(rows))
        if len(count) == batch:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(PartFiles, "append", append_and_signal)


def on_two_ranks(jobs: list[tuple[str, list[str]]]) -> list[str]:
    """How each ended. A job called "stopped" is told to stop behind its second batch, on one rank alone."""
    ends = []
    with session(ParallelConfig(), RuntimeConfig(device=Device.cpu)) as runtime:
        for name, values in jobs:
            with pytest.MonkeyPatch.context() as patch:
                if name == "stopped" and runtime.rank == 1:
                    stop_behind(2, patch)
                try:
                    evaluate.run(load_config("eval", values))
                    ends.append("finished")
                except SystemExit as error:
                    ends.append(f"status {error.code}")
    return ends


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two_ranks")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    return run_stage("eval", folder / "alone", *GIVEN)


@pytest.fixture(scope="module")
def launched(folder: Path, alone: Path) -> list[list[str]]:
    begun = settings("eval", folder / "begun_on_one", *GIVEN)
    with pytest.MonkeyPatch.context() as patch:
        stop_behind(3, patch)
        with pytest.raises(SystemExit):
            run_stage("eval", folder / "begun_on_one", *GIVEN)
    jobs = [
        ("two", settings("eval", folder / "two", *GIVEN)),
        ("tp", settings("eval", folder / "tp", *GIVEN, *TP)),
        ("begun_on_one", begun),
        ("stopped", settings("eval", folder / "begun_on_two", *GIVEN)),
    ]
    return run_ranks(on_two_ranks, 2, jobs)


def assert_same_evaluation(run: Path, alone: Path) -> None:
    for name in ("samples.jsonl", "evaluation.json"):
        assert (run / name).read_bytes() == (alone / name).read_bytes(), name
    assert written(run) == written(alone)
    assert not (run / "parts").exists()


@pytest.mark.parametrize("name", ["two", "begun_on_one", "tp"])
def test_two_ranks_write_what_one_does(name: str, launched: list[list[str]], folder: Path, alone: Path) -> None:
    assert launched[0][:3] == launched[1][:3] == ["finished"] * 3
    assert_same_evaluation(folder / name, alone)


def test_what_two_ranks_began_one_finishes(launched: list[list[str]], folder: Path, alone: Path) -> None:
    assert [ends[3] for ends in launched] == ["status 75", "status 75"]
    run = folder / "begun_on_two"
    parts = sorted((run / "parts").glob("rank_*.jsonl"))
    assert len(parts) == 2 and all(json.loads(line) for part in parts for line in part.read_text().splitlines())
    run_stage("eval", run, *GIVEN)
    assert_same_evaluation(run, alone)
