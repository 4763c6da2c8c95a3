"""Checkpoints that are written while the stage trains on."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers.saving import hold_writes
from helpers.stages import run_stage, tiny_task, trainer_of, written

from prism_nemo.experiment import Experiment
from prism_nemo.stages.loop import EXIT_INTERRUPTED, StageLoop

RUN = ("trainer.max_steps=5", "trainer.save_interval=2", "trainer.keep_last_k=9")


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    return hold_writes(monkeypatch)


def steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("step_*"))


def test_they_are_what_is_written_by_a_run_that_waits(
    tmp_path: Path, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file, to the last bit, although the first is not written before the third step is done."""
    end_step = StageLoop.end_step

    def release(self: StageLoop, *arguments: Any) -> None:
        assert held.is_set() or steps(tmp_path / "meanwhile") == []
        if self.done == 2:
            held.set()
        end_step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StageLoop, "end_step", release)
        meanwhile = run_stage("align", tmp_path / "meanwhile", *RUN)
    waiting = run_stage("align", tmp_path / "waiting", *RUN, "trainer.async_save=false")
    assert written(meanwhile) == written(waiting)
    assert steps(meanwhile) == steps(waiting) == [f"step_{step:08d}" for step in (2, 4, 5)]
    for name in steps(waiting):
        for model in ("policy", "discriminator"):
            found, expected = (hashes(run / "checkpoints" / name / model) for run in (meanwhile, waiting))
            assert found == expected
            assert sum(file.endswith(".distcp") for file in expected) == 2


def hashes(folder: Path) -> dict[str, Any]:
    """Of every file but the description, which names the folder."""
    manifest = json.loads((folder / "manifest.json").read_text())
    return {name: entry for name, entry in manifest.items() if name != ".metadata"}


def test_a_signal_waits_for_what_is_being_saved(tmp_path: Path, held: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes during the validation behind the step. The run says that it was interrupted once the step is safe."""
    run = tmp_path / "run"
    interrupt = Experiment.interrupt

    def look_and_interrupt(self: Experiment) -> None:
        assert (run / "checkpoints" / "latest").read_text() == "step_00000002"
        interrupt(self)

    monkeypatch.setattr(Experiment, "interrupt", look_and_interrupt)
    task = tiny_task()
    with (
        pytest.raises(SystemExit) as caught,
        trainer_of("sft", run, *RUN, "trainer.val_check_interval=2", f"data.validation={task.data.test}") as trainer,
    ):

        def be_told_to_stop() -> dict[str, float]:
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Timer(0.5, held.set).start()
            return {"loss": 1.0}

        trainer.run_validation = be_told_to_stop
        trainer.fit()
    assert caught.value.code == EXIT_INTERRUPTED
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"


def test_an_error_does_not_take_a_step_away_that_is_being_saved(tmp_path: Path, held: threading.Event) -> None:
    run = tmp_path / "run"
    task = tiny_task()
    with (
        pytest.raises(ZeroDivisionError),
        trainer_of("sft", run, *RUN, "trainer.val_check_interval=2", f"data.validation={task.data.test}") as trainer,
    ):

        def fail() -> dict[str, float]:
            assert steps(run) == []
            threading.Timer(0.5, held.set).start()
            raise ZeroDivisionError

        trainer.run_validation = fail
        trainer.fit()
    assert steps(run) == ["step_00000002"]
    assert (run / "checkpoints" / "latest").read_text() == "step_00000002"
    assert json.loads((run / "status.json").read_text())["state"] == "failed"
