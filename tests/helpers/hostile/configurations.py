"""Configuration files, and published benchmarks' files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from helpers.hostile import MARKER, case, refusal, refused_command

from prism_nemo.config.enums import Benchmark
from prism_nemo.evaluation.benchmarks import read_benchmark

DOOR, BENCHMARK = "configuration", "benchmark"
NEEDED = ("model.path=m", "data.train=d.jsonl", "trainer.max_steps=1", "experiment.dir=r")
SECRET = "PRISM_NEMO_TEST_API_KEY"


def aliases(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    return "\n".join(lines + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)])


FILES: dict[str, Callable[[Path], str]] = {
    "`!!python/object/apply:os.mkdir`": lambda folder: f"a: !!python/object/apply:os.mkdir ['{folder / MARKER}']",
    "`!!python/name:os.system`": lambda folder: "a: !!python/name:os.system",
    "aliases of aliases: a billion values in 500 bytes": lambda folder: aliases(9),
    "an alias that holds itself": lambda folder: "a: &a [*a]",
    "lists nested 100,000 deep": lambda folder: "a: " + "[" * 100_000,
    "a file of 8 MB": lambda folder: "a: " + "x" * (8 << 20),
    "escapes in a key": lambda folder: '"\\e[2J\\u202Ekey": 1',
    "a secret of the environment": lambda folder: f"data:\n  system_prompt: ${{oc.env:{SECRET}}}",
}


def of_file(make: Callable[[Path], str]) -> Callable[[Path], str]:
    def attempt(folder: Path) -> str:
        (folder / "theirs.yaml").write_text(make(folder))
        os.environ[SECRET] = "canary"
        try:
            shown = refused_command("sft", "--config", str(folder / "theirs.yaml"), *NEEDED)
        finally:
            del os.environ[SECRET]
        assert "canary" not in shown
        return shown

    return attempt


for _given, _make in FILES.items():
    case(DOOR, _given)(of_file(_make))


@case(DOOR, "lists nested 3000 deep on the command line")
def _(folder: Path) -> str:
    return refused_command("sft", *NEEDED, "trainer.global_batch_size=" + "[" * 3000)


@case(DOOR, "the address of a teacher with a key in it")
def _(folder: Path) -> str:
    shown = refused_command(
        "curate", "data.train=d.jsonl", "experiment.dir=r", "teacher.model=m", "teacher.base_url=https://u:canary@host/v1"
    )
    assert "canary" not in shown
    return shown


OPTIONS: dict[str, str] = {
    "options that call something": "__import__('os').abort()",
    "options of 6 MB": "[1" + ",1" * 3_000_000 + "]",
    "options nested 50,000 deep": "[" * 50_000,
    "options with a sum of 40,000 parts": "1+" * 40_000 + "1",
}


def of_options(text: str) -> Callable[[Path], str]:
    def attempt(folder: Path) -> str:
        question = {"id": "validation_Math_1", "question": "What?", "options": text}
        rows = [question | {"answer": "A", "question_type": "multiple-choice"}]
        (folder / "b.json").write_text(json.dumps(rows))
        return refusal(lambda: list(read_benchmark(Benchmark.mmmu, folder / "b.json")))

    return attempt


for _given, _text in OPTIONS.items():
    case(BENCHMARK, _given)(of_options(_text))
