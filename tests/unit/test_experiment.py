"""The run directory: what is written, what is refused, and that resuming leaves the files of an unbroken run."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import prism_nemo
from prism_nemo import progress
from prism_nemo.errors import PrismError
from prism_nemo.experiment import Experiment, read_metrics
from prism_nemo.run_directory import config_differences, describe_environment, read_json_lines

CONFIG = {
    "optimizer": {"lr": 1e-3},
    "trainer": {"max_steps": 4},
    "experiment": {"dir": "a", "resume": True},
    "stages": [{"name": "x"}],
}


def config_with(**changes: Any) -> str:
    flat = {key.replace("__", "."): value for key, value in changes.items()}
    config = json.loads(json.dumps(CONFIG))
    for key, value in flat.items():
        section, name = key.split(".")
        config[section][name] = value
    return yaml.safe_dump(config)


def experiment(directory: Path, **changes: Any) -> Experiment:
    settings = {
        "stage": "sft",
        "config_yaml": config_with(),
        "resume": True,
        "overwrite": False,
        "is_main": True,
        "tensorboard": False,
        "nemo_exp_manager": None,
        "progress": False,
    }
    return Experiment(directory, **{**settings, **changes})


def status(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "status.json").read_text())


def train(directory: Path, start: int, stop: int, **changes: Any) -> Experiment:
    run = experiment(directory, **changes)
    run.rewind(start)
    for step in range(start + 1, stop + 1):
        run.log_metrics(step, {"loss": 1 / (3 * step), "time/step": float(os.getpid() + step)})
        run.log_samples(step, [{"text": f"s{step}\u2028", "score": step / 7}])
    return run


def test_a_new_run_says_what_it_is(tmp_path: Path) -> None:
    with experiment(tmp_path / "runs" / "a") as run:
        run.log_metrics(3, {"loss": 0.5})
        assert status(run.directory)["state"] == "running"
    written = status(run.directory)
    assert (written["state"], written["stage"], written["step"], written["sessions"]) == ("finished", "sft", 3, 1)
    assert 0 <= written["seconds"] < 5
    assert yaml.safe_load((run.directory / "config.yaml").read_text()) == CONFIG
    environment = json.loads((run.directory / "environment.json").read_text())
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["packages"]["megatron-core"] == "0.16.1"
    assert {"hostname", "command", "git_commit"} <= environment.keys()
    assert environment["git_commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", environment["git_commit"])


def test_a_job_is_told_where_the_run_is_and_tells_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where git finds none, as in a container that has no git, or does not trust the checkout."""
    monkeypatch.setenv("PRISM_NEMO_DIRECTORY_FILE", str(tmp_path / "told"))
    monkeypatch.setenv("PRISM_NEMO_COMMIT", "b" * 40)
    monkeypatch.setattr("prism_nemo.run_directory._git_commit", lambda: None)
    monkeypatch.chdir(tmp_path)
    with experiment(Path("a")):
        pass
    assert (tmp_path / "told").read_text() == f"{tmp_path / 'a'}\n"
    assert json.loads(Path("a/environment.json").read_text())["git_commit"] == "b" * 40


def test_an_installed_package_of_an_image_tells_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prism_nemo, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.delenv("PRISM_NEMO_COMMIT", raising=False)
    for told, commit in ((None, None), ("unknown", None), ("a" * 40, "a" * 40)):
        if told is not None:
            (tmp_path / "REVISION").write_text(f"{told}\n")
        assert describe_environment()["git_commit"] == commit


def test_metrics_keep_every_digit_and_what_is_not_finite(tmp_path: Path) -> None:
    values = {"a": 0.1 + 0.2, "b": 1e-310, "c": math.nan, "d": math.inf, "e": -math.inf, "n": 2**60 + 1}
    with experiment(tmp_path) as run:
        run.log_metrics(1, values)
        run.log_metrics(1, {"accuracy": 1 / 3}, prefix="validation")
    first, second = read_metrics(tmp_path)
    assert repr({name: first[name] for name in values}) == repr(values)
    assert (first["step"], first["prefix"]) == (1, "train")
    assert second == {"step": 1, "prefix": "validation", "accuracy": 1 / 3, "time/run_seconds": second["time/run_seconds"]}
    raw = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0], parse_constant=lambda name: pytest.fail(name))
    assert (raw["c"], raw["d"], raw["e"]) == ("nan", "inf", "-inf")


def test_tensors_and_numpy_numbers_are_metrics_too(tmp_path: Path) -> None:
    import numpy as np
    import torch

    with experiment(tmp_path) as run:
        run.log_metrics(1, {"t": torch.tensor(0.1), "n": np.float32(0.1), "i": np.int64(3)})
    (row,) = read_metrics(tmp_path, times=False)
    assert row == {"step": 1, "prefix": "train", "t": 0.10000000149011612, "n": 0.10000000149011612, "i": 3.0}


@pytest.mark.parametrize("checkpoint", [0, 2])
def test_a_run_killed_behind_its_checkpoint_and_resumed_has_the_files_of_an_unbroken_one(tmp_path: Path, checkpoint: int) -> None:
    train(tmp_path / "whole", 0, 5).finish()
    train(tmp_path / "broken", 0, 3).interrupt()
    with (tmp_path / "broken" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "prefix": "tr')  # killed in the middle of a write
    train(tmp_path / "broken", checkpoint, 5).finish()

    assert read_metrics(tmp_path / "broken", times=False) == read_metrics(tmp_path / "whole", times=False)
    assert [row["loss"] for row in read_metrics(tmp_path / "broken")] == [1 / (3 * step) for step in range(1, 6)]
    assert (tmp_path / "broken" / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()
    assert status(tmp_path / "broken")["sessions"] == 2


def test_an_unfinished_line_is_cut_even_without_a_rewind(tmp_path: Path) -> None:
    train(tmp_path, 0, 1).interrupt()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "pre')
    with experiment(tmp_path) as run:
        run.log_metrics(2, {"loss": 0.25})
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_seconds_add_up_over_sessions(tmp_path: Path) -> None:
    train(tmp_path, 0, 1).interrupt()
    changed = status(tmp_path) | {"seconds": 100.0}
    (tmp_path / "status.json").write_text(json.dumps(changed))
    train(tmp_path, 1, 2).finish()
    after = status(tmp_path)
    assert 100.0 <= after["seconds"] < 105 and after["started"] == changed["started"]
    assert read_metrics(tmp_path)[-1]["time/run_seconds"] >= 100.0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"resume": False}, "already holds a run"),
        ({"stage": "align"}, "stage: sft -> align"),
        ({"config_yaml": config_with(optimizer__lr=2e-3)}, r"optimizer.lr: 0.001 -> 0.002\n"),
        ({"config_yaml": config_with(optimizer__min_lr=0.0)}, "optimizer.min_lr: absent -> 0.0"),
    ],
)
def test_a_directory_with_another_run_is_refused_and_left_as_it_was(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    train(tmp_path, 0, 2).finish()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"}
    with pytest.raises(PrismError, match=says) as error:
        experiment(tmp_path, **changes)
    assert error.value.remedy and "experiment.overwrite=true" in error.value.remedy
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != ".lock"} == before
    experiment(tmp_path).finish()  # the refusal left no lock behind


def test_what_may_differ_does_and_the_earlier_configuration_is_kept(tmp_path: Path) -> None:
    train(tmp_path, 0, 2).finish()
    longer = config_with(trainer__max_steps=8, experiment__dir="b")
    train(tmp_path, 2, 3, config_yaml=longer).finish()
    assert (tmp_path / "config.yaml").read_text() == longer
    assert (tmp_path / "config.1.yaml").read_text() == config_with()
    assert not (tmp_path / "config.2.yaml").exists()


def test_differences_reach_into_lists() -> None:
    assert config_differences("s: [{a: 1}, {a: 2}]\nt: []", "s: [{a: 1}, {a: 3}]\nt: [4]") == [
        "s.1.a: 2 -> 3",
        "t: [] -> absent",
        "t.0: absent -> 4",
    ]


def test_overwrite_moves_the_old_run_aside(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    for steps in (1, 2, 3):
        train(directory, 0, steps, overwrite=True).finish()
    assert [len(read_metrics(tmp_path / name)) for name in ("run", "run.old-1", "run.old-2")] == [3, 1, 2]
    assert status(directory)["sessions"] == 1


@pytest.mark.parametrize("overwrite", [False, True])
def test_files_that_are_no_run_are_never_touched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    with pytest.raises(PrismError, match=r"holds config.yaml, which no run"):
        experiment(tmp_path, overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert (tmp_path / "config.yaml").read_text() == "mine: 1\n"


def test_a_file_in_place_of_the_directory_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(PrismError, match="cannot make the run directory") as error:
        experiment(tmp_path / "run")
    assert error.value.where == str(tmp_path / "run")


def test_a_second_live_process_is_kept_out_and_a_dead_one_is_not_in_the_way(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from prism_nemo.experiment import Experiment
        run = Experiment(Path(sys.argv[1]), stage="sft", config_yaml=sys.argv[2], resume=True, overwrite=False, is_main=True,
                         tensorboard=False, nemo_exp_manager=None, progress=False)
        run.log_metrics(1, {"loss": 1.0})
        print("ready", flush=True)
        sys.stdin.read()
        """
    )
    command = [sys.executable, "-c", program, str(tmp_path), config_with()]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "ready\n"
        for overwrite in (False, True):
            with pytest.raises(PrismError, match=rf"another process is writing this run: pid {other.pid} on "):
                experiment(tmp_path, overwrite=overwrite)
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert status(tmp_path)["state"] == "running"  # it had no time to say otherwise
    with experiment(tmp_path):
        pass
    assert status(tmp_path) | {"state": "finished", "sessions": 2} == status(tmp_path)
    (notice,) = status(tmp_path)["notices"]
    assert f"the session before died (pid {other.pid} on " in notice


@pytest.mark.parametrize(
    ("error", "state"),
    [(ValueError("bad loss"), "failed"), (KeyboardInterrupt(), "interrupted"), (SystemExit(0), "interrupted")],
)
def test_the_end_of_the_block_says_how_the_run_ended(tmp_path: Path, error: BaseException, state: str) -> None:
    with pytest.raises(type(error)), experiment(tmp_path) as run:
        run.log_metrics(7, {"loss": 1.0})
        raise error
    written = status(tmp_path)
    assert (written["state"], written["step"]) == (state, 7)
    assert written.get("error") == ("ValueError: bad loss" if state == "failed" else None)


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with experiment(tmp_path / "run", is_main=False, tensorboard=True, progress=True) as run:
        run.rewind(0)
        run.log_metrics(1, {"loss": 1.0})
        run.log_samples(1, [{"text": "x"}])
        run.record_bad_samples([{"id": "a"}])
        assert list(run.progress_steps(1, 4, "sft")) == [1, 2, 3]
    assert list(tmp_path.iterdir()) == []


def test_bad_samples_are_listed_once(tmp_path: Path) -> None:
    rows = [{"id": "a", "reason": "no such file\u2028"}, {"id": "b", "reason": "prompt too long"}]
    for new in (rows[:1], rows):
        with experiment(tmp_path) as run:
            run.record_bad_samples(new)
    assert list(read_json_lines(tmp_path / "bad_samples.jsonl")) == rows


def scalars(directory: Path, tag: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(directory / "tb"))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_tensorboard_reads_the_scalars_and_drops_what_was_rewound(tmp_path: Path) -> None:
    train(tmp_path, 0, 4, tensorboard=True).interrupt()
    assert scalars(tmp_path, "train/loss") == [(step, pytest.approx(1 / (3 * step))) for step in (1, 2, 3, 4)]
    run = experiment(tmp_path, tensorboard=True)
    run.rewind(2)
    run.log_metrics(3, {"loss": 9.0})
    run.finish()
    assert [value for _, value in scalars(tmp_path, "train/loss")] == [pytest.approx(1 / 3), pytest.approx(1 / 6), 9.0]


def test_without_a_terminal_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 4))  # a step takes 4 seconds
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    bar = progress.StepProgress(2, 8, "align", enabled=True)
    for step in bar:
        bar.update(**{"loss": step / 8, "accuracy/perception": 0.123456})
    assert capsys.readouterr().out.splitlines() == [
        "align  5/8  loss 0.5  accuracy/perception 0.1235  4 s/step  0:12 left",
        "align  8/8  loss 0.875  accuracy/perception 0.1235  0:24 in all",
    ]


def test_on_a_terminal_progress_is_a_bar() -> None:
    import pty

    program = textwrap.dedent(
        """
        from prism_nemo.progress import StepProgress
        bar = StepProgress(0, 3, "warmup", enabled=True)
        for step in bar:
            bar.update(loss=0.25)
        """
    )
    main, terminal = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", program], stdout=terminal, check=True, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    )
    os.close(terminal)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", os.read(main, 65536).decode())
    assert "warmup" in shown and "3/3" in shown and "loss 0.25" in shown
    os.close(main)


def test_the_module_is_light() -> None:
    program = (
        "import prism_nemo.experiment, sys; print([m for m in ('torch', 'tensorboard', 'rich', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_reading_the_metrics_of_no_run_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match="no metrics here") as error:
        read_metrics(tmp_path)
    assert error.value.where == str(tmp_path / "metrics.jsonl")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(PrismError, match="not a line of JSON") as error:
        read_metrics(tmp_path)
    assert error.value.where == f"{tmp_path / 'metrics.jsonl'}, line 2"
