"""What forward passes keep for backward: less with recomputation, nothing of a frozen vision tower."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.rows import one_rank
from helpers.tiny import make_group, tiny_model
from torch import Tensor

from prism_nemo.config.enums import Precision, RecomputeGranularity, RecomputeModule
from prism_nemo.config.schema import ModelConfig, ParallelConfig
from prism_nemo.models.policy import PolicyModel
from prism_nemo.packing.rows import PackedRow, make_row

FULL = ParallelConfig(recompute_granularity=RecomputeGranularity.full)
MODULES = {
    name: ParallelConfig(recompute_granularity=RecomputeGranularity.selective, recompute_modules=[RecomputeModule(name)])
    for name in ("core_attn", "mlp")
}


def policy(parallel: ParallelConfig, *, experts: bool = False, frozen: bool = False) -> PolicyModel:
    config = ModelConfig(path=str(tiny_model(experts=experts).directory), precision=Precision.fp32, freeze_vision_model=frozen)
    model = PolicyModel(config, parallel, one_rank())
    model.prepare_for_training()
    return model


def row() -> PackedRow:
    return make_row([make_group([(4, 6), (8, 4)], (5, 9, 3, 7), seed=60), make_group((), (40, 30), seed=61)])


def kept_bytes(run: Callable[[], Any]) -> int:
    """Storage that autograd keeps, each counted once, parameters left out."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = run()
    del output
    return sum(kept.values())


@pytest.mark.parametrize("experts", [False, True])
def test_recomputed_activations_are_not_kept(experts: bool) -> None:
    def kept(parallel: ParallelConfig) -> int:
        model = policy(parallel, experts=experts)
        return kept_bytes(lambda: model.forward_row(model.module, row()).log_probs)

    everything = kept(ParallelConfig())
    assert all(kept(parallel) < 0.9 * everything for parallel in MODULES.values())
    assert kept(FULL) < 0.35 * everything


def test_a_frozen_tower_keeps_nothing() -> None:
    trained, frozen = policy(ParallelConfig()), policy(ParallelConfig(), frozen=True)
    assert kept_bytes(lambda: trained.module._see(row())) > 0
    assert kept_bytes(lambda: frozen.module._see(row())) == 0
    tokens, features = frozen.module._see(row())
    assert not tokens.requires_grad and not any(feature.requires_grad for feature in features)
    expected, _ = trained.module._see(row())
    assert torch.equal(tokens, expected)


def test_a_frozen_towers_weights_stay_and_the_rest_learns() -> None:
    model = policy(ParallelConfig(), frozen=True)
    model.forward_row(model.module, row()).log_probs.sum().backward()
    towers = {name for name, parameter in model.module.named_parameters() if not parameter.requires_grad}
    assert towers and all(name.startswith("vision_model.") for name in towers)
    learning = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
    assert all(float(parameter.main_grad.abs().sum()) > 0 for parameter in learning)
