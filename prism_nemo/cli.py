"""The command line: parses and checks everything before the heavy imports, so that help and mistakes cost no waiting.

What a command needs is imported when it runs. Exit status: 0, 2 for a `PrismError` (shown without a traceback, unless
PRISM_NEMO_TRACEBACK=1), 130 when interrupted; 1 where `doctor` finds a node that cannot train.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import importlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

from prism_nemo.errors import ConfigError, PrismError
from prism_nemo.printable import PrintableFormatter

if TYPE_CHECKING:
    from prism_nemo.config.compose import Config

PROGRAM = "prism-nemo"


@dataclass(frozen=True)
class Stage:
    """A command that runs `module.run(config)`."""

    module: str
    summary: str
    example: str


STAGES = {
    "sft": Stage(
        "prism_nemo.stages.sft",
        "supervised fine-tuning on demonstrations",
        "model.path=models/Qwen3-VL-8B data.train=demos.jsonl trainer.max_steps=5000 experiment.dir=runs/sft parallel=tp2",
    ),
    "pairs": Stage(
        "prism_nemo.stages.pairs",
        "sample the policy's responses beside the teacher's, for the warm-up",
        "model.path=runs/sft data.train=teacher.jsonl experiment.dir=runs/pairs",
    ),
    "warmup": Stage(
        "prism_nemo.stages.warmup",
        "upcycle a dense model to the discriminator and train it on teacher/student pairs",
        "discriminator.path=models/Qwen3-VL-2B data.train=pairs.jsonl experiment.dir=runs/warmup",
    ),
    "align": Stage(
        "prism_nemo.stages.align",
        "adversarial alignment of the policy with the teacher (PRISM)",
        "model.path=SFT discriminator.path=WARMUP data.train=teacher.jsonl experiment.dir=runs/align optimizer.lr=1e-6",
    ),
    "rlvr": Stage(
        "prism_nemo.stages.rlvr",
        "reinforcement learning with verifiable rewards (GRPO, DAPO, GSPO, Dr.GRPO)",
        "model.path=ALIGNED data.train=prompts.jsonl experiment.dir=runs/rlvr algorithm=dapo parallel=tp2",
    ),
    "eval": Stage(
        "prism_nemo.stages.evaluate",
        "accuracy, pass@k, … on held-out records, or on a published benchmark by its own rule",
        "model.path=ALIGNED data.validation=test.jsonl experiment.dir=runs/eval rollout.temperature=0",
    ),
    "curate": Stage(
        "prism_nemo.stages.curate",
        "ask a teacher endpoint for demonstrations where the policy fails, and keep the right ones",
        "model.path=runs/sft data.train=prompts.jsonl teacher.base_url=https://host/v1 teacher.model=NAME teacher.api_key_env=KEY"
        " experiment.dir=runs/curated",
    ),
    "generate": Stage(
        "prism_nemo.stages.generate",
        "write the policy's responses to the prompts of a data set to a file, graded where answers are known",
        "model.path=runs/rlvr data.train=prompts.jsonl rollout.num_rollouts_per_prompt=8 experiment.dir=runs/responses",
    ),
    "serve": Stage(
        "prism_nemo.stages.serve",
        "a rollout server for runs with rollout.placement=separate; it gets its weights from them",
        "model.path=models/Qwen3-VL-8B rollout=vllm serve.host=0.0.0.0 serve.port=8900",
    ),
    "pipeline": Stage(
        "prism_nemo.stages.pipeline",
        "several stages, each from the output of an earlier one",
        "demo=digits experiment.dir=runs/demo",
    ),
}

# Beside --config, --cfg and --help; what the job scripts in slurm/ call.
_OPTIONS_OF: dict[str, dict[str, dict[str, Any]]] = {
    "pipeline": {
        "--jobs": {"type": Path, "metavar": "FILE"},
        "--end": {"action": "store_true"},
    },
    "serve": {"--of": {"metavar": "STAGE"}},
}
_OPTION_HELP = {
    "pipeline": """
  --jobs FILE     only make the run directory, and write the stages to do to FILE, for slurm/pipeline.sh
  --end           only export and summarize what stages have made that ran as jobs of their own""",
    "serve": """
  --of STAGE      a server for a run of that stage: settings are the run's, those that it has no use for are left out""",
}

HELP = f"""\
usage: {PROGRAM} COMMAND [...]

Post-trains Qwen3-VL: SFT, adversarial alignment (PRISM), RLVR.

training
{{training}}

data
{{data}}

before a job
  doctor           whether these nodes can train: GPUs, disks, versions, and what is between them
  plan             whether a model, stage and layout fit a cluster, and which layout is quickest

rollouts
{{rollouts}}

evaluation
{{evaluation}}

data
  data inspect     what data files hold
  data validate    every broken record, with its id and the reason
  data convert     data files of another kind

checkpoints
  convert import   a HuggingFace directory to a checkpoint
  convert export   a checkpoint to a HuggingFace directory
  convert upcycle  a dense model to a discriminator
  convert verify   whether a HuggingFace directory and a checkpoint are the same model
  convert inspect  what a directory holds

examples
  {PROGRAM} pipeline demo=digits
  {PROGRAM} rlvr model.path=DIR data.train=FILE experiment.dir=runs/rlvr algorithm=dapo optimizer.lr=1e-5
  {PROGRAM} rlvr --config mine.yaml trainer.max_steps=10 --cfg
  torchrun --nproc-per-node 2 -m prism_nemo align parallel=tp2 ...

{PROGRAM} COMMAND --help shows a command's options and, for a stage, every setting.
"""

COMPARE_HELP = f"""\
usage: {PROGRAM} compare RUN_A RUN_B [--decoding NAME] [--common] [--json FILE]

Two evaluations of the same records, record by record: differences with confidence intervals, and which records changed.

  --decoding NAME   sampled (default) or greedy
  --common          leave out records that only one of the runs has
  --json FILE       write the comparison there as JSON; - prints it instead of the tables
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are `PrismError`s, told like all others."""

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"{PROGRAM} {command}", add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message, where=self.prog, remedy=f"{self.prog} --help shows how it is called; settings are key=value")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; `argv` without the program's name, by default the process's. Returns the exit status."""
    if logging.lastResort is not None:  # what shows warnings where a command sets nothing up
        logging.lastResort.setFormatter(PrintableFormatter())
    try:
        try:
            run = _prepare(list(sys.argv[1:] if argv is None else argv))
        except PrismError as error:
            # Every rank finds the same mistake in the same arguments.
            return _fail(error, silent=_rank() > 0)
        try:
            run()
        except PrismError as error:
            return _fail(error)
    except KeyboardInterrupt:
        return 130
    return 0


def _prepare(arguments: list[str]) -> Callable[[], None]:
    """Parses and checks, without heavy imports; returns what then runs."""
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help", "help"):
        return lambda: _print(_help())
    if command in STAGES:
        return _prepare_stage(command, rest)
    if command == "convert":
        return _prepare_convert(rest)
    if command == "data":
        return _prepare_data(rest)
    if command == "plan":
        return _prepare_plan(rest)
    if command == "doctor":
        return _prepare_doctor(rest)
    if command == "report":
        return _prepare_report(rest)
    if command == "compare":
        return _prepare_compare(rest)
    known = [*STAGES, "convert", "data", "doctor", "plan", "report", "compare"]
    close = difflib.get_close_matches(command, known, n=1)
    raise ConfigError(
        f"there is no command `{command}`",
        remedy=f"did you mean {close[0]}?" if close else f"one of {', '.join(known)}",
    )


def _prepare_stage(name: str, arguments: list[str]) -> Callable[[], None]:
    parser = Parser(name)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--cfg", action="store_true")
    parser.add_argument("overrides", nargs="*")
    for option, settings in _OPTIONS_OF.get(name, {}).items():
        parser.add_argument(option, **settings)
    options = parser.parse_intermixed_args(arguments)
    if options.help:
        return lambda: _print(_stage_help(name))

    from prism_nemo.config.compose import compose, load_config
    from prism_nemo.config.enums import Device
    from prism_nemo.config.schema import PipelineConfig
    from prism_nemo.config.validate import validate

    if options.cfg:
        from omegaconf import OmegaConf

        text = OmegaConf.to_yaml(compose(name, options.overrides, config_file=options.config))
        return lambda: _print(text)
    if name == "pipeline" and (options.jobs or options.end):
        return _prepare_pipeline_jobs(load_config(name, options.overrides, config_file=options.config), options.jobs)
    if name == "serve" and options.of:
        from prism_nemo.config.serving import server_of

        config: Config = server_of(options.of, options.overrides, config_file=options.config)
    else:
        config = load_config(name, options.overrides, config_file=options.config)
    validate(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    device = config.device if isinstance(config, PipelineConfig) else config.runtime.device
    if device == Device.cpu:
        # Megatron is prepared for the CPU where there is no CUDA device: so on a machine that has one, torch must not see it.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return lambda: _load(STAGES[name].module).run(config)


def _load(module: str) -> ModuleType:
    """Imports what a stage needs. What imports make, stays: the collector need not go through it, now, later or at the end.

    That takes a second off a short run.
    """
    if module in sys.modules:
        return importlib.import_module(module)
    gc.disable()
    try:
        return importlib.import_module(module)
    finally:
        gc.freeze()
        gc.enable()


def _prepare_pipeline_jobs(config: Config, jobs: Path | None) -> Callable[[], None]:
    """What comes before or after the stages of a pipeline that are jobs of their own, with ranks of their own."""
    from prism_nemo.config.validate import validate

    validate(config)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

    def run() -> None:
        pipeline = _load("prism_nemo.stages.pipeline")
        if jobs is not None:
            pipeline.write_jobs(config, jobs)
        else:
            pipeline.end(config)

    return run


def _prepare_convert(arguments: list[str]) -> Callable[[], None]:
    from prism_nemo.convert.arguments import prepare

    return prepare(arguments, Parser)


def _prepare_data(arguments: list[str]) -> Callable[[], None]:
    from prism_nemo.data.command import prepare

    return prepare(arguments, Parser)


def _prepare_plan(arguments: list[str]) -> Callable[[], None]:
    from prism_nemo.plan import command

    if not arguments or "-h" in arguments or "--help" in arguments:
        return lambda: _print(command.HELP)
    parser = Parser("plan")
    command.add_arguments(parser)
    options = parser.parse_args(arguments)
    return lambda: command.run(options)


def _prepare_doctor(arguments: list[str]) -> Callable[[], None]:
    from prism_nemo.doctor import command

    if "-h" in arguments or "--help" in arguments:
        return lambda: _print(command.HELP)
    parser = Parser("doctor")
    command.add_arguments(parser)
    return command.prepare(parser.parse_intermixed_args(command.without_others(arguments)), list(STAGES))


def _prepare_report(arguments: list[str]) -> Callable[[], None]:
    if "-h" in arguments or "--help" in arguments:
        text = f"usage: {PROGRAM} report RUN_DIR\n\nTables and curves of a pipeline's or a stage's run directory.\n"
        return lambda: _print(text)
    parser = Parser("report")
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    options = parser.parse_args(arguments)
    return lambda: importlib.import_module("prism_nemo.report.command").run(options.run_dir)


def _prepare_compare(arguments: list[str]) -> Callable[[], None]:
    if "-h" in arguments or "--help" in arguments:
        return lambda: _print(COMPARE_HELP)
    parser = Parser("compare")
    for run in ("run_a", "run_b"):
        parser.add_argument(run, metavar=run.upper(), type=Path)
    parser.add_argument("--decoding", choices=("sampled", "greedy"), default="sampled")
    parser.add_argument("--common", action="store_true")
    parser.add_argument("--json", type=Path, dest="json_file")
    options = parser.parse_args(arguments)
    return lambda: importlib.import_module("prism_nemo.evaluation.compare").run(**vars(options))


def _help() -> str:
    def lines(*names: str) -> str:
        return "\n".join(f"  {name:<16} {STAGES[name].summary}" for name in names)

    return HELP.format(
        training=lines("sft", "warmup", "align", "rlvr", "pipeline"),
        data=lines("pairs", "curate"),
        rollouts=lines("generate", "serve"),
        evaluation=f"{lines('eval')}\n  {'compare A B':<16} two evaluations, record by record"
        f"\n  {'report RUN_DIR':<16} tables and curves of a run directory",
    )


def _stage_help(name: str) -> str:
    from prism_nemo.config.reference import render_keys

    stage = STAGES[name]
    return f"""\
usage: {PROGRAM} {name} [--config FILE] [--cfg] [KEY=VALUE | GROUP=OPTION ...]

{stage.summary[0].upper()}{stage.summary[1:]}.

  --config FILE   a YAML file of settings, over the shipped ones and under those on the command line
  --cfg           print the composed settings as YAML, and stop{_OPTION_HELP.get(name, "")}

example
  {PROGRAM} {name} {stage.example}

{render_keys(name)}"""


def _print(text: str) -> None:
    sys.stdout.write(text)


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _fail(error: PrismError, *, silent: bool = False) -> int:
    """Shows an error on standard error and returns its exit status.

    Once a stage runs, ranks fail for reasons of their own, and the one that knows it says so, with its number.
    """
    if not silent:
        if os.environ.get("PRISM_NEMO_TRACEBACK") == "1":
            traceback.print_exception(error)
        prefix = f"[rank {_rank()}] " if _rank() > 0 else ""
        print(f"{prefix}{PROGRAM}: {error}", file=sys.stderr)
    return error.exit_status
