"""Runs that sample, stopped in their midst: by a signal behind a batch that is on the disk, on one rank or on one of two."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import run_ranks
from helpers.stages import run_configured, run_stage, settings

from prism_nemo.config.compose import load_config
from prism_nemo.config.enums import Device
from prism_nemo.config.schema import ParallelConfig, RuntimeConfig
from prism_nemo.engine.runtime import session
from prism_nemo.stages.parts import PartFiles


def signal_behind_batch(monkeypatch: pytest.MonkeyPatch, number: int, sent: signal.Signals = signal.SIGTERM) -> None:
    """This process gets the signal as soon as its batch of that number, from 1, is in its parts."""
    append = PartFiles.append
    count = []

    def append_and_signal(self: PartFiles, rows: Any) -> None:
        append(self, rows)
        count.append(len(rows))
        if len(count) == number:
            os.kill(os.getpid(), sent)

    monkeypatch.setattr(PartFiles, "append", append_and_signal)


def _on_this_rank(stage: str, jobs: dict[str, list[str]]) -> dict[str, str]:
    ends = {}
    with session(ParallelConfig(), RuntimeConfig(device=Device.cpu)) as runtime:
        for name, values in jobs.items():
            with pytest.MonkeyPatch.context() as patch:
                if name == "begun_on_two" and runtime.rank == 1:
                    signal_behind_batch(patch, 2)
                try:
                    config: Any = load_config(stage, values)
                    run_configured(stage, config)
                    ends[name] = "finished"
                except SystemExit as error:
                    ends[name] = f"status {error.code}"
    return ends


def run_on_two_ranks(stage: str, folder: Path, *given: str, stopped_behind: int) -> list[dict[str, str]]:
    """How each of these ended, on each rank.

    two           on two data-parallel ranks
    tp            on two ranks that hold one model
    begun_on_one  that one rank alone has begun, until behind `stopped_behind` batches
    begun_on_two  of which one rank was told to stop behind its second batch
    """
    with pytest.MonkeyPatch.context() as patch:
        signal_behind_batch(patch, stopped_behind)
        with pytest.raises(SystemExit):
            run_stage(stage, folder / "begun_on_one", *given)
    jobs = {name: settings(stage, folder / name, *given) for name in ("two", "begun_on_one", "begun_on_two")}
    jobs["tp"] = settings(stage, folder / "tp", *given, "parallel.tensor_model_parallel_size=2")
    return run_ranks(_on_this_rank, 2, stage, jobs)
