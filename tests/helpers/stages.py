"""The digits task in miniature: a few records, a model that learns the format in seconds, and whole stages on them.

Everything is made once a process, when it is first asked for, and lives as long as the process.
"""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers.rows import one_rank

from prism_nemo.config.compose import Config, load_config
from prism_nemo.convert.random_init import write_random_weights
from prism_nemo.data.digits import DigitsTask, write_digits_task
from prism_nemo.data.digits_model import write_model_files
from prism_nemo.engine.runtime import Runtime
from prism_nemo.experiment import read_metrics
from prism_nemo.rewards.grader import Grader
from prism_nemo.run_directory import read_json_lines
from prism_nemo.stages.align import AlignTrainer
from prism_nemo.stages.loop import StageLoop
from prism_nemo.stages.rlvr import RLVRTrainer
from prism_nemo.stages.sft import SFTTrainer
from prism_nemo.stages.warmup import WarmupTrainer

RECORDS = 64  # in each training file
HELD_OUT = 12
SFT_STEPS = 40  # after them three responses in four have the format, and few captions are right
MODULES = {"eval": "evaluate"}
TRAINERS = {"sft": SFTTrainer, "warmup": WarmupTrainer, "align": AlignTrainer, "rlvr": RLVRTrainer}


@dataclass(frozen=True, eq=False)
class TinyTask:
    """Records, and an untrained model of about 80,000 parameters in fp32."""

    data: DigitsTask
    model: Path
    keep: tempfile.TemporaryDirectory[str]


@cache
def tiny_task() -> TinyTask:
    keep = tempfile.TemporaryDirectory(prefix="tiny-digits-")
    root = Path(keep.name)
    data = write_digits_task(
        root / "data", seed=0, num_public=RECORDS, num_teacher=RECORDS, num_prompts=RECORDS, num_test=HELD_OUT
    )
    write_tiny_model(root / "model")
    return TinyTask(data, root / "model", keep)


def write_tiny_model(directory: Path, *, head_dim: int = 16) -> None:
    """The task's model, cut down. One deepstack feature, two key/value heads, tied. vLLM's CPU kernels want heads of 32."""
    directory.mkdir()
    write_model_files(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config["text_config"] |= {"head_dim": head_dim}
    config["text_config"]["rope_scaling"]["mrope_section"] = [head_dim // 4, head_dim // 8, head_dim // 8]
    config["vision_config"] |= {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    config["vision_config"] |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    path.write_text(json.dumps(config))
    write_random_weights(directory, seed=0)


# Settings


def settings(stage: str, directory: Path, *overrides: str) -> list[str]:
    """KEY=VALUE of a stage on the tiny task; later ones win. Policy and discriminator are the trained ones."""
    task = tiny_task()
    values = [
        f"experiment.dir={directory}",
        "experiment.progress=false",
        "experiment.tensorboard=false",
        "runtime.device=cpu",
        "data.system_prompt=<caption> <think> <answer>",
        "data.max_prompt_length=64",
        "data.max_response_length=32",
    ]
    if stage != "warmup":
        values += [f"model.path={task.model if stage == 'sft' else trained_policy()}", "model.precision=fp32"]
    if stage in ("sft", "warmup", "align", "rlvr"):
        values += ["trainer.max_tokens_per_row=512", "optimizer.lr_decay_style=cosine", "optimizer.lr_warmup_fraction=0"]
    if stage in ("warmup", "align"):
        values += [f"data.validation={task.data.test}", "discriminator.precision=fp32"]
    values += {
        "sft": [
            f"data.train={task.data.public}",
            f"trainer.max_steps={SFT_STEPS}",
            "trainer.global_batch_size=8",
            "optimizer.lr=1e-2",
            "optimizer.lr_decay_style=constant",
        ],
        "pairs": [f"data.train={task.data.teacher}", "limit_samples=24", "rollout.num_rollouts_per_prompt=2"],
        "warmup": [
            f"discriminator.path={trained_policy() if stage == 'warmup' else ''}",
            f"data.image_root={task.data.root}",
            "trainer.max_steps=6",
            "trainer.global_batch_size=4",
            "optimizer.lr=2e-3",
        ],
        "align": [
            f"data.train={task.data.teacher}",
            "trainer.max_steps=5",
            "trainer.global_batch_size=4",
            "rollout.num_rollouts_per_prompt=4",
            "optimizer.lr=1e-3",
            "discriminator_optimizer.lr=1e-3",
        ],
        "rlvr": [
            f"data.train={task.data.prompts}",
            "trainer.max_steps=5",
            "trainer.global_batch_size=4",
            "rollout.num_rollouts_per_prompt=4",
            "optimizer.lr=1e-3",
        ],
        "eval": [f"data.validation={task.data.test}"],
        "generate": [f"data.train={task.data.prompts}", "limit_samples=24", "rollout.num_rollouts_per_prompt=2"],
        "curate": [f"data.train={task.data.prompts}", "teacher.model=teacher", "teacher.backoff_seconds=0.01"],
    }[stage]
    if stage == "warmup":
        values.append(f"data.train={pairs_file()}")
    if stage == "align":
        values.append(f"discriminator.path={trained_discriminator()}")
    return [*values, *overrides]


def stage_config(stage: str, directory: Path, *overrides: str) -> Any:
    return load_config(stage, settings(stage, directory, *overrides))


# Whole stages, in this process


def run_stage(stage: str, directory: Path, *overrides: str) -> Path:
    """Runs a stage as its command would; returns the run directory. SystemExit when it was told to stop."""
    runtime_of_this_process()
    run_configured(stage, stage_config(stage, directory, *overrides))
    return directory


def run_configured(stage: str, config: Config) -> None:
    importlib.import_module(f"prism_nemo.stages.{MODULES.get(stage, stage)}").run(config)


def runtime_of_this_process() -> Runtime:
    """The groups are built once: every building of them costs threads and file descriptors for good."""
    return one_rank()


@contextmanager
def trainer_of(stage: str, directory: Path, *overrides: str) -> Iterator[Any]:
    """A stage's trainer, ready to be called piece by piece."""
    runtime = runtime_of_this_process()
    config = stage_config(stage, directory, *overrides)
    with ExitStack() as stack:
        graders = [stack.enter_context(Grader(config.reward))] if stage in ("align", "rlvr") else []
        loop = stack.enter_context(StageLoop(stage, config, runtime))
        yield TRAINERS[stage](config, runtime, loop, *graders)


@cache
def _runs() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="tiny-runs-")


def _runs_folder() -> Path:
    return Path(_runs().name)


@cache
def trained_policy() -> Path:
    """The run directory of SFT, with checkpoints of three steps."""
    every = SFT_STEPS // 4
    return run_stage("sft", _runs_folder() / "sft", f"trainer.save_interval={every}", "trainer.keep_last_k=4")


@cache
def pairs_file() -> Path:
    return run_stage("pairs", _runs_folder() / "pairs") / "pairs.jsonl"


@cache
def trained_discriminator() -> Path:
    return run_stage("warmup", _runs_folder() / "warmup")


# What a run has written


def written(directory: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Metrics without times, and samples, as they stand in the run directory."""
    samples = directory / "samples.jsonl"
    return read_metrics(directory, times=False), list(read_json_lines(samples)) if samples.exists() else []


def assert_same_metrics(found: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float) -> None:
    """The same lines with the same names, every number within the tolerance, relative and absolute."""
    assert [(row["step"], row["prefix"]) for row in found] == [(row["step"], row["prefix"]) for row in expected]
    for row, want in zip(found, expected, strict=True):
        assert row.keys() == want.keys()
        numbers = {name: value for name, value in want.items() if name != "prefix"}
        assert {name: row[name] for name in numbers} == pytest.approx(numbers, rel=tolerance, abs=tolerance), row["step"]
