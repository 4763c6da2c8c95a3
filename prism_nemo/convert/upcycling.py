"""Sparse upcycling, tensor by tensor: what each parameter of an MoE discriminator is made of.

Every expert is the dense MLP plus noise, the router and the scalar head are drawn anew, everything else is copied. Noise is drawn
per tensor from a generator seeded by the tensor's name, so that neither the layout nor the way of building changes it: a
discriminator that a stage builds in memory and one that `convert upcycle` streams are the same, bit for bit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from torch import Tensor

from prism_nemo.config.schema import DiscriminatorConfig
from prism_nemo.convert.dtypes import DType
from prism_nemo.convert.pieces import Computed, Files, Piece, read_tensor
from prism_nemo.convert.qwen3_vl import MEGATRON_SCORE_HEAD, Shape, mappings
from prism_nemo.convert.random_init import named_normal
from prism_nemo.convert.sources import Source
from prism_nemo.errors import ConfigError

_EXPERT = re.compile(r"\.mlp\.experts\.(linear_fc[12])\.weight\d+$")
_NORM_BEFORE_EXPERTS = ".pre_mlp_layernorm."


def upcycled_config(dense: Mapping[str, Any], config: DiscriminatorConfig) -> dict[str, Any]:
    """The `config.json` of the discriminator that a dense model becomes; with one expert it stays dense."""
    if dense["model_type"] != "qwen3_vl":
        raise ConfigError(
            "only a dense model can be upcycled, this one has experts already",
            where="discriminator.path",
            remedy="use a dense Qwen3-VL, or a discriminator checkpoint",
        )
    # A discriminator has no output head, so it is neither tied nor untied; tied leaves the output weight out.
    result = {**dense, "tie_word_embeddings": True, "text_config": dict(dense["text_config"])}
    if config.num_experts > 1:
        result["model_type"] = "qwen3_vl_moe"
        result["architectures"] = ["Qwen3VLMoeForConditionalGeneration"]
        result["text_config"].update(
            model_type="qwen3_vl_moe_text",
            num_experts=config.num_experts,
            num_experts_per_tok=config.moe_router_topk,
            moe_intermediate_size=dense["text_config"]["intermediate_size"],
            decoder_sparse_step=1,
            mlp_only_layers=[],
            norm_topk_prob=True,
        )
        result["vision_config"] = {**dense["vision_config"], "model_type": "qwen3_vl_moe"}
    return result


def dense_source(name: str) -> str:
    """The canonical name of the dense tensor that an upcycled one is made from."""
    name = _EXPERT.sub(r".mlp.\1.weight", name)
    return name.replace(_NORM_BEFORE_EXPERTS, ".mlp.linear_fc1.layer_norm_")


def is_expert(name: str) -> bool:
    """Whether the canonical name is an expert's matrix."""
    return _EXPERT.search(name) is not None


def drawn(name: str, shape: Shape, options: DiscriminatorConfig, *, seed: int) -> Tensor | None:
    """The full parameter, float32, where it is made of nothing: the head and the routers."""
    if name == MEGATRON_SCORE_HEAD:
        return named_normal(name, shape, options.head_init_std, seed)
    if name.endswith(".mlp.router.weight"):
        return named_normal(name, shape, options.router_init_std, seed)
    return None


def expert_noise(name: str, shape: Shape, options: DiscriminatorConfig, *, seed: int) -> Tensor | None:
    """What is added in float32 to an expert's copy of the dense MLP, full; None for all other parameters."""
    if not is_expert(name) or options.expert_noise_std <= 0:
        return None
    return named_normal(name, shape, options.expert_noise_std, seed)


class UpcycledSource:
    """The parameters of the discriminator (`config`) that a dense model becomes, in the dense model's type."""

    def __init__(self, dense: Source, config: Mapping[str, Any], options: DiscriminatorConfig, *, seed: int) -> None:
        self.dense = dense
        self._shapes = {
            name: shape
            for mapping, shape in ((mapping, mapping.megatron_shape) for mapping in mappings(config, score_head=True))
            for name in mapping.megatron_names
        }
        self._options = options
        self._seed = seed
        # Gate and up are written apart, one after the other, by each of a few threads.
        self._noise = lru_cache(maxsize=4)(lambda name: expert_noise(name, self._shapes[name], options, seed=seed))

    @property
    def dtype(self) -> DType:
        return self.dense.dtype

    @property
    def files(self) -> list[Path]:
        return self.dense.files

    @property
    def io(self) -> Files:
        return self.dense.io

    def pieces(self, name: str, first: int, last: int) -> list[Piece]:
        shape = self._shapes[name]
        is_drawn = name == MEGATRON_SCORE_HEAD or name.endswith(".mlp.router.weight")
        is_noisy = is_expert(name) and self._options.expert_noise_std > 0
        if not is_drawn and not is_noisy:
            return self.dense.pieces(dense_source(name), first, last)
        nbytes = (last - first) * prod(shape[1:]) * self.dtype.itemsize
        return [Computed(nbytes, lambda: self._computed(name, first, last).to(self.dtype.torch))]

    def _computed(self, name: str, first: int, last: int) -> Tensor:
        shape = self._shapes[name]
        whole = drawn(name, shape, self._options, seed=self._seed)
        if whole is not None:
            return whole[first:last]
        noise = self._noise(name)
        assert noise is not None
        pieces = self.dense.pieces(dense_source(name), first, last)
        return read_tensor(pieces, self.io, (last - first, *shape[1:]), self.dtype).float() + noise[first:last]
