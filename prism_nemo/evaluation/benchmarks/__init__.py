"""The published benchmarks: each module reads one's files and scores responses by its own rule.

    read(path, image_root) -> Iterator[Record]    from the files as they were published
    score(results) -> dict                        of one response per record, by the benchmark's rule

No data of any benchmark is part of this package: columns and rules are from public documentation (docs/evaluation.md).
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

from prism_nemo.config.enums import Benchmark
from prism_nemo.data.records import Record
from prism_nemo.evaluation.benchmarks.scores import Result
from prism_nemo.evaluation.samples import Answered


class BenchmarkModule(Protocol):
    def read(self, path: Path, image_root: Path | None = None) -> Iterator[Record]: ...

    def score(self, results: Sequence[Result]) -> dict[str, Any]: ...


def read_benchmark(name: Benchmark | str, path: Path, image_root: Path | None = None) -> Iterator[Record]:
    """The records of a benchmark's published files: one file, or the folder that holds them.

    Relative image paths in the files start at `image_root`, by default the file's own folder. Images are not opened. Raises
    DataError, naming file and row, for what is not in the published form.
    """
    return _module(name).read(Path(path), None if image_root is None else Path(image_root))


def score_benchmark(name: Benchmark | str, answered: Sequence[Answered]) -> dict[str, Any]:
    """Scores by the benchmark's own rule; with several responses a record, the mean over the first ones, the second ones, …"""
    count = min((len(one.samples) for one in answered), default=0)
    score = _module(name).score
    scores = [score([Result(one.record, one.samples[index]) for one in answered]) for index in range(count)]
    return cast("dict[str, Any]", _mean(scores)) if scores else {}


def _module(name: Benchmark | str) -> BenchmarkModule:
    return cast("BenchmarkModule", importlib.import_module(f"prism_nemo.evaluation.benchmarks.{Benchmark(name)}"))


def _mean(trees: Sequence[Any]) -> Any:
    """Of trees of numbers: the mean of each over the trees that have it; one that is the same in all stays as it is."""
    if isinstance(trees[0], dict):
        names = dict.fromkeys(name for tree in trees for name in tree)
        return {name: _mean([tree[name] for tree in trees if name in tree]) for name in names}
    return trees[0] if all(tree == trees[0] for tree in trees) else math.fsum(trees) / len(trees)
