"""Weights between a HuggingFace directory and a Megatron model, tensor by tensor through the one mapping.

Offline conversion, loading at the start of a stage, export and weight sync to rollout engines all use these two functions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from prism_nemo.convert.hf import HFReader, export_tensors, import_tensors
from prism_nemo.convert.ops import Sharding
from prism_nemo.convert.qwen3_vl import canonical_name, mappings
from prism_nemo.engine.checkpoint import is_model_checkpoint, load_model
from prism_nemo.errors import CheckpointError

_EXPERT = re.compile(r"\.mlp\.experts\.linear_fc[12]\.weight\d+$")


def canonical_parameters(model: torch.nn.Module, config: Mapping[str, Any]) -> dict[str, torch.nn.Parameter]:
    """The parameters of an (unwrapped) model by canonical Megatron name."""
    return {canonical_name(name, config): parameter for name, parameter in model.named_parameters()}


def load_weights(module: torch.nn.Module, path: Path, config: Mapping[str, Any], *, score_head: bool = False) -> None:
    """Fills a model from a checkpoint of this project or from a HuggingFace directory. A collective."""
    if is_model_checkpoint(path):
        load_model(path, module, None)
    else:
        load_hf_weights(module, path, config, score_head=score_head)


def load_hf_weights(model: torch.nn.Module, directory: Path, config: Mapping[str, Any], *, score_head: bool = False) -> None:
    """Fills the model's parameters, this rank's shard of each, from a HuggingFace directory.

    Raises CheckpointError for missing, unexpected or truncated tensors; every parameter of the model is filled, or it raises.
    """
    parameters = canonical_parameters(model, config)
    missing = set(parameters)
    with HFReader(directory) as reader, torch.no_grad():
        for name, full, sharding in import_tensors(reader, config, score_head=score_head, wanted=parameters.__contains__):
            parameters[name].copy_(shard_of(name, full, sharding))
            missing.discard(name)
    if missing:
        raise CheckpointError(
            f"nothing to fill {len(missing)} parameters with, {sorted(missing)[0]} among them", where=str(directory)
        )


def export_hf_tensors(
    model: torch.nn.Module, config: Mapping[str, Any], *, score_head: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """(HuggingFace name, full tensor) of every parameter, gathered over tensor-parallel ranks; every rank must iterate."""
    parameters = canonical_parameters(model, config)
    shardings: dict[str, Sharding] = {
        name: mapping.sharding for mapping in mappings(config, score_head=score_head) for name in mapping.megatron_names
    }

    def get_full(name: str) -> Tensor:
        local = parameters[name].detach()
        group = _group(name)
        if group.size() == 1:
            return local
        shards = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(shards, local.contiguous(), group=group)
        return shardings[name].unshard(shards)

    return export_tensors(config, get_full, score_head=score_head)


def shard_of(name: str, full: Tensor, sharding: Sharding) -> Tensor:
    """This rank's part of a full tensor."""
    group = _group(name)
    return sharding.shard(full, group.rank(), group.size())


def _group(name: str) -> dist.ProcessGroup:
    """The ranks that a parameter is cut over."""
    if _EXPERT.search(name):
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()
