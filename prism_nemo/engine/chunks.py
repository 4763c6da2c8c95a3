"""A model as Megatron's schedules see it: one module, or under interleaved pipelining several chunks a rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Chunks = torch.nn.Module | Sequence[Any]


def chunks_of(model: Chunks) -> Sequence[Any]:
    """This rank's chunks of a model, in the order of its layers."""
    return [model] if isinstance(model, torch.nn.Module) else model
