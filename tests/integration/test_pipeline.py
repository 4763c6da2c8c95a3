"""The pipeline in miniature: arms chained by references, one summary, an exported model, and going on after an interruption."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from helpers.stages import runtime_of_this_process, settings, tiny_task, trained_policy

from prism_nemo.cli import main
from prism_nemo.config.compose import load_config
from prism_nemo.config.schema import PipelineConfig
from prism_nemo.errors import ConfigError
from prism_nemo.run_lock import RunLock
from prism_nemo.stages.loop import StageLoop
from prism_nemo.stages.pipeline import _prepare

NOT_OURS = ("experiment.dir", "model.path", "discriminator.path", "data.train", "data.image_root")


def stage(name: str, kind: str, *overrides: str) -> dict[str, Any]:
    """A stage with the tiny task's settings, its inputs given here."""
    own = [text for text in settings(kind, Path("unused")) if text.partition("=")[0] not in NOT_OURS]
    return {"name": name, "stage": kind, "overrides": [*own, *overrides]}


def evaluation(arm: str) -> dict[str, Any]:
    return stage(f"eval_{arm}", "eval", f"model.path=${{policy:{arm}}}")


def pipeline(directory: Path) -> dict[str, Any]:
    """SFT for real, so that there are pairs; the rest one or two steps."""
    data = tiny_task().data
    prompts = f"data.train={data.prompts}"
    return {
        "seed": 3,
        "experiment": {"dir": str(directory), "progress": False, "tensorboard": False},
        "export": "rlvr",
        "stages": [
            stage("sft", "sft", f"model.path={trained_policy()}", f"data.train={data.public}", "trainer.max_steps=2"),
            stage("pairs", "pairs", "model.path=${policy:sft}", f"data.train={data.teacher}"),
            stage(
                "warmup",
                "warmup",
                "discriminator.path=${policy:sft}",
                "data.train=${pairs:pairs}",
                f"data.image_root={data.root}",
                "trainer.max_steps=1",
            ),
            stage(
                "align",
                "align",
                "model.path=${policy:sft}",
                "discriminator.path=${discriminator:warmup}",
                f"data.train={data.teacher}",
                "trainer.max_steps=2",
            ),
            stage("rlvr", "rlvr", "model.path=${policy:align}", prompts, "trainer.max_steps=2"),
            stage("sft_rlvr", "rlvr", "model.path=${policy:sft}", prompts, "trainer.max_steps=1"),
            *(evaluation(arm) for arm in ("sft", "align", "rlvr", "sft_rlvr")),
        ],
    }


def run(directory: Path, *overrides: str, change: Callable[[dict[str, Any]], None] = lambda config: None) -> int:
    runtime_of_this_process()
    config = pipeline(directory)
    change(config)
    file = directory.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config))
    return main(["pipeline", "--config", str(file), *overrides])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pipeline") / "run"
    assert run(directory) == 0
    return directory


def test_the_summary_has_every_arm(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    for arm, steps in {"sft": 2, "align": 2, "rlvr": 2, "sft_rlvr": 1}.items():
        of_arm = summary[arm]
        for measured in (of_arm, of_arm["greedy"]):
            assert all(0 <= measured[name] <= 1 for name in ("accuracy", "caption_accuracy", "format_rate"))
        assert of_arm["steps"] == steps
        assert of_arm["seconds"] > 0
        assert json.loads((finished / f"eval_{arm}" / "evaluation.json").read_text()).items() <= of_arm.items()
    assert summary["seed"] == 3
    assert summary["steps"] == 2 + 1 + 2 + 2 + 1
    assert summary["seconds"] > 0
    for name in ("warmup", "align"):
        health = summary["discriminator"][name]
        assert {
            "perception/accuracy",
            "reasoning/accuracy",
            "perception/content_probe",
            "reasoning/content_probe",
        } <= health.keys()
        assert any(key.startswith("expert_load/perception/") for key in health)


def test_stages_start_from_what_their_references_name(finished: Path) -> None:
    paths = {path.parent.name: yaml.safe_load(path.read_text()) for path in finished.glob("*/config.yaml")}
    assert paths["rlvr"]["model"]["path"] == str(finished / "align")
    assert paths["sft_rlvr"]["model"]["path"] == str(finished / "sft")
    assert paths["warmup"]["data"]["train"] == str(finished / "pairs" / "pairs.jsonl")
    assert paths["align"]["discriminator"]["path"] == str(finished / "warmup")
    assert {config["runtime"]["seed"] for config in paths.values()} == {3}


def test_the_exported_model_is_the_named_stages(finished: Path) -> None:
    hf = transformers.Qwen3VLForConditionalGeneration.from_pretrained(finished / "hf")
    assert sum(parameter.numel() for parameter in hf.parameters()) > 50_000


def test_finished_stages_are_not_run_again(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*/metrics.jsonl")}
    assert len(before) == 10
    capsys.readouterr()
    assert run(finished) == 0
    assert capsys.readouterr().out.count("finished already") == 10
    assert {path: path.stat().st_mtime_ns for path in finished.glob("*/metrics.jsonl")} == before


def signal_in_step(monkeypatch: pytest.MonkeyPatch, stage: str, number: int) -> None:
    """This process gets a real signal in that step (from 1) of the stage's session."""
    end_step = StageLoop.end_step
    ended: list[str] = []

    def end_and_signal(self: StageLoop, *arguments: Any) -> None:
        ended.extend([stage] * (self.directory.name == stage))
        if self.directory.name == stage and len(ended) == number:
            signal.raise_signal(signal.SIGUSR1)
        end_step(self, *arguments)

    monkeypatch.setattr(StageLoop, "end_step", end_and_signal)


def test_an_interrupted_pipeline_goes_on_where_it_stopped(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the alignment's first step, and in the last one of a stage that has then nothing more to do.

    What follows has the numbers of a pipeline that nobody stopped.
    """
    directory = tmp_path / "run"
    handler = signal.getsignal(signal.SIGUSR1)
    for stopped, step, next_stage, state in (("align", 1, "rlvr", "interrupted"), ("rlvr", 2, "sft_rlvr", "finished")):
        with monkeypatch.context() as patch:
            signal_in_step(patch, stopped, step)
            with pytest.raises(SystemExit) as caught:
                run(directory)
        assert caught.value.code == 75
        assert json.loads((directory / stopped / "status.json").read_text())["state"] == state
        assert not (directory / next_stage).exists()
        assert not (directory / "summary.json").exists()
        assert signal.getsignal(signal.SIGUSR1) is handler
    assert run(directory) == 0
    assert json.loads((directory / "align" / "status.json").read_text())["sessions"] == 2
    assert json.loads((directory / "rlvr" / "status.json").read_text())["sessions"] == 1
    for arm in ("sft", "align", "rlvr", "sft_rlvr"):
        found, expected = (json.loads((path / f"eval_{arm}" / "evaluation.json").read_text()) for path in (directory, finished))
        assert found == expected


def change_setting(name: str, override: str) -> Callable[[dict[str, Any]], None]:
    def change(config: dict[str, Any]) -> None:
        (own,) = [own for own in config["stages"] if own["name"] == name]
        own["overrides"].append(override)

    return change


CHANGES = {
    "a_setting": ("sft", "optimizer.lr=0.5", ["optimizer.lr: 0.01 -> 0.5", "another experiment.dir"]),
    "more_steps": ("rlvr", "trainer.max_steps=3", ["finished after 2 steps", "now it has 3", "another experiment.dir"]),
    "of_an_evaluation": ("eval_rlvr", "also_greedy=false", ["also_greedy: True -> False"]),
}


@pytest.mark.parametrize("case", CHANGES)
def test_changed_settings_of_a_finished_stage_are_an_error(case: str, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, override, parts = CHANGES[case]
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and path.name != ".lock"}
    capsys.readouterr()
    assert run(finished, change=change_setting(name, override)) == 2
    error = capsys.readouterr().err
    assert [part for part in [*parts, str(finished / name)] if part not in error] == []
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file() and path.name != ".lock"} == before


def test_another_seed_is_an_error(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not old results under a new seed."""
    capsys.readouterr()
    assert run(finished, "seed=4") == 2
    assert "runtime.seed: 3 -> 4" in capsys.readouterr().err
    assert yaml.safe_load((finished / "pipeline.yaml").read_text())["seed"] == 3
    assert json.loads((finished / "summary.json").read_text())["seed"] == 3


def test_the_digits_of_another_seed_or_size_are_not_taken_for_these(tmp_path: Path) -> None:
    """Before any stage has run."""
    sizes = [f"digits.num_{name}=6" for name in ("public", "teacher", "prompts", "test")]

    def prepare(*overrides: str) -> None:
        stages = json.dumps([stage("sft", "sft", "model.path=m", "data.train=t.jsonl")])
        given = [f"experiment.dir={tmp_path / 'run'}", "digits.enabled=true", *sizes, f"stages={stages}", *overrides]
        config = load_config("pipeline", given)
        assert isinstance(config, PipelineConfig)
        _prepare(config, tmp_path / "run").release()

    prepare()
    before = (tmp_path / "run" / "data" / "test.jsonl").read_bytes()
    prepare()
    for override, difference in (("seed=7", "seed: 1234 -> 7"), ("digits.num_test=5", "digits.num_test: 6 -> 5")):
        with pytest.raises(ConfigError, match=difference):
            prepare(override)
    assert (tmp_path / "run" / "data" / "test.jsonl").read_bytes() == before


def test_a_file_in_place_of_the_directory_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").write_text("")
    assert run(tmp_path / "run") == 2
    assert "cannot make the run directory" in capsys.readouterr().err


def test_a_directory_that_is_in_use_is_left_alone(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By another pipeline, or by a run in one of its folders; overwriting would move it away under their feet."""
    directory = tmp_path / "run"
    shutil.copytree(finished, directory)
    for used in (directory, directory / "sft"):
        lock = RunLock(used)
        capsys.readouterr()
        assert run(directory, "experiment.overwrite=true") == 2
        assert "another process is writing this run" in capsys.readouterr().err
        lock.release()
    assert not list(tmp_path.glob("run.old*"))
    assert (directory / "summary.json").exists()


def test_a_directory_with_other_things_in_it_is_moved_aside_or_kept(finished: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(finished, directory)
    assert run(directory, "experiment.resume=false") == 2
    assert (directory / "summary.json").exists()
    assert not list(tmp_path.glob("run.old*"))
