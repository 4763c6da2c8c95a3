"""A run that was stopped, in whatever way, and resumed has an unbroken one's metrics, samples and weights, bit by bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.stages import run_stage, settings, tiny_task, trainer_of, written

from prism_nemo.convert.manifest import MANIFEST
from prism_nemo.errors import ConfigError
from prism_nemo.run_directory import LATEST
from prism_nemo.stages.loop import EXIT_INTERRUPTED, StageLoop

STAGES = ("sft", "warmup", "align", "rlvr")
STEPS = 5


def overrides(stage: str, *more: str) -> list[str]:
    """Five steps with a validation behind every second one. Dropout draws from torch's generator, which is resumed too."""
    task = tiny_task()
    values = [f"trainer.max_steps={STEPS}", "trainer.val_check_interval=2", f"data.validation={task.data.test}"]
    if stage == "warmup":
        values.append("discriminator.head_dropout=0.3")
    return [*values, *more]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@cache
def unbroken(stage: str, runs: Path) -> Path:
    """A run that nobody stopped, with all its checkpoints: behind steps 2, 4 and 5."""
    return run_stage(stage, runs / stage, *overrides(stage, "trainer.save_interval=2", "trainer.keep_last_k=9"))


@cache
def parameters(stage: str, run: Path) -> dict[str, torch.Tensor]:
    """The weights of every model that a finished run left, and Adam's state, as a trainer that resumes it has them."""
    state: dict[str, torch.Tensor] = {}
    with trainer_of(stage, run, *overrides(stage)) as trainer:
        trainer.loop.checkpoints.load(trainer.models)
        for model_name, model in trainer.models.items():
            for name, parameter in model.module.named_parameters():
                state[f"{model_name}/{name}"] = parameter.detach().clone()
                for part in model.optimizer.optimizer.chained_optimizers:
                    moments = part.optimizer.state[parameter]
                    state |= {f"{model_name}/{name}/{key}": torch.as_tensor(value) for key, value in moments.items()}
    return state


def assert_same_run(stage: str, run: Path, runs: Path) -> None:
    whole = unbroken(stage, runs)
    metrics, samples = written(run)
    expected_metrics, expected_samples = written(whole)
    assert metrics == expected_metrics
    assert samples == expected_samples
    assert (run / "checkpoints" / LATEST).read_text() == f"step_{STEPS:08d}"
    found, expected = parameters(stage, run), parameters(stage, whole)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def signal_in_step(monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    """This process gets a real signal while the given step (from 1) is running."""
    end_step = StageLoop.end_step
    ended = []

    def end_and_signal(self: StageLoop, *arguments: Any) -> None:
        ended.append(len(ended))
        if len(ended) == step:
            os.kill(os.getpid(), number)
        end_step(self, *arguments)

    monkeypatch.setattr(StageLoop, "end_step", end_and_signal)


@pytest.mark.parametrize("stage", STAGES)
def test_what_an_unbroken_run_writes(stage: str, runs: Path) -> None:
    """The other tests compare with it; this one sees that there is something to compare."""
    run = unbroken(stage, runs)
    metrics, samples = written(run)
    validated = sorted({row["step"] for row in metrics if row["prefix"] == "validation"})
    assert [row["step"] for row in metrics if row["prefix"] == "train"] == [1, 2, 3, 4, 5]
    assert validated == [2, 4, 5]
    assert len({row["loss"] for row in metrics if row["prefix"] == "train"}) == STEPS
    assert sorted({row["step"] for row in samples}) == ([1, 2, 3, 4, 5] if stage in ("align", "rlvr") else [])
    assert sorted(folder.name for folder in (run / "checkpoints").glob("step_*")) == [f"step_{n:08d}" for n in (2, 4, 5)]
    assert status(run)["state"] == "finished"
    state = parameters(stage, run)
    assert all(value == STEPS for name, value in state.items() if name.endswith("/step"))
    assert any(name.endswith("/exp_avg") for name in state)


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_twice_by_signals(stage: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the first step and behind the third, which is no multiple of any interval."""
    expected = unbroken(stage, runs)
    run = tmp_path / stage
    for stop, (already, number) in {1: (0, signal.SIGUSR1), 3: (1, signal.SIGTERM)}.items():
        handler = signal.getsignal(number)
        with monkeypatch.context() as patch:
            signal_in_step(patch, stop - already, number)
            with pytest.raises(SystemExit) as caught:
                run_stage(stage, run, *overrides(stage))
        assert caught.value.code == EXIT_INTERRUPTED == 75
        assert signal.getsignal(number) is handler
        assert status(run)["state"] == "interrupted"
        assert written(run)[0] == [row for row in written(expected)[0] if row["step"] <= stop]
    run_stage(stage, run, *overrides(stage))
    assert status(run)["sessions"] == 3
    assert_same_run(stage, run, runs)


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_where_a_validation_is_due(stage: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind step 2 and behind the last step: saved at once, and validated when the run goes on."""
    expected = written(unbroken(stage, runs))[0]
    run = tmp_path / stage
    for stop, already in {2: 0, STEPS: 2}.items():
        with monkeypatch.context() as patch:
            signal_in_step(patch, stop - already, signal.SIGTERM)
            with pytest.raises(SystemExit) as caught:
                run_stage(stage, run, *overrides(stage))
        assert caught.value.code == EXIT_INTERRUPTED
        assert status(run)["state"] == "interrupted"
        assert latest_step(run) == stop
        without = [row for row in expected if row["step"] < stop or (row["step"] == stop and row["prefix"] == "train")]
        assert written(run)[0] == without
    run_stage(stage, run, *overrides(stage))
    assert status(run)["state"] == "finished"
    assert_same_run(stage, run, runs)


@pytest.mark.parametrize("stage", STAGES)
def test_a_validation_that_fails_takes_no_step_away(
    stage: str, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one, when nothing has been saved before."""
    run = tmp_path / stage
    rest = overrides(stage, "trainer.val_check_interval=0")

    def fail(self: StageLoop, *arguments: Any) -> None:
        raise OSError("the disk with the images is gone")

    with monkeypatch.context() as patch:
        patch.setattr(StageLoop, "validate", fail)
        with pytest.raises(OSError, match="images"):
            run_stage(stage, run, *rest)
    assert status(run)["state"] == "failed"
    assert latest_step(run) == STEPS
    run_stage(stage, run, *rest)
    expected = [row for row in written(unbroken(stage, runs))[0] if row["prefix"] == "train" or row["step"] == STEPS]
    assert written(run)[0] == expected


def test_a_signal_during_a_validation(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No further step is done; what is not saved yet is."""
    run = tmp_path / "sft"
    validate = StageLoop.validate

    def validate_and_signal(self: StageLoop, *arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        validate(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(StageLoop, "validate", validate_and_signal)
        with pytest.raises(SystemExit) as caught:
            run_stage("sft", run, *overrides("sft"))
    assert caught.value.code == EXIT_INTERRUPTED
    assert latest_step(run) == 2
    assert written(run)[0] == [row for row in written(unbroken("sft", runs))[0] if row["step"] <= 2]
    run_stage("sft", run, *overrides("sft"))
    assert_same_run("sft", run, runs)


@pytest.mark.parametrize("stage", STAGES)
def test_killed_behind_its_last_checkpoint(stage: str, runs: Path, tmp_path: Path) -> None:
    """What `kill -9` in step 5 leaves: lines up to a torn one, and the checkpoint of step 2. Steps 3 and 4 are done again."""
    run = tmp_path / stage
    shutil.copytree(unbroken(stage, runs), run)
    for later in ("step_00000004", "step_00000005"):
        shutil.rmtree(run / "checkpoints" / later)
    (run / "checkpoints" / ".step_00000004.partial" / "policy").mkdir(parents=True)
    (run / "checkpoints" / LATEST).write_text("step_00000002")
    for name in ("metrics.jsonl", "samples.jsonl"):
        if (run / name).exists():
            lines = (run / name).read_text().splitlines(keepends=True)
            (run / name).write_text("".join(line for line in lines if json.loads(line)["step"] < STEPS) + '{"step": 5, "pre')
    (run / "status.json").write_text(json.dumps({**status(run), "state": "running", "step": 4}))
    run_stage(stage, run, *overrides(stage))
    assert_same_run(stage, run, runs)


def test_stopped_before_the_first_checkpoint_starts_anew(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "sft"
    shutil.copytree(unbroken("sft", runs), run)
    shutil.rmtree(run / "checkpoints")
    (run / "status.json").write_text(json.dumps({**status(run), "state": "running", "step": 1}))
    run_stage("sft", run, *overrides("sft"))
    assert_same_run("sft", run, runs)


def assert_goes_on_as_unbroken(
    stage: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str
) -> list[dict[str, Any]]:
    """Stopped in its first step and started again, the stage writes what it writes in one go: the metrics, which come back."""
    expected = written(run_stage(stage, folder / "unbroken", *overrides))
    with monkeypatch.context() as patch:
        signal_in_step(patch, 1, signal.SIGTERM)
        with pytest.raises(SystemExit):
            run_stage(stage, folder / "stopped", *overrides)
    assert written(run_stage(stage, folder / "stopped", *overrides)) == expected
    return expected[0]


def test_a_frozen_discriminator_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its optimizer has never taken a step; the checkpoint holds it all the same, so that it may thaw."""
    frozen = ("algorithm.discriminator_steps_frozen=true", "trainer.max_steps=3")
    assert_goes_on_as_unbroken("align", tmp_path, monkeypatch, *frozen)


def test_dynamic_sampling_goes_on_behind_the_prompts_that_it_has_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step draws as many prompts as it needs: how many, is in the checkpoint alone."""
    dapo = ("algorithm=dapo", "algorithm.overlong_buffer_length=8", "optimizer.lr_warmup_iters=0", "trainer.max_steps=3")
    metrics = assert_goes_on_as_unbroken("rlvr", tmp_path, monkeypatch, *dapo)
    assert max(row["dynamic_sampling/generation_batches"] for row in metrics) > 1


def test_a_finished_run_does_nothing_more(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "sft"
    shutil.copytree(unbroken("sft", runs), run)
    manifest = run / "checkpoints" / "step_00000005" / "policy" / MANIFEST
    before = written(run), manifest.stat().st_mtime_ns
    run_stage("sft", run, *overrides("sft"))
    assert (written(run), manifest.stat().st_mtime_ns) == before
    assert status(run)["state"] == "finished"


def test_a_longer_run_goes_on_from_the_end(runs: Path, tmp_path: Path) -> None:
    """With a constant rate, `max_steps` changes nothing but the end."""
    short, long = tmp_path / "short", tmp_path / "long"
    run_stage("sft", short, "trainer.max_steps=2")
    run_stage("sft", short, "trainer.max_steps=4")
    run_stage("sft", long, "trainer.max_steps=4")
    assert written(short) == written(long)


# Real processes


def start(run: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "prism_nemo", "align", *settings("align", run, *more)]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while not (run / "metrics.jsonl").exists() or max((row["step"] for row in written(run)[0]), default=0) < step:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, f"no step {step} in time"
        time.sleep(0.02)


def latest_step(run: Path) -> int:
    return int((run / "checkpoints" / LATEST).read_text().removeprefix("step_"))


def test_processes_that_are_signalled_and_killed(tmp_path: Path) -> None:
    """SIGUSR1: saved, status 75; the same command goes on. SIGKILL: it rewinds, and ends as if nothing had been."""
    many = "trainer.max_steps=12"
    expected = run_stage("align", tmp_path / "unbroken", many)
    run = tmp_path / "run"

    first = start(run, many)
    wait_for_step(first, run, 2)
    first.send_signal(signal.SIGUSR1)
    assert first.wait(120) == EXIT_INTERRUPTED, first.communicate()[1]
    stopped = latest_step(run)
    assert 2 <= stopped <= 8
    assert status(run)["state"] == "interrupted"
    assert max(row["step"] for row in written(run)[0]) == stopped

    second = start(run, many)
    wait_for_step(second, run, stopped + 2)
    second.kill()
    assert second.wait(120) == -signal.SIGKILL
    assert latest_step(run) == stopped
    assert status(run)["state"] == "running"

    run_stage("align", run, many)
    assert status(run)["sessions"] == 3
    assert written(run) == written(expected)


@pytest.mark.parametrize(
    ("override", "key"),
    [("optimizer.lr=0.5", r"optimizer\.lr"), ("parallel.use_distributed_optimizer=true", r"parallel\.use_distributed_optimizer")],
)
def test_another_configuration_is_another_run(override: str, key: str, runs: Path, tmp_path: Path) -> None:
    """To resume with a changed setting would continue no run; nothing is touched. A spread optimizer's state has another form."""
    run = tmp_path / "rlvr"
    shutil.copytree(unbroken("rlvr", runs), run)
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    with pytest.raises(ConfigError, match=key):
        run_stage("rlvr", run, *overrides("rlvr", override))
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before
