"""The discriminator: Qwen3-VL with experts and a scalar head, scoring every segment of a row at its last token.

A segment's tokens come from one function (`packing.segments`), whoever wrote it, and end with the same closing token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from prism_nemo.config.enums import Routing
from prism_nemo.config.schema import DiscriminatorConfig, ParallelConfig
from prism_nemo.convert.hf import hf_assets_directory, load_model_config
from prism_nemo.convert.upcycling import upcycled_config
from prism_nemo.engine.model_checkpoint import is_model_checkpoint
from prism_nemo.engine.runtime import Runtime
from prism_nemo.errors import ConfigError
from prism_nemo.models.base import TrainableModel, build_chunks, freeze
from prism_nemo.models.context import KIND_NAMES, RouterStatistics, RoutingContext, token_kinds
from prism_nemo.models.policy import PolicyModel, PolicyModule
from prism_nemo.models.qwen3_vl.config import Qwen3VLShape
from prism_nemo.models.qwen3_vl.fp8 import LOCAL, LayerKind, layer_kind
from prism_nemo.models.qwen3_vl.model import Qwen3VLModel
from prism_nemo.models.upcycle import upcycle
from prism_nemo.models.weights import canonical_parameters, load_weights
from prism_nemo.packing.rows import PackedRow
from prism_nemo.run_directory import resolve_model_directory


class DiscriminatorModule(Qwen3VLModel):
    """`forward` gives the scores of a row's segments, fp32 [S], on the last pipeline stage."""

    def __init__(
        self,
        shape: Qwen3VLShape,
        parallel: ParallelConfig,
        config: DiscriminatorConfig,
        *,
        vp_stage: int | None = None,
        layers: LayerKind = LOCAL,
    ) -> None:
        super().__init__(shape, parallel, config.precision, output_head=False, vp_stage=vp_stage, layers=layers)
        self.options = config
        self.head_dropout = 0.0  # the warm-up stage sets it; scoring never drops anything
        if self.post_process:
            self.score_head = torch.nn.Linear(shape.hidden_size, 1, bias=False, dtype=self.config.params_dtype)

    def forward(self, row: PackedRow, global_tokens: float, statistics: RouterStatistics | None) -> Tensor:
        """`global_tokens`: tokens of the whole batch, by which the router's balancing loss is divided."""
        routing = None
        if self.shape.moe is not None:
            routing = RoutingContext(
                row.layout.token_group.to(row.input_ids.device),
                token_kinds(row),
                num_groups=len(row.layout.groups),
                balance_coefficient=self.options.moe_aux_loss_coeff,
                global_tokens=global_tokens,
                dedicated=self.options.routing is Routing.dedicated,
                statistics=statistics,
            )
        context = self.row_context(row, routing)
        hidden = self.hidden_states(row, context)
        if not self.post_process:
            return hidden
        ends, here = self.hidden_at(hidden, row.segment_end, context)
        ends = F.dropout(ends.float(), self.head_dropout, training=self.training)
        scores = self.over_context_ranks(F.linear(ends, self.score_head.weight.float()).squeeze(1), here)
        return scores if row.num_segments else scores + hidden.float().sum() * 0.0


def _upcycle_from(
    path: Path,
    source: Mapping[str, Any],
    chunks: list[Qwen3VLModel],
    hf_config: Mapping[str, Any],
    parallel: ParallelConfig,
    options: DiscriminatorConfig,
    seed: int,
) -> None:
    """Fills a discriminator from the dense model at `path`, which is cut in the same way meanwhile."""
    shape = Qwen3VLShape.from_hf(source)
    dense = build_chunks(lambda vp_stage: PolicyModule(shape, parallel, options.precision, vp_stage=vp_stage), parallel)
    load_weights(dense, path, source)
    upcycle(chunks, hf_config, canonical_parameters(dense, source), options, seed=seed)


class DiscriminatorModel(TrainableModel):
    """NeMo-Aligner's `CriticModelInterface`, on packed rows."""

    name = "discriminator"

    def __init__(self, config: DiscriminatorConfig, parallel: ParallelConfig, runtime: Runtime, *, seed: int) -> None:
        if config.path is None:
            raise ConfigError(
                "no discriminator is given", where="discriminator.path", remedy="a dense model to upcycle, or a checkpoint"
            )
        path = resolve_model_directory(Path(config.path), self.name)
        is_discriminator = path.name == self.name and is_model_checkpoint(path)
        if not is_discriminator:
            path = resolve_model_directory(Path(config.path), PolicyModel.name)
        source = load_model_config(path)
        hf_config = source if is_discriminator else upcycled_config(source, config)
        shape = Qwen3VLShape.from_hf(hf_config)
        layers = layer_kind(config, runtime.device)
        runtime.require_tokens_per_rank(layers.tokens_per_rank(parallel))
        with runtime.layout.active():
            chunks = build_chunks(
                lambda vp_stage: DiscriminatorModule(shape, parallel, config, vp_stage=vp_stage, layers=layers), parallel
            )
            if is_discriminator:
                load_weights(chunks, path, hf_config, score_head=True)
            else:
                _upcycle_from(path, source, chunks, hf_config, parallel, config, seed)
        for chunk in chunks:
            if config.freeze_vision_model and chunk.pre_process:
                freeze(chunk.vision_model)
        super().__init__(chunks, hf_config, hf_assets_directory(path), parallel, runtime)
        self.options = config
        self.global_tokens = 1.0
        self.statistics = RouterStatistics()

    def forward_row(self, module: torch.nn.Module, row: PackedRow) -> Tensor:
        return module(row, self.global_tokens, self.statistics)

    def start_batch(self, rows: Sequence[PackedRow]) -> None:
        """Counts the global batch's tokens for the balancing loss and starts the routers' statistics anew. A collective."""
        tokens = torch.tensor([float(sum(row.num_tokens for row in rows))], dtype=torch.float64)
        self.global_tokens = max(1.0, float(self.runtime.sum_over_data_parallel(tokens)))
        self.statistics = RouterStatistics()

    def router_metrics(self) -> dict[str, float]:
        """Of the batch so far, over all ranks: the balancing loss and every expert's share of the choices, per kind of token.

        Every (token, layer) is counted on one rank: where there are experts, tensor-parallel ranks hold slices of the row.
        """
        if self.module.shape.moe is None:
            return {}
        metrics: dict[str, float] = {}
        load_on_cpu = {kind: load.cpu() for kind, load in self.statistics.load.items()}
        gathered = self.runtime.gather_objects_over_all(replace(self.statistics, load=load_on_cpu))
        tokens = sum(item.tokens for item in gathered)
        if tokens:
            metrics["router/balance_loss"] = sum(item.balance for item in gathered) / tokens
        for kind, name in KIND_NAMES.items():
            loads = [item.load[kind] for item in gathered if kind in item.load]
            if loads:
                load = torch.stack(loads).sum(dim=0)
                for expert, share in enumerate((load / load.sum()).tolist()):
                    metrics[f"expert_load/{name}/{expert}"] = share
        return metrics

    def infer_rm_critic(self, rows: Sequence[PackedRow]) -> list[Tensor]:
        """Scores fp32 [S] of every row, without gradients: NeMo-Aligner's name for asking a reward model.

        Its combined models answer with rewards and values; a discriminator has no values, so this is the rewards alone.
        """
        return self.infer(rows)
