"""Responses of two ranks are one rank's, byte by byte; a run that was stopped goes on with another number of ranks."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import run_ranks
from helpers.stages import run_stage, settings, tiny_task, written

from prism_nemo.config.compose import load_config
from prism_nemo.config.enums import Device
from prism_nemo.config.schema import ParallelConfig, RuntimeConfig
from prism_nemo.engine.runtime import session
from prism_nemo.stages import generate
from prism_nemo.stages.parts import PartFiles

GIVEN = ("rollout.num_rollouts_per_prompt=4", "rollout.max_batch_size=16", "generate.token_ids=true", "limit_samples=21")
TP = ("parallel.tensor_model_parallel_size=2",)
FILES = ("responses.jsonl", "pass_rates.jsonl", "bad_samples.jsonl")


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
                    config: Any = load_config("generate", values)
                    generate.run(config)
                    ends.append("finished")
                except SystemExit as error:
                    ends.append(f"status {error.code}")
    return ends


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
def launched(folder: Path, alone: Path, given: tuple[str, ...]) -> list[list[str]]:
    with pytest.MonkeyPatch.context() as patch:
        stop_behind(2, patch)
        with pytest.raises(SystemExit):
            run_stage("generate", folder / "begun_on_one", *given)
    jobs = [
        ("two", settings("generate", folder / "two", *given)),
        ("tp", settings("generate", folder / "tp", *given, *TP)),
        ("begun_on_one", settings("generate", folder / "begun_on_one", *given)),
        ("stopped", settings("generate", folder / "begun_on_two", *given)),
    ]
    return run_ranks(on_two_ranks, 2, jobs)


def assert_same_responses(run: Path, alone: Path) -> None:
    for name in FILES:
        assert (run / name).read_bytes() == (alone / name).read_bytes(), name
    assert len((run / "responses.jsonl").read_text().splitlines()) == 20
    assert written(run) == written(alone)
    assert not (run / "parts").exists()


@pytest.mark.parametrize("name", ["two", "begun_on_one", "tp"])
def test_two_ranks_write_what_one_does(name: str, launched: list[list[str]], folder: Path, alone: Path) -> None:
    assert launched[0][:3] == launched[1][:3] == ["finished"] * 3
    assert_same_responses(folder / name, alone)


def test_what_two_ranks_began_one_finishes(launched: list[list[str]], folder: Path, alone: Path, given: tuple[str, ...]) -> None:
    assert [ends[3] for ends in launched] == ["status 75", "status 75"]
    run = folder / "begun_on_two"
    assert len(list((run / "parts").glob("rank_*.jsonl"))) == 2
    run_stage("generate", run, *given)
    assert_same_responses(run, alone)
