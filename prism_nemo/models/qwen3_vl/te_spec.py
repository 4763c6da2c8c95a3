"""The language layers from Transformer Engine's modules, for CUDA devices; the same parameters under the same checkpoint keys.

Its linear modules hold the norm in front of them and run in FP8 inside of an FP8 context. Attention stays our own, and so do the
norms of queries, keys and hidden states that no linear module follows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.extensions import transformer_engine as te
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor

from prism_nemo.errors import ConfigError
from prism_nemo.models.qwen3_vl.spec import RMSNorm, RowTransformerLayer, attention_spec
from prism_nemo.models.router import GroupBalancedRouter


class TERowTransformerLayer(RowTransformerLayer):
    """A layer whose recomputation knows FP8: the second forward pass must neither count in the scales nor see newer ones."""

    def recomputed(self, function: Callable[[Tensor], Any], hidden: Tensor) -> Any:
        if not hidden.requires_grad:  # nothing in front is trained, nor then is the layer: there is no backward pass
            return function(hidden)
        return te.te_checkpoint(function, False, get_cuda_rng_tracker, self.pg_collection.tp, hidden)


def te_language_layer_spec(*, moe: bool) -> ModuleSpec:
    """One language layer, dense or with experts. Raises ConfigError when Transformer Engine is there but cannot be imported."""
    if not te.HAVE_TE or te.TEColumnParallelGroupedLinear is None:
        raise ConfigError(
            "Transformer Engine is installed, and Megatron cannot use it: it does not import, or is too old",
            where="transformer_impl",
            remedy="see what `python -c 'import transformer_engine.pytorch'` says and install 2.9 to 2.11 for your CUDA version "
            "(the `gpu` extra), or set transformer_impl=local",
        )
    if moe:
        linear = MLPSubmodules(linear_fc1=te.TEColumnParallelGroupedLinear, linear_fc2=te.TERowParallelGroupedLinear)
        experts = ModuleSpec(module=TEGroupedMLP, submodules=linear)
        norm = {"pre_mlp_layernorm": RMSNorm}  # the router needs its output too
        mlp = ModuleSpec(module=MoELayer, submodules=MoESubmodules(experts=experts, router=GroupBalancedRouter))
    else:
        norm = {}
        linear = MLPSubmodules(linear_fc1=te.TELayerNormColumnParallelLinear, linear_fc2=te.TERowParallelLinear)
        mlp = ModuleSpec(module=MLP, submodules=linear)
    return ModuleSpec(
        module=TERowTransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=attention_spec(
                AttnMaskType.causal, RMSNorm, qkv=te.TELayerNormColumnParallelLinear, proj=te.TERowParallelLinear
            ),
            self_attn_bda=get_bias_dropout_add,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            **norm,
        ),
    )
