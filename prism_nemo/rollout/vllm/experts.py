"""Experts for vLLM on a CPU as plain matrix products: their weights stay as they are loaded, so that an update is one copy.

vLLM's own kernel reads packed weights, and packing alone takes five (bf16) to twelve (fp32) times as long as copying them. The
price is decoding at 0.7 of that kernel's speed (`docs/measurements.md`), which a CPU can pay: there it is for tests.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.oracle import unquantized


class UnpackedExperts(CPUUnquantizedExperts):
    """For SwiGLU experts of any width, all on each rank (cut along their width where tensor-parallel)."""

    @classmethod
    def _supports_grouped_gemm(cls, moe_config: Any) -> tuple[bool, str | None]:
        return True, None  # widths

    @staticmethod
    def _supports_activation(activation: MoEActivation) -> bool:
        return activation is MoEActivation.SILU

    @staticmethod
    def _supports_parallel_config(moe_parallel_config: Any) -> bool:
        return not moe_parallel_config.use_ep

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Nothing: this is where they would be packed."""

    def apply(
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        *_: Any,
        **__: Any,
    ) -> None:
        """output, hidden_states [T, H]; w1 [E, 2I, H], gate above up; w2 [E, H, I]; topk_weights, topk_ids [T, K]."""
        total = torch.zeros_like(output, dtype=torch.float32)
        order = topk_ids.flatten().argsort(stable=True)
        token = order // topk_ids.shape[1]
        rows, weights = hidden_states[token], topk_weights.flatten()[order].float().unsqueeze(1)
        first = 0
        for expert, count in enumerate(topk_ids.flatten().bincount(minlength=len(w1)).tolist()):
            if count:
                own = slice(first, first + count)
                gate, up = F.linear(rows[own], w1[expert]).chunk(2, dim=-1)
                total.index_add_(0, token[own], F.linear(F.silu(gate) * up, w2[expert]).float() * weights[own])
                first += count
        output.copy_(total)


def keep_experts_unpacked() -> None:
    """Has every engine of this process that starts from now on compute experts with `UnpackedExperts`."""
    unquantized.backend_to_kernel_cls = lambda backend: [UnpackedExperts]
