"""The command line of `prism-nemo convert`, read without anything heavy."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prism_nemo.errors import ConfigError

HELP = """\
usage: prism-nemo convert import  --hf DIR --out DIR
       prism-nemo convert import  --megatron DIR --config DIR --out DIR
       prism-nemo convert export  --checkpoint DIR --out DIR [--model NAME]
       prism-nemo convert upcycle --hf DIR --out DIR [--experts 4] [--topk 2] [--seed N]
       prism-nemo convert verify  --hf DIR --checkpoint DIR [--model NAME] [--tensors-only]
       prism-nemo convert inspect DIR [--hashes] [--json]

  import    reads a HuggingFace directory (safetensors) and writes a checkpoint of this project; a directory with a scalar head
            becomes a discriminator's. --megatron: reads a torch_dist checkpoint of another tool, such as Megatron-Bridge,
            and takes config.json, tokenizer and processor from --config
  export    reads a checkpoint and writes a HuggingFace directory, with config, tokenizer and processor
  upcycle   reads a dense model (a HuggingFace directory or a checkpoint) and writes the MoE discriminator's checkpoint
  verify    compares the hash of every tensor, and what the model computes on sample inputs (needs memory for one model;
            --tensors-only does not), and every file of the checkpoint with its hash. Status 1 when something differs
  inspect   says what a directory is: kind, parameters, type, layout, step, and whether it is whole. Status 1 when it is not.
            Files are there and have their sizes; with --hashes they are read, and are what was written

  --model NAME         policy or discriminator, where a step of a run has both
  --max-shard-size GB  of a written file, in gigabytes
  upcycle also takes --noise-std, --router-std, --head-std: the widths of what is drawn

No command but verify holds more than a tensor in memory. Under torchrun, ranks share the files of import, export and upcycle.
A target appears when it is whole; the same command after a kill goes on where it was.
"""

COMMANDS = ("import", "export", "upcycle", "verify", "inspect")


def prepare(arguments: list[str], parser: Callable[[str], argparse.ArgumentParser]) -> Callable[[], None]:
    """Checks the arguments; returns what then runs. `parser` makes one for a command's name. Raises ConfigError."""
    if not arguments or "-h" in arguments or "--help" in arguments:
        return lambda: _print(HELP)
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        raise ConfigError(
            f"convert cannot `{command}`", remedy=f"prism-nemo convert {', '.join(COMMANDS[:-1])} or {COMMANDS[-1]}"
        )
    options = _parse(command, rest, parser(f"convert {command}"))

    def run() -> None:
        if command in ("verify", "inspect"):
            module = importlib.import_module(f"prism_nemo.convert.{command}")
            if not module.run(options):
                sys.exit(1)
            return
        commands = importlib.import_module("prism_nemo.convert.commands")
        ranks = importlib.import_module("prism_nemo.convert.ranks")
        with ranks.launched_ranks() as launched:
            _run(commands, command, options, launched)

    return run


def _parse(command: str, arguments: list[str], parser: argparse.ArgumentParser) -> argparse.Namespace:
    if command == "import":
        source = parser.add_mutually_exclusive_group(required=True)
        source.add_argument("--hf", type=Path)
        source.add_argument("--megatron", type=Path)
        parser.add_argument("--config", type=Path)
    if command in ("upcycle", "verify"):
        parser.add_argument("--hf", type=Path, required=True)
    if command in ("export", "verify"):
        parser.add_argument("--checkpoint", type=Path, required=True)
        parser.add_argument("--model", choices=("policy", "discriminator"))
    if command in ("import", "export", "upcycle"):
        parser.add_argument("--out", type=Path, required=True)
        parser.add_argument("--max-shard-size", type=float)
    if command == "upcycle":
        from prism_nemo.config.schema import DiscriminatorConfig, RuntimeConfig

        defaults = DiscriminatorConfig()
        parser.add_argument("--experts", type=int, default=defaults.num_experts)
        parser.add_argument("--topk", type=int, default=defaults.moe_router_topk)
        parser.add_argument("--seed", type=int, default=RuntimeConfig().seed)
        parser.add_argument("--noise-std", type=float, default=defaults.expert_noise_std)
        parser.add_argument("--router-std", type=float, default=defaults.router_init_std)
        parser.add_argument("--head-std", type=float, default=defaults.head_init_std)
    if command == "verify":
        parser.add_argument("--tensors-only", action="store_true")
    if command == "inspect":
        parser.add_argument("directory", metavar="DIR", type=Path)
        parser.add_argument("--hashes", action="store_true")
        parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    _check(command, options)
    return options


def _check(command: str, options: argparse.Namespace) -> None:
    if command == "import" and (options.megatron is None) != (options.config is None):
        raise ConfigError(
            "--megatron and --config go together",
            where="prism-nemo convert import",
            remedy="--config names the HuggingFace directory whose config.json describes the checkpoint",
        )
    if command == "upcycle" and not 1 <= options.topk <= options.experts:
        raise ConfigError(
            f"a token cannot reach {options.topk} of {options.experts} experts",
            where="prism-nemo convert upcycle",
            remedy="--topk of at least 1 and at most --experts",
        )
    if getattr(options, "max_shard_size", None) is not None and options.max_shard_size <= 0:
        raise ConfigError("a file needs a positive size", where="--max-shard-size", remedy="gigabytes, 5 for example")


def _run(commands: Any, command: str, options: argparse.Namespace, ranks: Any) -> None:
    shard_bytes = None if options.max_shard_size is None else int(options.max_shard_size * 1e9)
    common = {"ranks": ranks, "quiet": False, "max_shard_bytes": shard_bytes}
    if command == "import" and options.hf is not None:
        commands.import_hf(options.hf, options.out, **common)
    elif command == "import":
        commands.import_megatron(options.megatron, options.config, options.out, **common)
    elif command == "export":
        commands.export_hf(options.checkpoint, options.out, model=options.model, **common)
    else:
        from prism_nemo.config.schema import DiscriminatorConfig

        upcycling = DiscriminatorConfig(
            num_experts=options.experts,
            moe_router_topk=options.topk,
            expert_noise_std=options.noise_std,
            router_init_std=options.router_std,
            head_init_std=options.head_std,
        )
        commands.upcycle_hf(options.hf, options.out, upcycling, seed=options.seed, **common)


def _print(text: str) -> None:
    sys.stdout.write(text)
