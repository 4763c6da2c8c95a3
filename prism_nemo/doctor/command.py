"""`prism-nemo doctor`: arguments, and what is printed."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from prism_nemo.doctor.examination import examine
from prism_nemo.doctor.finding import as_json, as_text, is_healthy
from prism_nemo.doctor.local import check_locally
from prism_nemo.doctor.place import this_place
from prism_nemo.doctor.subject import subject_of
from prism_nemo.errors import ConfigError

HELP = """\
usage: prism-nemo doctor [--quick] [--json] [--limit SECONDS] [--path DIR]... [--vllm] [--config FILE] [STAGE KEY=VALUE ...]

Whether nodes can train: Python, packages, GPUs, a product that must be right, disks, limits, and between ranks the shared folder,
ports, clocks and an all-reduce with its bandwidth. A line a check and node, and a verdict a node. Status 0: healthy, 1: not.

  STAGE KEY=VALUE ...  a command as it would be run: its experiment.dir, models, device and rollout engine are looked at
                       (of `convert ...` and `data ...` nothing: the current folder)
  --path DIR           look at this folder too (without a STAGE: instead of the current one)
  --vllm               vLLM must be importable, whatever the stage says
  --quick              a second: no torch, nothing is written, no other ranks
  --limit SECONDS      what does not answer for so long is a failure, and is named (40)
  --json               everything, as JSON

On several ranks, each takes part:

  torchrun --nproc-per-node 8 -m prism_nemo doctor align model.path=... experiment.dir=...
  srun ... bash slurm/rank.sh doctor align model.path=... experiment.dir=...

docs/doctor.md says what is checked and what to do about it.
"""


# Commands without settings of this kind: only the machine can be looked at.
OTHERS = ("convert", "data")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--limit", type=float, default=40.0)
    parser.add_argument("--path", action="append", default=[])
    parser.add_argument("--vllm", action="store_true")
    parser.add_argument("--config", type=Path)
    parser.add_argument("stage", nargs="?")
    parser.add_argument("overrides", nargs="*")
    # What the job scripts give to a pipeline; of no concern here.
    parser.add_argument("--end", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--jobs", help=argparse.SUPPRESS)


def without_others(arguments: list[str]) -> list[str]:
    """Without a command that has no settings to look at, and what follows it."""
    others = [number for number, argument in enumerate(arguments) if argument in OTHERS]
    return arguments[: others[0]] if others else arguments


def prepare(options: argparse.Namespace, stages: list[str]) -> Callable[[], None]:
    """Checks the arguments; returns what then runs, and ends the process with status 1 where a node is not healthy."""
    if options.stage is not None and options.stage not in stages:
        raise ConfigError(f"there is no stage `{options.stage}`", where="prism-nemo doctor", remedy=f"one of {', '.join(stages)}")
    if not 1 <= options.limit <= 600:
        raise ConfigError(f"--limit {options.limit:g} is not between 1 and 600 seconds", where="prism-nemo doctor")
    subject = subject_of(options.stage, options.overrides, options.config, options.path, options.vllm)
    place = this_place({}) if options.quick else this_place()

    def run() -> None:
        if options.quick:
            nodes = {place.node_name: check_locally(place, subject, quick=True, limit=options.limit).findings}
            healthy = all(map(is_healthy, nodes.values()))
        else:
            nodes, healthy = examine(place, subject, options.limit)
        if nodes:
            sys.stdout.write((as_json if options.json else as_text)(nodes))
            sys.stdout.flush()
        if not healthy:
            raise SystemExit(1)

    return run
