"""What `experiment.py` stands on: atomic files, JSON lines, and whether two runs are the same."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

import prism_nemo
from prism_nemo.errors import ConfigError, PrismError

LAYOUT_KEYS = (  # but not use_distributed_optimizer, which stores its state in another form
    "as_policy",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "context_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "recompute_granularity",
    "recompute_modules",
    "sequence_parallel",
)
ENDPOINT_KEYS = (  # not what makes an answer another one
    "base_url",
    "api_key_env",
    "allow_http",
    "max_concurrency",
    "timeout_seconds",
    "max_attempts",
    "backoff_seconds",
    "max_response_bytes",
    "max_requests",
    "max_prompt_tokens",
    "max_completion_tokens",
    "max_cost",
    "prompt_price",
    "completion_price",
    "cache_dir",
    "cache_as",
)
# Keys that may change when a run is resumed: how far it goes, how often it reports, on how many ranks it runs. All others make
# another run of it.
MAY_DIFFER = (
    "experiment",
    *(f"{section}.{key}" for section in ("parallel", "discriminator_parallel") for key in LAYOUT_KEYS),
    *(f"{section}.{key}" for section in ("teacher", "reward.judge") for key in ENDPOINT_KEYS),
    "runtime.device",
    "runtime.num_threads",
    "runtime.distributed_timeout_minutes",
    "runtime.lost_rank_seconds",
    "runtime.stuck_rank_seconds",
    "rollout.max_batch_size",
    "rollout.servers",
    "data.max_bad_sample_share",
    "data.cache_dir",
    "reward.num_workers",
    "algorithm.max_generation_batches",  # a step that succeeded does not depend on it
    "reward.cache_size",
    "trainer.max_steps",
    "trainer.max_tokens_per_row",
    "trainer.val_check_interval",
    "trainer.limit_val_samples",
    "trainer.save_interval",
    "trainer.keep_last_k",
    "trainer.max_failed_saves",
    "trainer.max_bad_steps",
    "trainer.log_samples",
)
PACKAGES = (
    "prism-nemo",
    "torch",
    "megatron-core",
    "transformers",
    "numpy",
    "safetensors",
    "transformer-engine",
    "vllm",
)
LAUNCH_VARIABLES = ("WORLD_SIZE", "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_RESTART_COUNT")
COMMIT_VARIABLE = "PRISM_NEMO_COMMIT"  # from the job scripts: in a container git may be missing, or not trust the checkout
LATEST = "latest"  # in a run's `checkpoints`: the name of the newest complete one
NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


# Files


def resolve_model_directory(path: Path, name: str) -> Path:
    """The folder of the model called `name` for a path to it, to a step's folder, to `checkpoints`, or to a run.

    Any other path (a HuggingFace directory, one that does not exist) comes back as it is.
    """
    for folder in (path, path / "checkpoints"):
        if (folder / LATEST).is_file():
            newest = (folder / LATEST).read_text(encoding="utf-8", errors="replace").strip()
            if Path(newest).name != newest:  # it stands for a folder beside it
                raise PrismError("this names no checkpoint", where=str(folder / LATEST), remedy="the name of a step's folder")
            path = folder / newest
    return path / name if (path / name).is_dir() else path


def write_atomically(path: Path, text: str) -> None:
    """Replaces `path`; whoever reads it meanwhile sees the old text or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def next_free(name: Callable[[int], Path]) -> Path:
    """The first of name(1), name(2), … that does not exist."""
    n = 1
    while name(n).exists():
        n += 1
    return name(n)


def to_json_line(row: Mapping[str, Any]) -> str:
    """`row` as one line of JSON, no newline: floats to the last digit, NaN and inf as the strings "nan", "inf", "-inf"."""
    return json.dumps(_finite(row), ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def append_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends all of the rows, or none: OSError when the disk has no room."""
    text = "".join(to_json_line(row) + "\n" for row in rows)
    if not text:
        return
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            left = memoryview(text.encode())
            while left:
                left = left[file.write(left) :]
        except OSError:
            with suppress(OSError):
                file.truncate(end)
            raise


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a .jsonl file. A last line without its newline is one that is being written, or never was: it is left out.

    Raises PrismError naming the line when one is no JSON.
    """
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError("it is no object")
                yield row
            except (ValueError, RecursionError) as error:
                raise PrismError(f"not a line of JSON: {error}", where=f"{path}, line {number}") from error


def keep_json_lines(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    """Drops, atomically, the lines of `path` that `keep` refuses, and an unfinished last line. A missing file stays missing."""
    if path.exists():
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in read_json_lines(path) if keep(row)))


def cut_torn_line(path: Path) -> None:
    """Takes off a last line without its newline, which a killed process has left; nothing else is read into memory."""
    with path.open("rb+") as file:
        end = sum(len(line) for line in file if line.endswith(b"\n"))
        file.truncate(end)


# Is it the same run?


def config_differences(old_yaml: str, new_yaml: str) -> list[str]:
    """The settings in which two configurations are different runs, as "key: old -> new"; `MAY_DIFFER` does not count."""
    old, new = (dict(_leaves(yaml.safe_load(text))) for text in (old_yaml, new_yaml))
    return [
        f"{key}: {old.get(key, 'absent')} -> {new.get(key, 'absent')}"
        for key in dict.fromkeys([*old, *new])
        if (key not in old or key not in new or old[key] != new[key]) and not _may_differ(key)
    ]


def _may_differ(key: str) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in MAY_DIFFER)


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    children: Iterable[tuple[Any, Any]]
    if isinstance(node, dict) and node:
        children = node.items()
    elif isinstance(node, list) and node:
        children = enumerate(node)
    else:
        yield prefix, node
        return
    for key, child in children:
        yield from _leaves(child, f"{prefix}.{key}" if prefix else str(key))


def check_same_run(directory: Path, *, stages: tuple[str, str], configs: tuple[str, str]) -> None:
    """Raises ConfigError unless the run in `directory` (each pair's first) is the one that is now asked for (each second)."""
    if stages[0] != stages[1]:
        differences = [f"stage: {stages[0]} -> {stages[1]}"]
    else:
        differences = config_differences(*configs)
    if differences:
        raise ConfigError(
            "the run directory holds another run; different are\n    " + "\n    ".join(differences),
            where=str(directory),
            remedy="give these as they were, set another experiment.dir, or move that run aside with experiment.overwrite=true",
        )


# Where it runs


def describe_environment() -> dict[str, Any]:
    """Versions, host, command and commit; nothing that changes from one start to the next on the same machine."""
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "packages": versions,
        "platform": platform.platform(),
        "hostname": socket.gethostname(),
        "command": shlex.join(sys.argv),
        "directory": str(Path.cwd()),
        "git_commit": _git_commit() or os.environ.get(COMMIT_VARIABLE) or _commit_of_image(),
        "launch": {name: os.environ[name] for name in LAUNCH_VARIABLES if name in os.environ},
    }


def _git_commit() -> str | None:
    """The commit that the package's source is at, with "-dirty" behind it where files differ; None outside a checkout."""
    package = Path(prism_nemo.__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(["git", "-C", package, *arguments], capture_output=True, text=True, timeout=10, check=False)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    if not git("ls-files", "--", "__init__.py"):  # an installed copy that happens to lie in somebody's checkout
        return None
    return git("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _commit_of_image() -> str | None:
    """That of an installed package which was built for an image; None where it was not told."""
    try:
        told = (Path(prism_nemo.__file__).parent / "REVISION").read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None
    return told if told != "unknown" else None
