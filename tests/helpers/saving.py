"""A model's checkpoint written at once, and checkpoints that are held up."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from prism_nemo.engine.chunks import Chunks
from prism_nemo.engine.model_checkpoint import plan_model
from prism_nemo.engine.optimizer import ModelOptimizer
from prism_nemo.engine.writing import ModelFiles


def save_model(directory: Path, model: Chunks, optimizer: ModelOptimizer | None) -> None:
    """Into a new directory, with its manifest. A collective over all ranks of the default group."""
    files = plan_model(directory, model, optimizer)
    files.bring_to_host(set())
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, files.write())
    if dist.get_rank() == 0:
        files.complete([part for part in parts if part is not None])
    dist.barrier()


def hold_writes(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """No file of a model is written before the event is set."""
    event, write = threading.Event(), ModelFiles.write

    def wait_and_write(files: ModelFiles) -> Any:
        event.wait()
        return write(files)

    monkeypatch.setattr(ModelFiles, "write", wait_and_write)
    return event
