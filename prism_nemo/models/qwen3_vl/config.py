"""Qwen3-VL's shape, read from a HuggingFace `config.json`, and Megatron's configurations made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from prism_nemo.config.enums import Precision
from prism_nemo.config.schema import ParallelConfig
from prism_nemo.errors import ConfigError, LayoutError
from prism_nemo.models.qwen3_vl.fp8 import LOCAL, LayerKind

gelu_tanh = partial(F.gelu, approximate="tanh")


@dataclass(frozen=True)
class MoEShape:
    """The experts of every language layer."""

    num_experts: int
    topk: int
    ffn_hidden_size: int


@dataclass(frozen=True)
class VisionShape:
    depth: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    out_hidden_size: int
    num_position_embeddings: int
    deepstack_layers: tuple[int, ...]  # vision layers whose output is added after language layers 0, 1, ...

    @property
    def patch_width(self) -> int:
        """Values in one flattened patch."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class Qwen3VLShape:
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]
    tie_word_embeddings: bool
    image_token_id: int
    video_token_id: int
    vision: VisionShape
    moe: MoEShape | None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Qwen3VLShape:
        """Reads a parsed `config.json` of transformers 4.57 or 5.x.

        Raises ConfigError for another architecture, for what would be computed otherwise, and for a missing key.
        """
        try:
            return cls._from_hf(config)
        except KeyError as error:
            raise ConfigError(
                f"the model's configuration lacks {error}", where="config.json", remedy="copy the model's config.json again"
            ) from error

    @classmethod
    def _from_hf(cls, config: Mapping[str, Any]) -> Qwen3VLShape:
        if config.get("model_type") not in ("qwen3_vl", "qwen3_vl_moe"):
            raise ConfigError(
                f"the model is a {config.get('model_type')!r}",
                where="config.json: model_type",
                remedy="use a Qwen3-VL (qwen3_vl or qwen3_vl_moe) directory",
            )
        text, vision = config["text_config"], config["vision_config"]
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in ("default", "mrope"):
            raise ConfigError(f"rope type {kind!r} is not supported", where="config.json: text_config", remedy="use 'default'")
        for section, supported in (("text_config", "silu"), ("vision_config", "gelu_pytorch_tanh")):
            activation = config[section].get("hidden_act", supported)
            if activation != supported:
                raise ConfigError(
                    f"the activation {activation!r} is not supported",
                    where=f"config.json: {section}.hidden_act",
                    remedy=f"every official Qwen3-VL has {supported!r}",
                )
        return cls(
            num_layers=text["num_hidden_layers"],
            hidden_size=text["hidden_size"],
            ffn_hidden_size=text["intermediate_size"],
            num_heads=text["num_attention_heads"],
            num_kv_heads=text["num_key_value_heads"],
            head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
            vocab_size=text["vocab_size"],
            rms_norm_eps=text["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta") or text["rope_theta"]),
            mrope_section=tuple(rope.get("mrope_section", (24, 20, 20))),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            image_token_id=config["image_token_id"],
            video_token_id=config["video_token_id"],
            vision=_vision_shape(vision),
            moe=_moe_shape(config["model_type"], text),
        )

    def check_layout(self, parallel: ParallelConfig) -> None:
        """Raises LayoutError, naming the key, when the model cannot be cut so."""
        tp = parallel.tensor_model_parallel_size
        for name, size in (
            ("attention heads", self.num_heads),
            ("key/value heads", self.num_kv_heads),
            ("vision attention heads", self.vision.num_heads),
            ("vocabulary entries", self.vocab_size),
        ):
            if size % tp:
                raise LayoutError(
                    f"{size} {name} do not divide by a tensor-parallel size of {tp}",
                    where="parallel.tensor_model_parallel_size",
                    remedy=f"use a divisor of {size}",
                )

    def language_config(self, parallel: ParallelConfig, precision: Precision, layers: LayerKind = LOCAL) -> TransformerConfig:
        """Megatron's configuration of the language model."""
        tp, ep = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
        moe: dict[str, Any] = {}
        if self.moe is not None:
            moe = {
                "num_moe_experts": self.moe.num_experts,
                "moe_router_topk": self.moe.topk,
                "moe_ffn_hidden_size": self.moe.ffn_hidden_size,
                "moe_router_dtype": "fp32",
                "moe_router_load_balancing_type": "none",  # ours: models/router.py
                "moe_grouped_gemm": layers.transformer_engine,
                "expert_model_parallel_size": ep,
                "expert_tensor_parallel_size": parallel.expert_tensor_parallel_size or (tp if ep == 1 else 1),
            }
        return TransformerConfig(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.num_heads,
            num_query_groups=self.num_kv_heads,
            kv_channels=self.head_dim,
            normalization="RMSNorm",
            layernorm_epsilon=self.rms_norm_eps,
            qk_layernorm=True,
            activation_func=F.silu,
            gated_linear_unit=True,
            add_bias_linear=False,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            num_layers_in_first_pipeline_stage=parallel.num_layers_in_first_pipeline_stage,
            num_layers_in_last_pipeline_stage=parallel.num_layers_in_last_pipeline_stage,
            context_parallel_size=parallel.context_parallel_size,
            # Megatron trains experts under tensor parallelism with sequence parallelism only; the numbers are the same.
            sequence_parallel=tp > 1 and (parallel.sequence_parallel or self.moe is not None),
            variable_seq_lengths=True,
            # megatron-core 0.16.1 gives wrong gradients with its default of batched exchanges between interleaved chunks
            overlap_p2p_comm=parallel.virtual_pipeline_model_parallel_size is not None,
            batch_p2p_comm=parallel.virtual_pipeline_model_parallel_size is None,
            **moe,
            **{**_common(precision), **layers.megatron_fields},
        )

    def vision_config(self, parallel: ParallelConfig, precision: Precision) -> TransformerConfig:
        """Megatron's configuration of the vision tower, which lives whole on the first pipeline stage."""
        return TransformerConfig(
            num_layers=self.vision.depth,
            hidden_size=self.vision.hidden_size,
            ffn_hidden_size=self.vision.ffn_hidden_size,
            num_attention_heads=self.vision.num_heads,
            normalization="LayerNorm",
            layernorm_epsilon=1e-6,
            activation_func=gelu_tanh,
            add_bias_linear=True,
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            **_common(precision),
        )


def _common(precision: Precision) -> dict[str, Any]:
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    return {
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": True,
        "perform_initialization": False,  # every weight comes from a checkpoint; loading checks that none is missing
        "use_cpu_initialization": True,
        "calculate_per_token_loss": True,  # Megatron scales nothing: engine/step.py does
        "deallocate_pipeline_outputs": False,
        "moe_token_dispatcher_type": "alltoall",  # variable row lengths need it, in dense models too
        "cuda_graph_scope": [],
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": precision is Precision.bf16,
    }


def _vision_shape(vision: Mapping[str, Any]) -> VisionShape:
    return VisionShape(
        depth=vision["depth"],
        hidden_size=vision["hidden_size"],
        ffn_hidden_size=vision["intermediate_size"],
        num_heads=vision["num_heads"],
        in_channels=vision.get("in_channels", 3),
        patch_size=vision["patch_size"],
        temporal_patch_size=vision["temporal_patch_size"],
        spatial_merge_size=vision["spatial_merge_size"],
        out_hidden_size=vision["out_hidden_size"],
        num_position_embeddings=vision["num_position_embeddings"],
        deepstack_layers=tuple(vision["deepstack_visual_indexes"]),
    )


def _moe_shape(model_type: str, text: Mapping[str, Any]) -> MoEShape | None:
    if model_type != "qwen3_vl_moe":
        return None
    if text.get("mlp_only_layers") or text.get("decoder_sparse_step", 1) != 1:
        raise ConfigError(
            "layers without experts in an MoE model are not supported",
            where="config.json: text_config.mlp_only_layers, decoder_sparse_step",
            remedy="every official Qwen3-VL MoE has experts in all layers",
        )
    # transformers 5.x saves num_experts as num_local_experts
    num_experts = text.get("num_experts") or text["num_local_experts"]
    return MoEShape(num_experts, text["num_experts_per_tok"], text["moe_intermediate_size"])
