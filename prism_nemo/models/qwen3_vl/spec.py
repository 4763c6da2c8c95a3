"""Megatron layer specs of Qwen3-VL's language and vision layers, from modules that need neither Transformer Engine nor apex.

Checkpoint keys are those of the Transformer Engine spec (a norm belongs to the linear layer behind it), so that a checkpoint does
not depend on the spec that wrote it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from prism_nemo.config.enums import RecomputeGranularity, RecomputeModule
from prism_nemo.config.schema import ParallelConfig
from prism_nemo.models.context import RowContext
from prism_nemo.models.qwen3_vl.rope import rotate
from prism_nemo.models.router import GroupBalancedRouter


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm in fp32, cast, then scaled (as transformers' `Qwen3VLTextRMSNorm`)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class LayerNorm(torch.nn.LayerNorm):
    """torch's LayerNorm with Megatron's constructor."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)


class _NoCoreAttention(torch.nn.Module):
    """Megatron builds a core attention for every layer; ours comes with the row (`RowContext.attention`)."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()


class PackedSelfAttention(SelfAttention):
    """Self-attention over a packed row, or of decoded tokens over a cache.

    `packed_seq_params` carries the `RowContext`, `rotary_pos_emb` the (cos, sin) of every token's own position.
    """

    recompute_core = False  # see `set_recompute`

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: None = None,
        *,
        rotary_pos_emb: tuple[Tensor, Tensor],
        packed_seq_params: RowContext,
        **unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        query, key, value = (tensor.squeeze(1) for tensor in self.get_query_key_value_tensors(hidden_states))  # [T, heads, D]
        cos, sin = rotary_pos_emb
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        scale = self.hidden_size_per_attention_head**-0.5
        context = packed_seq_params
        if context.cache is not None:
            out = context.cache.attend(self.layer_number, query, key, value, scale, context.attention)
        else:
            assert context.attention is not None, "a row without a cache needs its attention pattern"
            if self.recompute_core and torch.is_grad_enabled():
                out = checkpoint(context.attention, query, key, value, scale, use_reentrant=False, preserve_rng_state=False)
            else:
                out = context.attention(query, key, value, scale)
        return self.linear_proj(out.flatten(1).unsqueeze(1))


class RowTransformerLayer(TransformerLayer):
    """A layer over a packed row; hands the row's context to the router, which Megatron gives nothing but hidden states."""

    recompute_all = recompute_mlp_part = False  # see `set_recompute`

    def run(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], context: RowContext) -> Tensor:
        """[T, 1, hidden] -> the same."""

        def layer(hidden: Tensor) -> Any:
            return self(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=context)[0]

        return self.recomputed(layer, hidden) if self.recompute_all and torch.is_grad_enabled() else layer(hidden)

    def forward(self, *args: Any, packed_seq_params: RowContext, **kwargs: Any) -> Any:
        self._routing = packed_seq_params.routing
        return super().forward(*args, packed_seq_params=packed_seq_params, **kwargs)

    def _forward_mlp(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        routing = self._routing

        def mlp(hidden: Tensor) -> Any:
            if self.is_moe_layer:  # set here: when this is computed again, another row may have come in between
                self.mlp.router.context = routing
            return super(RowTransformerLayer, self)._forward_mlp(hidden, *args, **kwargs)

        again = self.recompute_mlp_part and torch.is_grad_enabled()
        return self.recomputed(mlp, hidden_states) if again else mlp(hidden_states)

    def recomputed(self, function: Callable[[Tensor], Any], hidden: Tensor) -> Any:
        """`function(hidden)`, computed again in backward. Layers draw no random numbers, so no generator is restored."""
        return checkpoint(function, hidden, use_reentrant=False, preserve_rng_state=False)


def set_recompute(model: torch.nn.Module, parallel: ParallelConfig) -> None:
    """What the layers of a model compute again in backward instead of keeping it."""
    full = parallel.recompute_granularity is RecomputeGranularity.full
    modules = parallel.recompute_modules if parallel.recompute_granularity is RecomputeGranularity.selective else []
    for module in model.modules():
        if isinstance(module, RowTransformerLayer):
            module.recompute_all = full
            module.recompute_mlp_part = RecomputeModule.mlp in modules
        elif isinstance(module, PackedSelfAttention):
            module.recompute_core = RecomputeModule.core_attn in modules


def attention_spec(
    mask_type: AttnMaskType, qk_norm: type | None, *, qkv: type = ColumnParallelLinear, proj: type = RowParallelLinear
) -> ModuleSpec:
    """Attention over packed rows, with these linear modules around it."""
    return ModuleSpec(
        module=PackedSelfAttention,
        params={"attn_mask_type": mask_type},
        submodules=SelfAttentionSubmodules(
            linear_qkv=qkv,
            core_attention=_NoCoreAttention,
            linear_proj=proj,
            q_layernorm=qk_norm,
            k_layernorm=qk_norm,
        ),
    )


def language_layer_spec(*, moe: bool) -> ModuleSpec:
    """One language layer, dense or with experts."""
    linear = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    keys = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if moe:
        mlp = ModuleSpec(
            module=MoELayer,
            submodules=MoESubmodules(experts=ModuleSpec(module=SequentialMLP, submodules=linear), router=GroupBalancedRouter),
        )
    else:
        mlp = ModuleSpec(module=MLP, submodules=linear)
        keys["pre_mlp_layernorm."] = "mlp.linear_fc1.layer_norm_"
    return ModuleSpec(
        module=RowTransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=attention_spec(AttnMaskType.causal, RMSNorm),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=keys,
        ),
    )


def vision_layer_spec() -> ModuleSpec:
    """One vision block."""
    return ModuleSpec(
        module=RowTransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=LayerNorm,
            self_attention=attention_spec(AttnMaskType.no_mask, None),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=LayerNorm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )
