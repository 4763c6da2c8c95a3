"""FP8: what each recipe means for Megatron, for the GPU, for the length of rows and for the sizes of a model.

Only the products of the language layers' linear modules run in FP8 (attention's projections, MLPs, experts). Their weights stay
in bf16, and so do attention itself, norms, embedding, output head, score head and the vision tower; the experts' router computes
in fp32. Nothing here imports Transformer Engine.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.fp8_utils import get_fp8_align_size, get_fp8_context
from megatron.core.transformer.transformer_config import TransformerConfig

from prism_nemo.config.enums import Device, Fp8Recipe, Precision, TransformerImpl
from prism_nemo.config.fp8 import check_layers, has_transformer_engine
from prism_nemo.config.schema import DiscriminatorConfig, ModelConfig, ParallelConfig
from prism_nemo.engine.runtime import cuda_capability
from prism_nemo.errors import ConfigError, LayoutError

if TYPE_CHECKING:
    from prism_nemo.models.qwen3_vl.config import Qwen3VLShape

_BLOCK = 128  # of the blockwise recipe
# E5M2's range for gradients where a whole tensor shares a scale; with a scale a block, E4M3's finer steps serve them too. So are
# Transformer Engine's own defaults.
_FORMAT = {Fp8Recipe.delayed: "hybrid", Fp8Recipe.tensorwise: "hybrid", Fp8Recipe.blockwise: "e4m3", Fp8Recipe.mxfp8: "e4m3"}


@dataclass(frozen=True)
class LayerKind:
    """What the language layers are made of; an FP8 recipe needs Transformer Engine."""

    transformer_engine: bool = False
    fp8_recipe: Fp8Recipe | None = None

    @property
    def megatron_fields(self) -> dict[str, Any]:
        """Of `TransformerConfig`, what differs from a model of local layers."""
        fields: dict[str, Any] = {}
        if self.transformer_engine:
            # On the CPU its wrappers would fill every weight from an uninitialised fp32 copy of the uncut one.
            fields["use_cpu_initialization"] = False
        if self.fp8_recipe is not None:
            fields |= {"fp8": _FORMAT[self.fp8_recipe], "fp8_recipe": self.fp8_recipe.value}
        if self.fp8_recipe is Fp8Recipe.delayed:  # Megatron's default looks back one step only
            fields |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
        return fields

    def tokens_per_rank(self, parallel: ParallelConfig) -> int:
        """Each rank's slice of a row must be a multiple of this, in tokens.

        Where sequence parallelism gathers slices in FP8, each must be made of whole blocks.
        """
        if self.fp8_recipe is None:
            return 1
        if self.fp8_recipe is Fp8Recipe.blockwise and parallel.tensor_model_parallel_size > 1:
            return _BLOCK
        return int(get_fp8_align_size(self.fp8_recipe.value))

    def check_sizes(self, shape: Qwen3VLShape, parallel: ParallelConfig) -> None:
        """Raises LayoutError when a side of a rank's weight does not suit the recipe."""
        if self.fp8_recipe is None:
            return
        tp, ep = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
        heads = shape.head_dim * shape.num_heads
        sides = {
            "the hidden size": (shape.hidden_size, self.tokens_per_rank(parallel)),
            "a rank's queries": (heads // tp, self._align),
            "a rank's queries, keys and values": ((heads + 2 * shape.head_dim * shape.num_kv_heads) // tp, self._align),
        }
        if shape.moe is None:
            sides["a rank's part of the MLP"] = (shape.ffn_hidden_size // tp, self._align)
        else:
            experts_tp = parallel.expert_tensor_parallel_size or (tp if ep == 1 else 1)
            sides["a rank's part of an expert"] = (shape.moe.ffn_hidden_size // experts_tp, self._align)
        for name, (size, align) in sides.items():
            if size % align:
                raise LayoutError(
                    f"{name}, {size}, is no multiple of {align}, which FP8 ({self.fp8_recipe}) needs",
                    where="fp8_recipe, parallel.tensor_model_parallel_size",
                    remedy="use a smaller tensor-parallel size, another recipe, or fp8_recipe=null",
                )

    @property
    def _align(self) -> int:
        assert self.fp8_recipe is not None
        return int(get_fp8_align_size(self.fp8_recipe.value))


LOCAL = LayerKind()


def layer_kind(config: ModelConfig | DiscriminatorConfig, device: torch.device) -> LayerKind:
    """What a model's layers are made of on this device. Raises ConfigError for what it cannot run."""
    section = "discriminator" if isinstance(config, DiscriminatorConfig) else "model"
    check_layers(config, Device(device.type), section)
    if config.fp8_recipe is not None:
        check_hardware(config.fp8_recipe, *cuda_capability(device), section)
        return LayerKind(True, config.fp8_recipe)
    if config.transformer_impl is TransformerImpl.auto:
        return LayerKind(device.type == "cuda" and config.precision is Precision.bf16 and has_transformer_engine())
    return LayerKind(config.transformer_impl is TransformerImpl.transformer_engine)


def check_hardware(recipe: Fp8Recipe, capability: tuple[int, int], cuda: str | None, section: str) -> None:
    """Raises ConfigError when a GPU of this compute capability, under this CUDA version, does not have the recipe's products."""
    version = tuple(int(part) for part in (cuda or "0.0").split(".")[:2])
    needs = {
        Fp8Recipe.delayed: (capability >= (8, 9), "an Ada, Hopper or Blackwell GPU"),
        Fp8Recipe.tensorwise: (capability >= (8, 9), "an Ada, Hopper or Blackwell GPU"),
        Fp8Recipe.blockwise: (capability >= (9, 0) and version >= (12, 9), "a Hopper or newer GPU, and CUDA 12.9"),
        Fp8Recipe.mxfp8: ((10, 0) <= capability < (12, 0), "a Blackwell GPU of a data centre (compute capability 10.x)"),
    }
    there, what = needs[recipe]
    if there:
        return
    others = [other.value for other in Fp8Recipe if needs[other][0]]
    raise ConfigError(
        f"the FP8 recipe {recipe} needs {what}; here: compute capability {capability[0]}.{capability[1]}, CUDA {cuda}",
        where=f"{section}.fp8_recipe",
        remedy=f"use {' or '.join([*others, 'null'])}",
    )


def fp8_contexts(
    config: TransformerConfig, quantize: bool
) -> tuple[AbstractContextManager[Any], Callable[[int], AbstractContextManager[Any]]]:
    """What goes around all of a stage's layers, and what around each (by its number in the whole model, from 0).

    As in Megatron's `TransformerBlock`: delayed scaling updates its scales when the outermost context ends, so all layers share
    one; the others open one a layer. Delayed scaling has no scales before its first training step and takes none from passes
    without gradients, so those run in bf16 under it.
    """
    delayed = config.fp8_recipe == Fp8Recipe.delayed.value
    if not config.fp8 or not quantize or (delayed and not torch.is_grad_enabled()):
        return nullcontext(), lambda layer: nullcontext()
    if delayed:
        return get_fp8_context(config), lambda layer: nullcontext()
    return nullcontext(), lambda layer: get_fp8_context(config, layer)
