"""Weights between a HuggingFace directory and a Megatron model, tensor by tensor through the one mapping.

Offline conversion, loading at the start of a stage, export and weight sync to rollout engines all use these functions. A model
is one module, or under interleaved pipelining the list of this rank's chunks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from prism_nemo.convert.hf import HFReader, export_rows, export_tensors, import_tensors
from prism_nemo.convert.ops import Sharding
from prism_nemo.convert.qwen3_vl import ExpertLayout, ParameterMapping, canonical_name, check_expert_layouts_differ, mappings
from prism_nemo.engine.chunks import Chunks, chunks_of
from prism_nemo.engine.model_checkpoint import is_model_checkpoint, load_model
from prism_nemo.engine.runtime import on_wire
from prism_nemo.errors import CheckpointError

_EXPERT = re.compile(r"(\.mlp\.experts\.linear_fc[12]\.weight)(\d+)$")
_LAYER = re.compile(r"^(language_model\.decoder\.layers\.)(\d+)(?=\.)")
_EMBEDDING, _OUTPUT = "language_model.embedding.word_embeddings.weight", "language_model.output_layer.weight"


def canonical_parameters(model: Chunks, config: Mapping[str, Any]) -> dict[str, torch.nn.Parameter]:
    """This rank's parameters of an (unwrapped) model by canonical Megatron name.

    Layers and experts are numbered through the whole model. The last pipeline stage's copy of a tied embedding bears the
    embedding's name.
    """
    found: dict[str, torch.nn.Parameter] = {}
    for chunk in chunks_of(model):
        for local, parameter in chunk.named_parameters():
            name = canonical_name(_global_layer(local, chunk), config)
            if _EXPERT.search(name):
                name = _global_expert(name, chunk)
            if name == _OUTPUT and chunk.share_embeddings_and_output_weights:
                name = _EMBEDDING
            found[name] = parameter
    return found


def _global_layer(name: str, chunk: torch.nn.Module) -> str:
    def number(match: re.Match[str]) -> str:
        layer: Any = chunk.get_submodule(match[0])
        return f"{match[1]}{layer.layer_number - 1}"

    return _LAYER.sub(number, name)


def _global_expert(name: str, chunk: torch.nn.Module) -> str:
    """An expert's number in the whole model; on each of the ranks that share the experts they count from 0."""
    shape: Any = chunk.shape
    first = parallel_state.get_expert_model_parallel_rank() * _experts_per_rank(shape.moe.num_experts)
    return _EXPERT.sub(lambda match: f"{match[1]}{first + int(match[2])}", name)


def _experts_per_rank(num_experts: int) -> int:
    return num_experts // parallel_state.get_expert_model_parallel_world_size()


def load_weights(model: Chunks, path: Path, config: Mapping[str, Any], *, score_head: bool = False) -> None:
    """Fills a model from a checkpoint of this project or from a HuggingFace directory. A collective."""
    if is_model_checkpoint(path):
        load_model(path, chunks_of(model), None)
    else:
        load_hf_weights(model, path, config, score_head=score_head)


def load_hf_weights(model: Chunks, directory: Path, config: Mapping[str, Any], *, score_head: bool = False) -> None:
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
    model: Chunks, config: Mapping[str, Any], *, layout: ExpertLayout = ExpertLayout.hub, score_head: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """(HuggingFace name, full tensor) of every parameter, gathered over the ranks that share a model; every rank must iterate."""
    gather = _Gather(model, config, score_head=score_head)
    return export_tensors(config, gather, layout=layout, score_head=score_head)


@dataclass(frozen=True, eq=False)
class HFTensors:
    """What `export_hf_tensors` gives, to be iterated as often as one likes: each time the weights of that moment.

    Which parameters make which tensors is looked up once; the model's parameters must stay the same objects.
    """

    model: Chunks
    config: Mapping[str, Any]
    layout: ExpertLayout = ExpertLayout.hub

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return export_rows(self._rows, self._gather)

    def with_separate_experts(self) -> HFTensors:
        """The same with a tensor for each matrix of each expert: views, where the Hub's fused layout is a transposed copy."""
        return self._separate

    @cached_property
    def _separate(self) -> HFTensors:
        return replace(self, layout=ExpertLayout.separate)

    @cached_property
    def _rows(self) -> list[ParameterMapping]:
        check_expert_layouts_differ(self.config)
        return mappings(self.config, layout=self.layout)

    @cached_property
    def _gather(self) -> _Gather:
        """Made when the tensors are read for the first time, by all ranks: it is a collective."""
        return _Gather(self.model, self.config, score_head=False)


class _Gather:
    """The full tensor of a canonical name on every rank. A call is a collective of the ranks that share a model."""

    def __init__(self, model: Chunks, config: Mapping[str, Any], *, score_head: bool) -> None:
        self._parameters = canonical_parameters(model, config)
        self._mappings = {name: mapping for mapping in mappings(config, score_head=score_head) for name in mapping.megatron_names}
        self._like = next(iter(self._parameters.values()))
        self._num_experts: int = config["text_config"].get("num_experts") or 1
        self._stages = parallel_state.get_pipeline_model_parallel_group()
        self._expert_ranks = parallel_state.get_expert_model_parallel_group()
        self._cut_over = {name: _group(name) for name in self._parameters}
        self._stage_of = self._find_stages()

    def _find_stages(self) -> dict[str, int]:
        """The pipeline stage that holds a name (the first, where two do); an expert goes by its number on every rank alike."""
        held: list[Any] = [[_without_expert(name) for name in self._parameters]]
        if self._stages.size() > 1:
            held *= self._stages.size()
            dist.all_gather_object(held, held[self._stages.rank()], group=self._stages)
        return {name: stage for stage in reversed(range(len(held))) for name in held[stage]}

    def __call__(self, name: str) -> Tensor:
        stage = self._stage_of[_without_expert(name)]
        full = self._from_this_stage(name) if stage == self._stages.rank() else None
        return self._broadcast(full, name, self._stages, stage)

    def _from_this_stage(self, name: str) -> Tensor:
        full = None
        if name in self._parameters:
            full = _joined(self._parameters[name].detach(), self._mappings[name].sharding, self._cut_over[name])
        expert = _EXPERT.search(name)
        if expert is None:
            assert full is not None
            return full
        owner = int(expert[2]) * self._expert_ranks.size() // self._num_experts
        return self._broadcast(full, name, self._expert_ranks, owner)

    def _broadcast(self, full: Tensor | None, name: str, group: dist.ProcessGroup, source: int) -> Tensor:
        if group.size() > 1:
            if full is None:
                shape = self._mappings[name].megatron_shape
                full = torch.empty(shape, dtype=self._like.dtype, device=self._like.device)
            full = full.contiguous()
            dist.broadcast(full, group=group, group_src=source)
        assert full is not None
        return full


def _without_expert(name: str) -> str:
    return _EXPERT.sub(r"\1", name)


def shard_of(name: str, full: Tensor, sharding: Sharding) -> Tensor:
    """This rank's part of a full tensor."""
    group = _group(name)
    return sharding.shard(full, group.rank(), group.size())


def cut_as_expert(name: str, dense: Tensor, sharding: Sharding) -> Tensor:
    """This rank's part of an expert `name` that equals a dense MLP's tensor, from its part of that.

    They are cut alike unless experts are cut over fewer ranks than the rest: then the parts are joined first. A collective.
    """
    tensor_parallel = parallel_state.get_tensor_model_parallel_group()
    if tensor_parallel.size() == _group(name).size():
        return dense
    return shard_of(name, _joined(dense, sharding, tensor_parallel), sharding)


def _joined(local: Tensor, sharding: Sharding, group: dist.ProcessGroup) -> Tensor:
    """The full tensor from every rank's shard."""
    if group.size() == 1:
        return local
    here = local.device
    local = on_wire(local, group).contiguous()
    shards = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(shards, local, group=group)
    return sharding.unshard(shards).to(here)


def _group(name: str) -> dist.ProcessGroup:
    """The ranks that a parameter is cut over."""
    if _EXPERT.search(name):
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()
