"""Mistakes in the input: one clear error each, status 2, no traceback, and nothing of an earlier run overwritten."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.stages import run_stage, runtime_of_this_process, settings, tiny_task, trained_discriminator, trained_policy, written

from prism_nemo.cli import main
from prism_nemo.run_directory import read_json_lines


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, where a mistaken command would write."""
    return run_stage("sft", tmp_path_factory.mktemp("earlier") / "run", "trainer.max_steps=1")


@pytest.fixture
def run(earlier: Path, tmp_path: Path) -> Path:
    shutil.copytree(earlier, tmp_path / "run")
    return tmp_path / "run"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def arguments(stage: str, run: Path, *overrides: str) -> list[str]:
    return [stage, *settings(stage, run, "trainer.max_steps=1", *overrides)]


def assert_one_error(text: str, *parts: str) -> None:
    """One message of what, where and remedy, and nothing else."""
    assert "Traceback" not in text
    assert text.count("prism-nemo: ") == 1
    assert "\n  remedy: " in text
    missing = [part for part in parts if part not in text]
    assert not missing, text


# Nothing needs to be loaded: real processes


CHEAP = {
    "unknown_key": (["trainer.max_step=3"], ["trainer.max_step", "trainer.max_steps"]),
    "wrong_type": (["trainer.max_steps=many"], ["trainer.max_steps", "many", "int"]),
    "missing_model": (["model.path=/no/model"], ["model.path", "/no/model"]),
    "missing_data": (["data.train=/no/data.jsonl"], ["data.train", "/no/data.jsonl"]),
    "tp_and_kv_heads": (["parallel.tensor_model_parallel_size=4"], ["key/value heads", "parallel.tensor_model_parallel_size"]),
}


@pytest.mark.parametrize("case", CHEAP)
def test_a_mistake_in_the_settings_costs_no_time_and_touches_nothing(case: str, run: Path, tmp_path: Path) -> None:
    overrides, parts = CHEAP[case]
    before, listing = contents(run), sorted(tmp_path.iterdir())
    environment = {**os.environ, "WORLD_SIZE": "4"} if case == "tp_and_kv_heads" else dict(os.environ)
    for directory in (run, tmp_path / "new"):
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "prism_nemo", *arguments("sft", directory, *overrides)],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 2
        assert done.stdout == ""
        assert_one_error(done.stderr, *parts)
        assert now.ru_utime - used.ru_utime < 1.5, "seconds of CPU"
    assert contents(run) == before
    assert sorted(tmp_path.iterdir()) == listing


# What the stage finds as it runs: the command in this process, so that torch is not loaded each time


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(tiny_task().data.root, tmp_path / "data")
    yield tmp_path / "data"


def fails(capsys: pytest.CaptureFixture[str], command: list[str], *parts: str) -> None:
    runtime_of_this_process()
    capsys.readouterr()
    assert main(command) == 2
    assert_one_error(capsys.readouterr().err, *parts)


def corrupt(data: Path, name: str, keep: int = 60) -> str:
    """Cuts the picture of a file's first record; returns the record's id."""
    record = json.loads((data / name).read_text().splitlines()[0])
    image = data / record["images"][0]
    image.write_bytes(image.read_bytes()[:keep])
    return record["id"]


def test_a_corrupt_image_stops_an_evaluation_and_names_the_record(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = corrupt(data, "test.jsonl")
    command = ["eval", *settings("eval", tmp_path / "eval", f"data.validation={data / 'test.jsonl'}")]
    fails(capsys, command, f"record {name}", "images/test-00000.png")
    assert not (tmp_path / "eval" / "evaluation.json").exists()


def test_corrupt_images_stop_training_past_the_allowed_share(
    data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = corrupt(data, "public.jsonl")
    share = ["data.shuffle=false", "data.max_bad_sample_share=0"]
    before = contents(run)
    fails(
        capsys,
        arguments("sft", tmp_path / "new", f"data.train={data / 'public.jsonl'}", *share),
        name,
        "images/public-00000.png",
        "data.max_bad_sample_share",
    )
    assert not (tmp_path / "new" / "checkpoints").exists()
    assert not (tmp_path / "new" / "metrics.jsonl").exists()
    assert json.loads((tmp_path / "new" / "status.json").read_text())["state"] == "failed"
    assert contents(run) == before


def test_corrupt_images_within_the_share_are_skipped_and_listed(data: Path, tmp_path: Path) -> None:
    """One strip serves several questions, so several records go with it."""
    corrupt(data, "public.jsonl")
    image = "images/public-00000.png"
    affected = [json.loads(line)["id"] for line in (data / "public.jsonl").read_text().splitlines() if image in line]
    run = tmp_path / "run"
    run_stage(
        "sft",
        run,
        "trainer.max_steps=8",
        f"data.train={data / 'public.jsonl'}",
        "data.max_bad_sample_share=0.2",
        "data.shuffle=false",
    )
    assert len(written(run)[0]) == 8
    listed = list(read_json_lines(run / "bad_samples.jsonl"))
    assert sorted(row["id"] for row in listed) == sorted(affected)
    assert all("public-00000.png" in row["where"] for row in listed)


@pytest.mark.parametrize(
    ("stage", "limit", "part"),
    [
        ("sft", "data.max_prompt_length=8", "the limit is 8 (raise data.max_prompt_length"),
        ("sft", "data.max_response_length=8", "the limit is 8 (raise data.max_response_length"),
        ("align", "data.max_prompt_length=8", "raise data.max_prompt_length"),
        ("rlvr", "data.max_prompt_length=8", "the limit is 8 (raise data.max_prompt_length"),
    ],
)
def test_a_prompt_longer_than_the_limit(
    stage: str, limit: str, part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the first step; nothing is cut, and no step is done on nothing."""
    fails(capsys, arguments(stage, tmp_path / "run", limit), part)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


def truncate(run: Path, model: str) -> Path:
    """Takes the last byte off the largest file of the newest checkpoint."""
    folder = run / "checkpoints" / (run / "checkpoints" / "latest").read_text() / model
    path = max(folder.glob("*.distcp"), key=lambda file: file.stat().st_size)
    path.write_bytes(path.read_bytes()[:-1])
    return path


@pytest.mark.parametrize("model", ["policy", "discriminator"])
def test_a_truncated_checkpoint_to_start_from(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    shutil.copytree(trained_policy() if model == "policy" else trained_discriminator(), source)
    cut = truncate(source, model)
    key = "model.path" if model == "policy" else "discriminator.path"
    before = contents(source)
    fails(capsys, arguments("align", tmp_path / "run", f"{key}={source}"), "truncated", cut.name, str(cut.parent))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert contents(source) == before


def test_a_truncated_checkpoint_to_resume_from(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Metrics and checkpoints stay as they are; only the status says that this session failed."""
    cut = truncate(run, "policy")
    before = contents(run)
    command = ["sft", *settings("sft", run, "trainer.max_steps=3")]
    fails(capsys, command, "truncated", cut.name, "earlier checkpoint")
    after = contents(run)
    changed = {name for name in after if after[name] != before.get(name)}
    assert changed <= {"status.json", ".lock", "config.yaml", "config.1.yaml"}
    assert before.keys() <= after.keys()
    assert json.loads(after["status.json"])["state"] == "failed"


def test_a_truncated_checkpoint_to_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    shutil.copytree(trained_policy(), source)
    cut = truncate(source, "policy")
    fails(capsys, ["convert", "export", "--checkpoint", str(source), "--out", str(tmp_path / "hf")], "truncated", cut.name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_truncated_hub_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(tiny_task().model, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    fails(capsys, arguments("sft", tmp_path / "run", f"model.path={tmp_path / 'model'}"), "model.safetensors")
    fails(capsys, ["convert", "import", "--hf", str(tmp_path / "model"), "--out", str(tmp_path / "out")], "model.safetensors")
    assert not (tmp_path / "out").exists()


def test_targets_that_exist_are_left_alone(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    fails(capsys, ["convert", "export", "--checkpoint", str(trained_policy()), "--out", str(run)], str(run))
    fails(capsys, ["convert", "import", "--hf", str(tiny_task().model), "--out", str(run)], "exists", str(run))
    fails(capsys, arguments("rlvr", run), "another run", "stage: sft -> rlvr")
    fails(capsys, arguments("sft", run, "experiment.resume=false"), "already holds a run")
    assert contents(run) == before


def test_overwriting_moves_the_earlier_run_aside(run: Path, tmp_path: Path) -> None:
    before = contents(run)
    runtime_of_this_process()
    assert main(arguments("sft", run, "experiment.overwrite=true", "optimizer.lr=1e-3")) == 0
    assert contents(tmp_path / "run.old-1") == before
    assert len(written(run)[0]) == 1
