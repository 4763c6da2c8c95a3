"""Our models on packed rows, one call a test: build, run forward and backward, read gradients by HuggingFace names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import prism_nemo.engine  # noqa: F401  isort: skip  before megatron
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from prism_nemo.config.enums import Device, Precision
from prism_nemo.config.schema import ParallelConfig, RuntimeConfig
from prism_nemo.convert.hf import load_model_config
from prism_nemo.engine.attention import RowAttention
from prism_nemo.engine.chunks import Chunks, chunks_of
from prism_nemo.engine.logprobs import label_log_probs
from prism_nemo.engine.runtime import Runtime, initialize
from prism_nemo.models.context import RouterStatistics, RoutingContext, RowContext, token_kinds
from prism_nemo.models.qwen3_vl.config import Qwen3VLShape
from prism_nemo.models.qwen3_vl.language import gather_rows
from prism_nemo.models.qwen3_vl.model import Qwen3VLModel
from prism_nemo.models.weights import export_hf_tensors, load_hf_weights
from prism_nemo.packing.rows import PackedRow, RowLayout

CPU = torch.device("cpu")


class RowOutput(NamedTuple):
    hidden: Tensor  # [T, hidden], every token, on every rank
    log_probs: Tensor  # [N]
    entropy: Tensor  # [N]


def one_rank() -> Runtime:
    """This process alone, on the CPU. May be called in every module: the same layout is not built twice, nor torn down."""
    return initialize(ParallelConfig(), RuntimeConfig(device=Device.cpu))


def build_model(directory: Path, parallel: ParallelConfig | None = None) -> Qwen3VLModel:
    """The fp32 model of a HuggingFace directory, this rank's part of it."""
    config = load_model_config(directory)
    parallel = parallel or ParallelConfig()
    model = Qwen3VLModel(Qwen3VLShape.from_hf(config), parallel, Precision.fp32)
    load_hf_weights(model, directory, config)
    return model


def routing_of(
    row: PackedRow, *, coefficient: float = 0.0, global_tokens: float = 1.0, dedicated: bool = False
) -> RoutingContext:
    """What a row's experts are told, with statistics."""
    return RoutingContext(
        token_group=row.layout.token_group,
        token_kind=token_kinds(row),
        num_groups=len(row.layout.groups),
        balance_coefficient=coefficient,
        global_tokens=global_tokens,
        dedicated=dedicated,
        statistics=RouterStatistics(),
    )


def run_row(model: Qwen3VLModel, row: PackedRow, routing: RoutingContext | None = None) -> RowOutput:
    """Forward over one row, to its labels' log-probabilities."""
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))  # as Megatron's schedules do before every backward
    tp = model.pg_collection.tp
    hidden = model.hidden_states(row, RowContext(attention=RowAttention(row.layout, CPU), routing=routing))
    sources = gather_rows(hidden, row.label_source, model.config, tp)
    weight = model.language_model.output_weight
    log_probs, entropy = label_log_probs(sources, weight, row.label_ids, tp, with_entropy=True)
    assert entropy is not None
    everything = gather_rows(hidden, torch.arange(row.layout.length), model.config, tp)
    return RowOutput(everything, log_probs, entropy)


def gradients(model: Chunks, config: Mapping[str, Any], *, score_head: bool = False) -> dict[str, Tensor]:
    """Every parameter's gradient by HuggingFace name in the Hub's layout, gathered over the ranks.

    Export only copies, cuts and transposes, so it does to gradients what it does to weights. Where Megatron's DDP accumulates
    into `main_grad` that is read; no gradient counts as zeros.
    """
    weights = {parameter: parameter.data for chunk in chunks_of(model) for parameter in chunk.parameters()}
    try:
        for parameter, weight in weights.items():
            grad = getattr(parameter, "main_grad", parameter.grad)
            parameter.data = torch.zeros_like(weight) if grad is None else grad.to(weight.dtype)
        return {name: tensor.clone() for name, tensor in export_hf_tensors(model, config, score_head=score_head)}
    finally:
        for parameter, weight in weights.items():
            parameter.data = weight


def transformers_gradients(hf: torch.nn.Module) -> dict[str, Tensor]:
    """The same of transformers' model, whose experts lie transposed in memory; it starts anew after."""
    found = {}
    for name, parameter in hf.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[name] = grad.transpose(-1, -2) if ".mlp.experts." in name else grad
        parameter.grad = None
    return found


def relative_errors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    """|found - expected| / |expected| of every tensor; where zeros are expected, |found|. The names must be the same."""
    assert found.keys() == expected.keys()
    errors = {}
    for name, want in expected.items():
        norm = float(want.double().norm())
        errors[name] = float((found[name].double() - want.double()).norm()) / (norm or 1.0)
    return errors


def assert_gradients_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    """Every tensor within the relative tolerance, and every one of them there; the message names those that are not."""
    errors = relative_errors(found, expected)
    bad = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not bad, f"{len(bad)} of {len(errors)} gradients differ by more than {tolerance}: {bad}"


def sequences(layout: RowLayout) -> list[Tensor]:
    """For every segment of a row, in order, the row's tokens that are `prefix + segment`, int64; worked out by counting."""
    found = []
    cursor = 0
    for group in layout.groups:
        prefix = list(range(cursor, cursor + group.prefix))
        cursor += group.prefix
        for length in group.segments:
            found.append(torch.tensor(prefix + list(range(cursor, cursor + length))))
            cursor += length
    return found
