"""Marks tests by folder, skips what this machine cannot run, saying why, and spreads tests over processes (`pytest -n 3`)."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from slurm.cluster import missing

# Before torch is imported anywhere: ranks that the tests start would otherwise fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks the network for a model is a mistake

FOLDER_MARKERS = ("distributed", "integration", "gpu", "slurm")
# Where tests are spread over processes these come first, so that none ends long after the others; the order must not matter.
FIRST = ("slurm", "distributed/test_layouts.py", "integration/test_faults.py", "distributed", "integration")
TESTS = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in FOLDER_MARKERS:
            item.add_marker(folder)
    if hasattr(config, "workerinput"):  # one of several processes
        items.sort(key=_turn)
    for_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if for_gpu and not _has_cuda():
        _skip(for_gpu, "needs a CUDA device")
    if importlib.util.find_spec("nemo_aligner") is None:
        _skip([item for item in items if item.get_closest_marker("nemo")], "needs the extra `nemo`: make test-nemo")
    if importlib.util.find_spec("vllm") is None:
        _skip([item for item in items if item.get_closest_marker("vllm")], "needs vLLM: make test-vllm")
    for_slurm = [item for item in items if item.get_closest_marker("slurm")]
    if for_slurm and (why := missing()):
        _skip(for_slurm, why)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file stays together, for what its tests share is made once, and so does tests/slurm, for there is one cluster."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "slurm" if nodeid.startswith("tests/slurm/") else str(super()._split_scope(nodeid))

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.hookimpl(wrapper=True, tryfirst=True)  # below all else that is summed up
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Generator[None]:
    """In one line, which tests this run left out that another command runs."""
    yield
    why = [report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", ())]
    left_out = Counter(reason for reason in why if "make test-" in reason).most_common()
    if left_out:
        terminalreporter.write_line("left out: " + "; ".join(f"{count} ({reason})" for reason, count in left_out))


def _turn(item: pytest.Item) -> int:
    path = item.path.relative_to(TESTS)
    return next((turn for turn, name in enumerate(FIRST) if path.is_relative_to(name)), len(FIRST))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _skip(items: list[pytest.Item], reason: str) -> None:
    for item in items:
        item.add_marker(pytest.mark.skip(reason=reason))
