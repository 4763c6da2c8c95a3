"""docs/evaluation.md: its commands compose, its benchmarks are those there are, its links and names exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from prism_nemo.config.compose import compose
from prism_nemo.config.enums import Benchmark

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line) for line in re.findall(r"^    prism-nemo (eval .*)$", TEXT, re.MULTILINE)]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_the_commands_compose(words: list[str]) -> None:
    config = compose(words[0], words[1:])
    assert config.experiment.dir.startswith("runs/")


def test_every_benchmark_is_described() -> None:
    rows = re.findall(r"^\| `(\w+)` \| [^|]*(?:parquet|\.json)", TEXT, re.MULTILINE)
    assert rows == [str(name) for name in Benchmark]


def test_the_keys_that_it_names_exist() -> None:
    config = compose("eval", [])
    for name in ("also_greedy", "bootstrap_samples", "category", "pass_at_k", "benchmark"):
        assert f"`{name}" in TEXT or f"{name}=" in TEXT
        assert name in config
