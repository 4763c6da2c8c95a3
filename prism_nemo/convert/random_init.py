"""Random weights for a model directory that has none yet: a small model to try things out with."""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path

import torch
from torch import Tensor

from prism_nemo.convert.files import WEIGHTS_FILE, save_weights
from prism_nemo.convert.hf import load_model_config
from prism_nemo.convert.qwen3_vl import Config, Shape, check_expert_layouts_differ, hf_shapes
from prism_nemo.errors import CheckpointError


def write_random_weights(directory: Path, *, seed: int, dtype: torch.dtype = torch.float32) -> None:
    """Write model.safetensors into a directory that holds a config.json and no weights.

    The initialisation is transformers' (`PreTrainedModel._init_weights`): matrices, embeddings and the patch convolution
    N(0, initializer_range) of their part of the model, norms 1, biases 0. Every tensor is drawn in float32 from a generator of
    its own, seeded by `seed` and its name, so that neither order nor dtype nor the rest of the model changes it. The whole model
    is in memory at once. Raises CheckpointError when there are weights already or the configuration does not do.
    """
    config = load_model_config(directory)
    check_expert_layouts_differ(config)
    present = sorted(path.name for pattern in ("*.safetensors*", "*.bin") for path in directory.glob(pattern))
    if present:
        raise CheckpointError(
            f"the directory has weights already: {present[0]}", where=str(directory), remedy="another directory"
        )
    tensors = {name: _initial(config, name, shape, seed).to(dtype) for name, shape in hf_shapes(config).items()}
    unfinished = directory / f".{WEIGHTS_FILE}.{secrets.token_hex(4)}.incomplete"
    save_weights(unfinished, tensors)
    unfinished.rename(directory / WEIGHTS_FILE)


def _initial(config: Config, name: str, shape: Shape, seed: int) -> Tensor:
    """One tensor, float32."""
    if name.endswith(".bias"):
        return torch.zeros(shape)
    if len(shape) == 1:  # a norm: the model has no other one-dimensional weight
        return torch.ones(shape)
    return named_normal(name, shape, _std(config, name), seed)


def named_normal(name: str, shape: Shape, std: float, seed: int) -> Tensor:
    """N(0, std), float32: the same for the same name, shape and seed, whatever else is drawn."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
    return torch.empty(shape).normal_(0.0, std, generator=generator)


def _std(config: Config, name: str) -> float:
    part = "vision_config" if name.startswith("model.visual.") else "text_config"
    std = config[part].get("initializer_range")
    if std is None:
        raise CheckpointError(
            "the model's configuration lacks `initializer_range`", where=f"config.json: {part}", remedy="0.02 is usual"
        )
    return float(std)
