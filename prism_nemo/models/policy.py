"""The policy: Qwen3-VL that gives log-probabilities of a row's labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prism_nemo.config.schema import ModelConfig, ParallelConfig
from prism_nemo.convert.hf import hf_assets_directory, load_model_config
from prism_nemo.engine.logprobs import label_log_probs
from prism_nemo.engine.runtime import Runtime
from prism_nemo.models.base import TrainableModel, build_chunks, freeze
from prism_nemo.models.context import RoutingContext, token_kinds
from prism_nemo.models.qwen3_vl.config import Qwen3VLShape
from prism_nemo.models.qwen3_vl.fp8 import layer_kind
from prism_nemo.models.qwen3_vl.model import Qwen3VLModel
from prism_nemo.models.weights import HFTensors, load_weights
from prism_nemo.packing.rows import PackedRow
from prism_nemo.run_directory import resolve_model_directory


@dataclass(frozen=True)
class PolicyOutput:
    """Of the N labels of a row: log-probabilities fp32 [N], with gradient, and entropies fp32 [N] of their distributions."""

    log_probs: Tensor
    entropy: Tensor | None


@dataclass(frozen=True)
class OutputDistribution:
    """How logits become the distribution that was sampled from; the trainer recomputes exactly that one."""

    temperature: float = 1.0
    banned_token_ids: tuple[int, ...] = ()


class PolicyModule(Qwen3VLModel):
    """`forward` is what Megatron's schedules run: the output on the last stage, hidden states on the others."""

    def forward(self, row: PackedRow, distribution: OutputDistribution, with_entropy: bool) -> PolicyOutput | Tensor:
        routing = None
        if self.shape.moe is not None:
            group = row.layout.token_group.to(row.input_ids.device)
            routing = RoutingContext(group, token_kinds(row), num_groups=len(row.layout.groups))
        context = self.row_context(row, routing)
        hidden = self.hidden_states(row, context)
        if not self.post_process:
            return hidden
        selected, here = self.hidden_at(hidden, row.label_source, context)
        log_probs, entropy = label_log_probs(
            selected,
            self.language_model.output_weight,
            row.label_ids if here is None else row.label_ids[here],
            self.pg_collection.tp,
            temperature=distribution.temperature,
            banned_token_ids=distribution.banned_token_ids,
            with_entropy=with_entropy,
        )
        log_probs = self.over_context_ranks(log_probs, here)
        if entropy is not None:
            entropy = self.over_context_ranks(entropy, here)
        if row.num_labels == 0:  # keeps the graph of an empty row: its backward pass takes part in collectives
            log_probs = log_probs + hidden.float().sum() * 0.0
        return PolicyOutput(log_probs, entropy)


class PolicyModel(TrainableModel):
    """NeMo-Aligner's `AlignableGenerativeInterface`, on packed rows."""

    name = "policy"

    def __init__(
        self,
        config: ModelConfig,
        parallel: ParallelConfig,
        runtime: Runtime,
        distribution: OutputDistribution = OutputDistribution(),
    ) -> None:
        path = resolve_model_directory(Path(config.path), self.name)
        hf_config = load_model_config(path)
        shape = Qwen3VLShape.from_hf(hf_config)
        layers = layer_kind(config, runtime.device)
        runtime.require_tokens_per_rank(layers.tokens_per_rank(parallel))
        with runtime.layout.active():
            chunks = build_chunks(
                lambda vp_stage: PolicyModule(shape, parallel, config.precision, vp_stage=vp_stage, layers=layers), parallel
            )
            load_weights(chunks, path, hf_config)
        for chunk in chunks:
            if config.freeze_vision_model and chunk.pre_process:
                freeze(chunk.vision_model)
            if config.freeze_language_model:
                freeze(chunk.language_model)
        super().__init__(chunks, hf_config, hf_assets_directory(path), parallel, runtime)
        self._hf_tensors = HFTensors(self.chunks, self.hf_config)
        self.distribution = distribution
        self.with_entropy = True

    def forward_row(self, module: torch.nn.Module, row: PackedRow) -> PolicyOutput:
        return module(row, self.distribution, self.with_entropy)

    def hf_tensors(self) -> HFTensors:
        """(HuggingFace name, full tensor) of all weights, gathered as they are asked for; updates rollout engines."""
        return self._hf_tensors

    def get_inference_log_probs(self, rows: Sequence[PackedRow]) -> list[Tensor]:
        """fp32 [N] log-probabilities of every row's labels, without gradients."""
        return [output.log_probs for output in self.infer(rows)]

    def get_init_policy_logprobs(self, rollout_batches: list[PackedRow]) -> list[Tensor]:
        """Log-probabilities under the weights as they are now: call it before the first step."""
        return self.get_inference_log_probs(rollout_batches)
