"""Transformer Engine and FP8: which settings go together, as far as the configuration and the installed packages tell.

What the GPU itself can do is checked when a stage starts, in `models/qwen3_vl/fp8.py`.
"""

from __future__ import annotations

import importlib.util

from prism_nemo.config.enums import Device, Precision, TransformerImpl
from prism_nemo.config.schema import DiscriminatorConfig, ModelConfig
from prism_nemo.errors import ConfigError

INSTALL = (
    "install the `gpu` extra (pip install --no-build-isolation 'prism-nemo[gpu]'), or use a container that has Transformer Engine"
)


def has_transformer_engine() -> bool:
    return importlib.util.find_spec("transformer_engine") is not None


def check_layers(model: ModelConfig | DiscriminatorConfig, device: Device, section: str) -> None:
    """Raises ConfigError, naming the keys of `section`, for layers that cannot be built so on this machine."""
    recipe = model.fp8_recipe
    impl = f"{section}.transformer_impl"
    if recipe is not None and model.precision is not Precision.bf16:
        raise ConfigError(
            f"FP8 quantises the products of a bf16 model, and this one is {model.precision}",
            where=f"{section}.fp8_recipe, {section}.precision",
            remedy=f"set {section}.precision=bf16, or {section}.fp8_recipe=null",
        )
    if recipe is not None and model.transformer_impl is TransformerImpl.local:
        raise ConfigError(
            "FP8 needs the layers of Transformer Engine, and the local ones are asked for",
            where=f"{section}.fp8_recipe, {impl}",
            remedy=f"set {impl}=auto, or {section}.fp8_recipe=null",
        )
    if recipe is None and model.transformer_impl is not TransformerImpl.transformer_engine:
        return
    key = impl if recipe is None else f"{section}.fp8_recipe"
    if device is Device.cpu:
        raise ConfigError(
            "Transformer Engine runs on CUDA devices only",
            where=f"{key}, runtime.device",
            remedy=f"set {key}={'null' if recipe else 'auto'}, or runtime.device=auto on a machine with a GPU",
        )
    if not has_transformer_engine():
        raise ConfigError(
            "Transformer Engine is not installed",
            where=key,
            remedy=f"{INSTALL}, or set {key}={'null' if recipe else 'auto'}",
        )
