"""`prism-nemo data`: arguments, read without heavy imports, and what then runs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from prism_nemo.errors import ConfigError

if TYPE_CHECKING:
    from prism_nemo.config.schema import DataConfig

COMMANDS = ("inspect", "validate", "convert")
STAGES = ("sft", "pairs", "warmup", "align", "rlvr", "eval")
FORMS = ("sharegpt", "rl", "pairwise")

HELP = """\
usage: prism-nemo data inspect|validate|convert PATH... [...]

What data files hold, what is broken in them, and other files of the same records. PATH is a .json, .jsonl, .parquet or .tar file,
a folder of them, or a pattern (quoted: 'shards/part-{000..099}.tar', 'data/*.parquet').

of all three
  --image-root DIR       images and videos lie below it; by default the folder of each file
  --columns A=B,...      field A is called B in the files, as data.columns: messages=dialog,role_tag=speaker
  --cache-dir DIR        where indexes and token lengths are kept (~/.cache/prism_nemo)

inspect: forms, fields, images and their sizes, sources, answer kinds, lengths
  --limit N              records looked at, evenly spread (10000); 0: all
  --model DIR            count tokens too, images included, as the tokenizer and processor of this model, run or checkpoint make
                         them; they are remembered
  --system-prompt TEXT   for these tokens, as data.system_prompt
  --row-tokens N         rows that the demonstrations would fill, as trainer.max_tokens_per_row (10240)
  --plot FILE.png        the lengths as a picture; needs the extra `report`
  --json                 everything, as JSON

validate: every broken record with its id, place and reason; exit status 1 when there is one
  --stage STAGE          also what this stage needs: sft, pairs, warmup, align, rlvr, eval
  --images               decode every image, and of videos the frames that a run sees; without it they only have to be there
  --workers N            processes (1)
  --json                 as JSON

convert: everything a record holds goes to the new file
  --out FILE             .json, .jsonl, .parquet or .tar (WebDataset)
  --form FORM            sharegpt (default), rl or pairwise
  --images MODE          keep: paths stay paths (default); copy: files in FILE_images/; embed: bytes in the file (.parquet, .tar)
  --shard-records N      several files of so many records: FILE-00000, FILE-00001, ...
  --skip-bad             leave unusable records out, and list them
  --overwrite            replace what is there

examples
  prism-nemo data inspect demos.jsonl --model Qwen3-VL-8B-Instruct --plot lengths.png
  prism-nemo data validate 'rl/*.parquet' --stage rlvr --images --workers 8
  prism-nemo data convert demos.json --out shards/demos.tar --shard-records 10000
"""


def prepare(arguments: list[str], parser: Callable[[str], argparse.ArgumentParser]) -> Callable[[], None]:
    """Checks the arguments; returns what then runs. `parser` makes one for a command's name. Raises ConfigError."""
    if not arguments or "-h" in arguments or "--help" in arguments:
        return lambda: _ignore(sys.stdout.write(HELP))
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        raise ConfigError(f"data cannot `{command}`", remedy=f"prism-nemo data {', '.join(COMMANDS[:-1])} or {COMMANDS[-1]}")
    options = _parse(command, rest, parser(f"data {command}"))
    columns = _columns(options.columns)
    for name in ("limit", "row_tokens", "workers", "shard_records"):
        value = getattr(options, name, None)
        if value is not None and value < (0 if name == "limit" else 1):
            raise ConfigError(f"--{name.replace('_', '-')} is {value}", remedy="give a number of at least 1")
    return lambda: {"inspect": _inspect, "validate": _validate, "convert": _convert}[command](options, columns)


def _parse(command: str, arguments: list[str], parser: argparse.ArgumentParser) -> argparse.Namespace:
    parser.add_argument("paths", nargs="+", metavar="PATH")
    parser.add_argument("--image-root", type=Path)
    parser.add_argument("--columns", action="append", default=[])
    parser.add_argument("--cache-dir", type=Path)
    if command == "inspect":
        parser.add_argument("--limit", type=int, default=10_000)
        parser.add_argument("--model", type=Path)
        parser.add_argument("--system-prompt")
        parser.add_argument("--row-tokens", type=int, default=10_240)
        parser.add_argument("--plot", type=Path)
    elif command == "validate":
        parser.add_argument("--stage", choices=STAGES)
        parser.add_argument("--images", action="store_true")
        parser.add_argument("--workers", type=int, default=1)
    else:
        parser.add_argument("--out", type=Path, required=True)
        parser.add_argument("--form", choices=FORMS, default="sharegpt")
        parser.add_argument("--images", choices=("keep", "copy", "embed"))
        parser.add_argument("--shard-records", type=int)
        parser.add_argument("--skip-bad", action="store_true")
        parser.add_argument("--overwrite", action="store_true")
    if command != "convert":
        parser.add_argument("--json", action="store_true")
    return parser.parse_intermixed_args(arguments)


def _columns(given: list[str]) -> dict[str, str]:
    from prism_nemo.data.columns import check_columns

    columns = {}
    for pair in (pair for text in given for pair in text.split(",")):
        name, equals, other = pair.partition("=")
        if not equals or not name or not other:
            raise ConfigError(f"`{pair}` is no pair of names", where="--columns", remedy="ours=theirs, as messages=dialog")
        columns[name] = other
    check_columns(columns, "--columns")
    return columns


def _data_config(options: argparse.Namespace, columns: dict[str, str]) -> DataConfig:
    from prism_nemo.config.schema import DataConfig

    return DataConfig(
        train=options.paths[0],
        image_root=str(options.image_root) if options.image_root else None,
        columns=columns,
        cache_dir=str(options.cache_dir) if options.cache_dir else None,
        system_prompt=getattr(options, "system_prompt", None),
    )


def _inspect(options: argparse.Namespace, columns: dict[str, str]) -> None:
    inspection = importlib.import_module("prism_nemo.data.inspection")
    data = _data_config(options, columns)
    encoder = model = None
    if options.model is not None:
        chat = importlib.import_module("prism_nemo.data.chat")
        resolve = importlib.import_module("prism_nemo.run_directory").resolve_model_directory
        model = chat.hf_directory(resolve(options.model, "policy"))
        whole = replace(data, max_prompt_length=2**31, max_response_length=2**31)
        encoder = chat.ChatEncoder.from_directory(model, whole, image_root=None)
    found = inspection.inspect(options.paths, data, limit=options.limit or None, encoder=encoder, lengths_of=model)
    inspection.print_report(found, data, row_tokens=options.row_tokens, json_wanted=options.json)
    if options.plot is not None:
        inspection.draw(found, options.plot)


def _validate(options: argparse.Namespace, columns: dict[str, str]) -> None:
    checking = importlib.import_module("prism_nemo.data.checking")
    checks = checking.Checks(tuple(options.paths), _data_config(options, columns), options.stage, options.images)
    if not checking.run(checks, workers=options.workers, as_json=options.json):
        sys.exit(1)


def _convert(options: argparse.Namespace, columns: dict[str, str]) -> None:
    conversion = importlib.import_module("prism_nemo.data.conversion")
    task = conversion.Conversion(
        tuple(options.paths),
        options.out,
        options.form,
        options.images or conversion.default_images(options.out),
        _data_config(options, columns),
        options.skip_bad,
        options.overwrite,
        options.shard_records,
    )
    sys.stdout.write(conversion.summary(task, conversion.convert(task)))


def _ignore(_: object) -> None: ...
