"""Sparse upcycling: the weights of an MoE discriminator from those of a dense Qwen3-VL.

Every expert is the dense MLP plus noise, the router and the scalar head are drawn anew, everything else is copied. Noise is
drawn per tensor from a generator seeded by the tensor's name, so that it does not depend on the layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from prism_nemo.config.schema import DiscriminatorConfig
from prism_nemo.convert.qwen3_vl import MEGATRON_SCORE_HEAD, mappings
from prism_nemo.convert.random_init import named_normal
from prism_nemo.engine.chunks import Chunks
from prism_nemo.errors import ConfigError
from prism_nemo.models.weights import canonical_parameters, cut_as_expert, shard_of

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
            if name == MEGATRON_SCORE_HEAD or name.endswith(".mlp.router.weight"):
                std = options.head_init_std if name == MEGATRON_SCORE_HEAD else options.router_init_std
                parameter.copy_(named_normal(name, mapping.megatron_shape, std, seed))
                continue
            source = dense[dense_source(name)].detach()
            if _EXPERT.search(name):
                source = cut_as_expert(name, source, mapping.sharding)
            if _EXPERT.search(name) and options.expert_noise_std > 0:
                noise = named_normal(name, mapping.megatron_shape, options.expert_noise_std, seed)
                source = source.float() + shard_of(name, noise, mapping.sharding).to(source.device)
            parameter.copy_(source)
