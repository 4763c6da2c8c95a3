"""Qwen3-VL configurations for tests: the official sizes, tiny ones, and transformers' models of them."""

from __future__ import annotations

import copy
from typing import Any

import torch

# layers, hidden, intermediate, heads, kv heads, tied, (experts, top-k, expert width), vision (depth, hidden, inter, deepstack)
SMALL_VISION = (24, 1024, 4096, [5, 11, 17])
LARGE_VISION = (27, 1152, 4304, [8, 16, 24])
OFFICIAL = {
    "2B": (28, 2048, 6144, 16, 8, True, None, SMALL_VISION),
    "4B": (36, 2560, 9728, 32, 8, True, None, SMALL_VISION),
    "8B": (36, 4096, 12288, 32, 8, False, None, LARGE_VISION),
    "32B": (64, 5120, 25600, 64, 8, False, None, LARGE_VISION),
    "32B, tied": (64, 5120, 25600, 64, 8, True, None, LARGE_VISION),
    "30B-A3B": (48, 2048, 6144, 32, 4, False, (128, 8, 768), LARGE_VISION),
    "235B-A22B": (94, 4096, 12288, 64, 4, False, (128, 8, 1536), LARGE_VISION),
}


def official_config(size: str) -> dict[str, Any]:
    """config.json in the Hub's form."""
    layers, hidden, intermediate, heads, kv_heads, tied, moe, (depth, vision_hidden, vision_intermediate, deepstack) = OFFICIAL[
        size
    ]
    text = {
        "model_type": "qwen3_vl_moe_text" if moe else "qwen3_vl_text",
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5000000,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "max_position_embeddings": 262144,
        "tie_word_embeddings": tied,
    }
    if moe:
        text |= dict(zip(("num_experts", "num_experts_per_tok", "moe_intermediate_size"), moe, strict=True))
        text |= {"mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": True}
    vision = {
        "depth": depth,
        "hidden_size": vision_hidden,
        "intermediate_size": vision_intermediate,
        "deepstack_visual_indexes": deepstack,
        "num_heads": 16,
        "in_channels": 3,
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "out_hidden_size": hidden,
        "num_position_embeddings": 2304,
    }
    return {
        "model_type": "qwen3_vl_moe" if moe else "qwen3_vl",
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": tied,
    }


def tiny_config(*, moe: bool = False, tied: bool = False) -> dict[str, Any]:
    config = official_config("30B-A3B" if moe else "2B")
    config["text_config"] |= {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config["text_config"] |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": tied}
    if moe:
        config["text_config"] |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config["vision_config"] |= {"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
    config["vision_config"] |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1], "patch_size": 4}
    config["tie_word_embeddings"] = tied
    return config


def transformers_model(config: dict[str, Any], device: str) -> torch.nn.Module:
    from transformers import (
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLMoeConfig,
        Qwen3VLMoeForConditionalGeneration,
    )

    moe = config["model_type"] == "qwen3_vl_moe"
    config_class = Qwen3VLMoeConfig if moe else Qwen3VLConfig
    model_class = Qwen3VLMoeForConditionalGeneration if moe else Qwen3VLForConditionalGeneration
    with torch.device(device):
        return model_class(config_class.from_dict(copy.deepcopy(config)))
