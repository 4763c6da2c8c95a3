"""Marks tests by their folder, and skips what this machine cannot run, saying why."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
from slurm.cluster import missing

# Before torch is imported anywhere: ranks that the tests start would otherwise fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that asks the network for a model is a mistake

FOLDER_MARKERS = ("distributed", "integration", "gpu", "slurm")
TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = item.path.relative_to(TESTS).parts[0]
        if folder in FOLDER_MARKERS:
            item.add_marker(folder)
    for_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if for_gpu and not _has_cuda():
        _skip(for_gpu, "needs a CUDA device")
    if importlib.util.find_spec("nemo_aligner") is None:
        _skip([item for item in items if item.get_closest_marker("nemo")], "needs the extra `nemo`")
    if importlib.util.find_spec("vllm") is None:
        _skip([item for item in items if item.get_closest_marker("vllm")], "needs vLLM: make test-vllm")
    for_slurm = [item for item in items if item.get_closest_marker("slurm")]
    if for_slurm and (why := missing()):
        _skip(for_slurm, why)


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _skip(items: list[pytest.Item], reason: str) -> None:
    for item in items:
        item.add_marker(pytest.mark.skip(reason=reason))
