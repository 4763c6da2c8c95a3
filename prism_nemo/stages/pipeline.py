"""Several stages, one after another, each starting from what an earlier one made.

    prism-nemo pipeline demo=digits

Every stage has its own folder under the run directory and is a run like any other: an interrupted pipeline goes on where it
stopped, finished stages are not run again. At the end summary.json compares the arms, and one stage's policy is exported to hf/.
"""

from __future__ import annotations

import gc
import importlib
import json
import re
import resource
import shutil
import time
from pathlib import Path
from typing import Any

from prism_nemo.config.compose import dump_config, load_config, stage_overrides
from prism_nemo.config.schema import ParallelConfig, PipelineConfig, PipelineStage, RuntimeConfig, StageKind
from prism_nemo.config.validate import validate
from prism_nemo.engine.runtime import Runtime, session
from prism_nemo.errors import PrismError
from prism_nemo.experiment import read_metrics
from prism_nemo.run_directory import next_free, write_atomically
from prism_nemo.stages.evaluate import RESULT as EVALUATION
from prism_nemo.stages.pairs import RESULT as PAIRS

SUMMARY = "summary.json"
EVAL_PREFIX = "eval_"  # a stage eval_NAME judges the arm NAME
_MODULES = {StageKind.eval: "prism_nemo.stages.evaluate"}
_REFERENCE = re.compile(r"\$\{(policy|discriminator|pairs):([^}]*)\}")


def run(config: PipelineConfig) -> None:
    """The `pipeline` command."""
    validate(config)
    directory = Path(config.experiment.dir)
    with session(ParallelConfig(), RuntimeConfig(device=config.device)) as runtime:
        if runtime.is_main:
            _prepare(config, directory)
        runtime.barrier()
        for stage in config.stages:
            run_stage(config, stage, directory, runtime)
        if runtime.is_main:
            if config.export is not None:
                _export(directory / config.export, directory / "hf")
            write_atomically(directory / SUMMARY, json.dumps(summarize(config, directory), indent=2) + "\n")
            from prism_nemo.report.command import run as report

            report(directory)


def run_stage(config: PipelineConfig, stage: PipelineStage, directory: Path, runtime: Runtime) -> None:
    """Runs one stage in this process, unless it has finished already."""
    if _status(directory / stage.name).get("state") == "finished":
        if runtime.is_main:
            print(f"{stage.name}: finished already", flush=True)
        return
    overrides = [_resolve(text, directory) for text in stage_overrides(config, stage)]
    loaded = load_config(str(stage.stage), overrides)
    module = importlib.import_module(_MODULES.get(stage.stage, f"prism_nemo.stages.{stage.stage}"))
    if runtime.is_main:
        print(f"── {stage.name} ({stage.stage})", flush=True)
    module.run(loaded)
    gc.collect()  # models and optimizers of a stage are held by reference cycles


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


def _prepare(config: PipelineConfig, directory: Path) -> None:
    """The run directory, and in it the digits task and its untrained model where they are asked for and not there."""
    if directory.exists() and config.experiment.overwrite:
        directory.rename(next_free(lambda number: directory.with_name(f"{directory.name}.old-{number}")))
    elif directory.exists() and any(directory.iterdir()) and not config.experiment.resume:
        raise PrismError(
            "the run directory is not empty",
            where=str(directory),
            remedy="experiment.resume=true goes on with it, experiment.overwrite=true moves it aside",
        )
    directory.mkdir(parents=True, exist_ok=True)
    write_atomically(directory / "pipeline.yaml", dump_config(config))
    if not config.digits.enabled:
        return
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
