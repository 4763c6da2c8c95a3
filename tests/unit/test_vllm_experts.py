"""Experts in vLLM on a CPU: computed as they should be, and updated where they lie, one by one or in the Hub's fused form."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.rows import CPU
from helpers.served import MAX_LENGTH, served
from torch import Tensor

from prism_nemo.config.enums import RolloutEngineKind
from prism_nemo.config.rollout import RolloutConfig, VLLMConfig
from prism_nemo.models.weights import HFTensors
from prism_nemo.rollout.base import Rollout, RolloutError, SamplingParams

SHAPES = [(1, 1, 1, 8, 16), (1, 4, 2, 32, 48), (7, 4, 2, 24, 40), (64, 16, 4, 32, 31), (5, 16, 16, 8, 8), (3, 8, 1, 8, 8)]


def plain_experts(hidden: Tensor, w1: Tensor, w2: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """Token by token, in fp64."""
    hidden, w1, w2, weights = (tensor.double() for tensor in (hidden, w1, w2, weights))
    result = torch.zeros_like(hidden)
    for token in range(len(hidden)):
        for weight, expert in zip(weights[token], chosen[token].tolist(), strict=True):
            gate, up = (w1[expert] @ hidden[token]).chunk(2)
            result[token] += weight * (w2[expert] @ (gate * gate.sigmoid() * up))
    return result


@pytest.mark.vllm
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "experts", "topk", "hidden", "width"), SHAPES)
def test_unpacked_experts(tokens: int, experts: int, topk: int, hidden: int, width: int, dtype: torch.dtype) -> None:
    from prism_nemo.rollout.vllm.experts import UnpackedExperts

    generator = torch.Generator().manual_seed(tokens)
    rows = torch.randn(tokens, hidden, generator=generator).to(dtype)
    w1 = (torch.randn(experts, 2 * width, hidden, generator=generator) / hidden**0.5).to(dtype)
    w2 = (torch.randn(experts, hidden, width, generator=generator) / width**0.5).to(dtype)
    weights, chosen = torch.randn(tokens, experts, generator=generator).softmax(dim=-1).topk(topk)
    output = torch.full_like(rows, float("nan"))
    UnpackedExperts.apply(SimpleNamespace(), output, rows, w1, w2, weights, chosen.to(torch.int32))
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(output.double(), plain_experts(rows, w1, w2, weights, chosen), atol=tolerance, rtol=tolerance)


@pytest.mark.vllm
def test_of_what_they_are_not_made_for_they_say_so() -> None:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from prism_nemo.rollout.vllm.experts import UnpackedExperts

    assert [one for one in MoEActivation if UnpackedExperts._supports_activation(one)] == [MoEActivation.SILU]
    for spread in (False, True):
        assert UnpackedExperts._supports_parallel_config(SimpleNamespace(use_ep=spread)) is not spread


@cache
def engine() -> Any:
    from prism_nemo.rollout.vllm import ServedModel, VLLMEngine

    place = served(experts=True, tied=False)
    config = RolloutConfig(engine=RolloutEngineKind.vllm, vllm=VLLMConfig(kv_cache_gb=0.1))
    return VLLMEngine(config, ServedModel(place.directory, place.config, torch.float32, CPU, MAX_LENGTH))


def sample() -> list[Rollout]:
    place = served(experts=True, tied=False)
    sampling = SamplingParams(1.0, 1.0, 0, 12, 2, place.special)
    return list(engine().generate(place.prompts, sampling, num_rollouts_per_prompt=2, seeds=range(2 * len(place.prompts))))


@pytest.mark.vllm
def test_an_update_is_in_place_in_either_layout() -> None:
    place = served(experts=True, tied=False)
    model = place.model()
    worker = engine()._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    parameters = {name: parameter.data_ptr() for name, parameter in worker.get_model().named_parameters()}
    found = []
    for version, weights in enumerate([HFTensors(model, place.config), HFTensors(model, place.config).with_separate_experts()]):
        engine().update_weights(place.tensors(seed=1).items(), version)  # other weights in between
        engine().update_weights([*weights] if version == 0 else weights, version)  # a list: as it is, in the Hub's layout
        found.append(sample())
    assert {name: parameter.data_ptr() for name, parameter in worker.get_model().named_parameters()} == parameters
    for one, other in zip(*found, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist() and torch.equal(one.log_probs, other.log_probs)


@pytest.mark.vllm
def test_an_expert_that_is_missing_is_named() -> None:
    place = served(experts=True, tied=False)
    weights = dict(HFTensors(place.model(), place.config).with_separate_experts())
    left_out = "model.language_model.layers.1.mlp.experts.3.up_proj.weight"
    del weights[left_out]
    with pytest.raises(RolloutError, match=f"1 tensors are missing or unknown, {left_out}"):
        engine().update_weights(weights.items(), 5)


def test_separate_experts_are_the_trained_ones_themselves() -> None:
    """No copy, and what the Hub's layout says."""
    place = served(experts=True, tied=False)
    model = place.model()
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    hub = {name: tensor.clone() for name, tensor in HFTensors(model, place.config)}
    separate = dict(HFTensors(model, place.config).with_separate_experts())
    for name, tensor in separate.items():
        before, of_experts, after = name.partition(".mlp.experts.")
        if not of_experts:
            assert torch.equal(tensor, hub[name])
            continue
        assert tensor.untyped_storage().data_ptr() in storages
        number, projection, _ = after.split(".")
        fused = hub[f"{before}.mlp.experts.{'down_proj' if projection == 'down_proj' else 'gate_up_proj'}"][int(number)].T
        halves = fused.chunk(2)
        assert torch.equal(tensor, {"gate_proj": halves[0], "up_proj": halves[1], "down_proj": fused}[projection])
    experts = place.config["text_config"]["num_experts"] * place.config["text_config"]["num_hidden_layers"]
    assert sum(".mlp.experts." in name for name in separate) == 3 * experts
