"""Several stages, one after another, each starting from what an earlier one made.

    prism-nemo pipeline demo=digits

Every stage has its own folder under the run directory and is a run like any other: an interrupted pipeline goes on where it
stopped, finished stages are not run again, and a stage whose settings have changed is an error. At the end summary.json compares
the arms, and one stage's policy is exported to hf/.
"""

from __future__ import annotations

import gc
import importlib
import json
import re
import resource
import shlex
import shutil
import time
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from prism_nemo.config.compose import Config, dump_config, load_config, stage_overrides
from prism_nemo.config.enums import StageKind
from prism_nemo.config.schema import ParallelConfig, PipelineConfig, PipelineStage, RuntimeConfig
from prism_nemo.config.validate import validate
from prism_nemo.engine.runtime import Runtime, session
from prism_nemo.errors import ConfigError, PrismError
from prism_nemo.experiment import read_metrics
from prism_nemo.run_directory import check_same_run, next_free, write_atomically
from prism_nemo.run_lock import LOCK, RunLock
from prism_nemo.stages.evaluate import RESULT as EVALUATION
from prism_nemo.stages.pairs import RESULT as PAIRS
from prism_nemo.stages.signals import EXIT_INTERRUPTED, StopSignals

SUMMARY = "summary.json"
PIPELINE = "pipeline.yaml"
EXPORTED = "hf"
EVAL_PREFIX = "eval_"  # a stage eval_NAME judges the arm NAME
_MODULES = {StageKind.eval: "prism_nemo.stages.evaluate"}
_REFERENCE = re.compile(r"\$\{(policy|discriminator|pairs):([^}]*)\}")


def run(config: PipelineConfig) -> None:
    """The `pipeline` command. Told to stop, it ends with status 75 behind what the running stage still has to save."""
    validate(config)
    directory = Path(config.experiment.dir)
    with (
        session(ParallelConfig(), RuntimeConfig(device=config.device)) as runtime,
        StopSignals() as signals,
        ExitStack() as stack,
    ):
        if runtime.is_main:
            stack.callback(_prepare(config, directory).release)
        runtime.barrier()
        for stage in config.stages:
            run_stage(config, stage, directory, runtime)
            if runtime.max_over_all(int(signals.received)) > 0:
                raise SystemExit(EXIT_INTERRUPTED)
        if runtime.is_main:
            _end(config, directory)


def write_jobs(config: PipelineConfig, file: Path) -> None:
    """The `pipeline` command with `--jobs`, for slurm/pipeline.sh: makes the run directory, runs nothing.

    Writes `file`, which bash reads: `directory`, and a function that calls `submit NAME STAGE "NAMES IT NEEDS" OVERRIDE...` for
    every stage that has not finished, in order.
    """
    validate(config)
    directory = Path(config.experiment.dir)
    _prepare(config, directory).release()
    lines = [f"directory={shlex.quote(str(directory))}", "stages() {", "    :"]
    for number, stage in enumerate(config.stages):
        if _has_finished(directory, stage):
            print(f"{stage.name}: finished already", flush=True)
            continue
        overrides = [_resolve(text, directory) for text in stage_overrides(config, stage)]
        needed = [earlier.name for earlier in config.stages[:number] if _names(overrides, directory / earlier.name)]
        lines.append("    " + shlex.join(["submit", stage.name, str(stage.stage), " ".join(needed), *overrides]))
    write_atomically(file, "\n".join([*lines, "}"]) + "\n")


def end(config: PipelineConfig) -> None:
    """The `pipeline` command with `--end`: export, summary and report of stages that ran as jobs of their own."""
    validate(config)
    directory = Path(config.experiment.dir)
    missing = [stage.name for stage in config.stages if not _has_finished(directory, stage)]
    if missing:
        raise PrismError(
            f"not finished: {', '.join(missing)}", where=str(directory), remedy="the same command without --end runs them"
        )
    lock = RunLock(directory)
    _end(config, directory)
    lock.release()


def _names(overrides: list[str], folder: Path) -> bool:
    """Whether one of these has the folder, or what is in it, for a value."""
    return any(re.search(rf"{re.escape(str(folder))}(?![\w-])", text) for text in overrides)


def _has_finished(directory: Path, stage: PipelineStage) -> bool:
    return bool(_status(directory / stage.name).get("state") == "finished")


def _end(config: PipelineConfig, directory: Path) -> None:
    from prism_nemo.report.command import run as report

    if config.export is not None:
        _export(directory / config.export, directory / EXPORTED)
    write_atomically(directory / SUMMARY, json.dumps(summarize(config, directory), indent=2) + "\n")
    report(directory)


def run_stage(config: PipelineConfig, stage: PipelineStage, directory: Path, runtime: Runtime) -> None:
    """Runs one stage in this process, unless it has finished already."""
    if _has_finished(directory, stage):
        if runtime.is_main:
            print(f"{stage.name}: finished already", flush=True)
        return
    module = importlib.import_module(_MODULES.get(stage.stage, f"prism_nemo.stages.{stage.stage}"))
    if runtime.is_main:
        print(f"── {stage.name} ({stage.stage})", flush=True)
    module.run(_stage_config(config, stage, directory))
    gc.collect()  # models and optimizers of a stage are held by reference cycles


def _stage_config(config: PipelineConfig, stage: PipelineStage, directory: Path) -> Config:
    return load_config(str(stage.stage), [_resolve(text, directory) for text in stage_overrides(config, stage)])


def summarize(config: PipelineConfig, directory: Path) -> dict[str, Any]:
    """Every arm's accuracy on held-out problems, sampled and greedy, and the discriminator's health."""
    summary: dict[str, Any] = {"seed": config.seed}
    for stage in config.stages:
        if stage.stage is StageKind.eval and stage.name.startswith(EVAL_PREFIX):
            arm = stage.name.removeprefix(EVAL_PREFIX)
            result = json.loads((directory / stage.name / EVALUATION).read_text())
            status = _status(directory / arm)
            summary[arm] = {**result, "steps": status.get("step"), "seconds": status.get("seconds")}
    summary["discriminator"] = {
        stage.name: health
        for stage in config.stages
        if stage.stage in (StageKind.warmup, StageKind.align) and (health := _health(directory / stage.name))
    }
    statuses = [_status(directory / stage.name) for stage in config.stages]
    summary["steps"] = sum(status.get("step", 0) for status, stage in zip(statuses, config.stages, strict=True) if _trains(stage))
    summary["seconds"] = round(sum(status.get("seconds", 0.0) for status in statuses), 1)
    summary["peak_memory_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3)
    return summary


def _health(stage_directory: Path) -> dict[str, float]:
    """The last training step's and the last validation's figures of the discriminator, by their own names."""
    health: dict[str, float] = {}
    for line in read_metrics(stage_directory, times=False):
        for name, value in line.items():
            if name in ("step", "prefix") or not isinstance(value, int | float):
                continue
            short = name.removeprefix("discriminator/")
            if short.startswith(("perception/", "reasoning/", "response/", "expert_load/", "router/")):
                health[short] = value
    return health


def _prepare(config: PipelineConfig, directory: Path) -> RunLock:
    """The run directory, locked, and in it the digits task and its untrained model where they are asked for and not there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PrismError(f"cannot make the run directory: {error.strerror}", where=str(directory)) from error
    lock = RunLock(directory)
    try:
        others = [path for path in directory.iterdir() if path.name != LOCK]
        if others and config.experiment.overwrite:
            lock = _move_aside(directory, lock)
        elif others and not config.experiment.resume:
            raise PrismError(
                "the run directory is not empty",
                where=str(directory),
                remedy="experiment.resume=true goes on with it, experiment.overwrite=true moves it aside",
            )
        elif others:
            _check_same_pipeline(config, directory)
        write_atomically(directory / PIPELINE, dump_config(config))
        if config.digits.enabled:
            _write_digits(config, directory)
    except BaseException:
        lock.release()
        raise
    return lock


def _move_aside(directory: Path, lock: RunLock) -> RunLock:
    """Renames the old run, in which nobody may be writing, and returns the lock of a new directory in its place."""
    for stage_lock in directory.glob(f"*/{LOCK}"):
        RunLock(stage_lock.parent).release()
    directory = directory.absolute()
    directory.rename(next_free(lambda number: directory.with_name(f"{directory.name}.old-{number}")))
    directory.mkdir()
    new_lock = RunLock(directory)
    lock.release()  # only now: until the move is done, the directory is nobody else's
    return new_lock


def _check_same_pipeline(config: PipelineConfig, directory: Path) -> None:
    """Raises ConfigError when the stages that have run, or the digits, were made with other settings than those now given."""
    for stage in config.stages:
        folder = directory / stage.name
        status, stored = _status(folder), folder / "config.yaml"
        if not status or not stored.exists():
            continue
        old, new = stored.read_text(encoding="utf-8"), dump_config(_stage_config(config, stage, directory))
        check_same_run(folder, stages=(status["stage"], str(stage.stage)), configs=(old, new))
        steps = [(yaml.safe_load(text).get("trainer") or {}).get("max_steps") for text in (old, new)]
        if status["state"] == "finished" and steps[0] != steps[1]:
            raise ConfigError(
                f"the stage has finished after {steps[0]} steps, and later stages start from its result; now it has {steps[1]}",
                where=f"{folder}: trainer.max_steps",
                remedy="give it as it was, set another experiment.dir, or move that run aside with experiment.overwrite=true",
            )
    earlier = directory / PIPELINE
    if config.digits.enabled and (directory / "data").exists() and earlier.exists():
        old_settings = yaml.safe_load(earlier.read_text(encoding="utf-8"))
        old, new = (yaml.safe_dump({key: each[key] for key in ("seed", "digits")}) for each in (old_settings, asdict(config)))
        check_same_run(directory / "data", stages=("digits", "digits"), configs=(old, new))


def _write_digits(config: PipelineConfig, directory: Path) -> None:
    from prism_nemo.data.digits import write_digits_task
    from prism_nemo.data.digits_model import write_base_model

    began = time.monotonic()
    if not (directory / "data").exists():
        digits = config.digits
        write_digits_task(
            directory / "data",
            seed=config.seed,
            num_public=digits.num_public,
            num_teacher=digits.num_teacher,
            num_prompts=digits.num_prompts,
            num_test=digits.num_test,
        )
    if not (directory / "model").exists():
        write_base_model(directory / "model", seed=config.seed)
    print(f"digits task and untrained model in {directory} ({time.monotonic() - began:.1f} s)", flush=True)


def _export(checkpoint: Path, out: Path) -> None:
    from prism_nemo.convert.commands import export_hf

    shutil.rmtree(out, ignore_errors=True)  # made by this pipeline from this very checkpoint
    export_hf(checkpoint, out)


def _resolve(text: str, directory: Path) -> str:
    """`${policy:NAME}` and `${discriminator:NAME}` become the stage's folder, `${pairs:NAME}` its pairs file."""

    def path(match: re.Match[str]) -> str:
        folder = directory / match[2]
        return str(folder / PAIRS if match[1] == "pairs" else folder)

    return _REFERENCE.sub(path, text)


def _status(stage_directory: Path) -> dict[str, Any]:
    file = stage_directory / "status.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _trains(stage: PipelineStage) -> bool:
    return stage.stage in (StageKind.sft, StageKind.warmup, StageKind.align, StageKind.rlvr)
