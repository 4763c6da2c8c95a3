"""The pipeline in miniature: arms chained by references, one summary, an exported model, and going on after an interruption."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from helpers.stages import runtime_of_this_process, settings, tiny_task, trained_policy

from prism_nemo.cli import main
from prism_nemo.stages.loop import StageLoop

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


def run(directory: Path, *overrides: str) -> int:
    runtime_of_this_process()
    config = directory.with_suffix(".yaml")
    config.write_text(yaml.safe_dump(pipeline(directory)))
    return main(["pipeline", "--config", str(config), *overrides])


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


def test_an_interrupted_pipeline_goes_on_where_it_stopped(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal in the alignment's first step: what follows has the numbers of a pipeline that nobody stopped."""
    end_step = StageLoop.end_step

    def end_and_signal(self: StageLoop, *arguments: Any) -> None:
        if self.stage == "align":
            signal.raise_signal(signal.SIGUSR1)
        end_step(self, *arguments)

    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(StageLoop, "end_step", end_and_signal)
        with pytest.raises(SystemExit) as caught:
            run(directory)
    assert caught.value.code == 75
    assert not (directory / "rlvr").exists()
    assert not (directory / "summary.json").exists()
    assert run(directory) == 0
    assert json.loads((directory / "align" / "status.json").read_text())["sessions"] == 2
    for arm in ("sft", "align", "rlvr", "sft_rlvr"):
        found, expected = (json.loads((path / f"eval_{arm}" / "evaluation.json").read_text()) for path in (directory, finished))
        assert found == expected


def test_a_directory_with_other_things_in_it_is_moved_aside_or_kept(finished: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    shutil.copytree(finished, directory)
    assert run(directory, "experiment.resume=false") == 2
    assert (directory / "summary.json").exists()
    assert not list(tmp_path.glob("run.old*"))
