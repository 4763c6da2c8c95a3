"""A model's checkpoint, written at once."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from prism_nemo.engine.chunks import Chunks
from prism_nemo.engine.model_checkpoint import plan_model
from prism_nemo.engine.optimizer import ModelOptimizer


def save_model(directory: Path, model: Chunks, optimizer: ModelOptimizer | None) -> None:
    """Into a new directory, with its manifest. A collective over all ranks of the default group."""
    files = plan_model(directory, model, optimizer)
    files.bring_to_host(set())
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, files.write())
    if dist.get_rank() == 0:
        files.complete([part for part in parts if part is not None])
    dist.barrier()
