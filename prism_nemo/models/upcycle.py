"""Sparse upcycling of a model in memory; `convert/upcycling.py` says what each parameter is made of, and streams it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prism_nemo.config.schema import DiscriminatorConfig
from prism_nemo.convert.qwen3_vl import mappings
from prism_nemo.convert.upcycling import dense_source, drawn, expert_noise, is_expert
from prism_nemo.engine.chunks import Chunks
from prism_nemo.models.weights import canonical_parameters, cut_as_expert, shard_of


def upcycle(
    model: Chunks,
    config: Mapping[str, Any],
    dense: Mapping[str, Tensor],
    options: DiscriminatorConfig,
    *,
    seed: int,
) -> None:
    """Fills a discriminator from the dense model's parameters, by canonical name, cut over the ranks in the same way."""
    declared = {name: mapping for mapping in mappings(config, score_head=True) for name in mapping.megatron_names}
    with torch.no_grad():
        for name, parameter in canonical_parameters(model, config).items():
            mapping = declared[name]
            shape = mapping.megatron_shape
            whole = drawn(name, shape, options, seed=seed)
            if whole is not None:
                parameter.copy_(whole)
                continue
            source = dense[dense_source(name)].detach()
            if is_expert(name):
                source = cut_as_expert(name, source, mapping.sharding)
            noise = expert_noise(name, shape, options, seed=seed)
            if noise is not None:
                source = source.float() + shard_of(name, noise, mapping.sharding).to(source.device)
            parameter.copy_(source)
