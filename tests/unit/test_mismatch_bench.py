"""The bench of sampler against trainer says the truth about experts: whose differ, and what is left with the sampler's."""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rows import one_rank
from helpers.served import served
from torch import Tensor

from prism_nemo.config.enums import Precision
from prism_nemo.config.schema import ModelConfig, ParallelConfig
from prism_nemo.models.policy import OutputDistribution, PolicyModel
from prism_nemo.models.router import GroupBalancedRouter
from prism_nemo.packing.groups import Group, Segment
from prism_nemo.packing.rows import make_row
from prism_nemo.rollout.base import SamplingParams

SCRIPT = Path(__file__).parents[2] / "tools" / "bench" / "mismatch.py"
COUNT = 3


@cache
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("mismatch_bench", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@cache
def policy_of(*, experts: bool) -> PolicyModel:
    place = served(experts=experts, tied=False)
    config = ModelConfig(path=str(place.directory), precision=Precision.fp32)
    return PolicyModel(config, ParallelConfig(), one_rank(), OutputDistribution(1.0, place.special))


@pytest.fixture
def compact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bench changes it for its own process."""
    from prism_nemo.rollout import megatron

    monkeypatch.setattr(megatron, "_COMPACT_BELOW", megatron._COMPACT_BELOW)


def sampled(*, experts: bool) -> tuple[Any, Any]:
    place = served(experts=experts, tied=False)
    sampling = SamplingParams(1.0, 1.0, 0, 30, 2, place.special)
    found: tuple[Any, Any] = bench().sample_megatron(policy_of(experts=experts), place.prompts, sampling, COUNT)
    return found


def test_in_fp32_both_choose_alike(compact: None) -> None:
    place = served(experts=True, tied=False)
    rollouts, routes = sampled(experts=True)
    assert len({len(rollout.tokens) for rollout in rollouts}) > 1, "all ended together: nothing is seen of mixed lengths"
    layers = place.config["text_config"]["num_hidden_layers"]
    for rollout, own in zip(rollouts, routes, strict=True):
        assert sorted(own) == list(range(layers))
        assert {len(chosen) for chosen in own.values()} == {len(place.prompts[rollout.prompt_index]) + len(rollout.tokens) - 1}
    found = bench().score(policy_of(experts=True), place.prompts, rollouts, routes)
    assert not found["differs"].any() and not found["pairs"].any()
    for name in ("trainer", "replayed"):
        torch.testing.assert_close(found[name], found["sampler"], atol=2e-5, rtol=0)


def test_a_dense_model_has_no_experts(compact: None) -> None:
    rollouts, routes = sampled(experts=False)
    assert routes is None
    found = bench().score(policy_of(experts=False), served(tied=False).prompts, rollouts, routes)
    assert sorted(found) == ["sampler", "trainer"]


def test_replayed_is_computed_with_the_experts_that_are_given(compact: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the routers had been kept from choosing any others."""
    policy, prompts = policy_of(experts=True), served(experts=True, tied=False).prompts
    rollouts, routes = sampled(experts=True)
    given = torch.tensor([1, 3])
    wrong = [{layer: given.expand(len(chosen), -1) for layer, chosen in own.items()} for own in routes]
    found = bench().score(policy, prompts, rollouts, wrong)
    assert 0.5 < found["pairs"].double().mean() < 1

    own = GroupBalancedRouter.routing

    def only_given(router: Any, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        others = torch.ones(logits.shape[-1], dtype=torch.bool)
        others[given] = False
        return own(router, logits.masked_fill(others, float("-inf")), padding_mask)

    monkeypatch.setattr(GroupBalancedRouter, "routing", only_given)
    expected = []
    for index, prompt in enumerate(prompts):
        segments = tuple(Segment(one.tokens, number) for number, one in enumerate(rollouts) if one.prompt_index == index)
        expected += policy.get_inference_log_probs([make_row([Group(prompt, segments)])])
    torch.testing.assert_close(found["replayed"], torch.cat(expected), atol=1e-5, rtol=0)
    assert float((found["replayed"] - found["trainer"]).abs().max()) > 1e-2


def test_figures() -> None:
    """By hand: ratios 1, 2 and a half, of which log-ratios are 0, ln 2 and -ln 2."""
    ln2 = 0.6931471805599453
    found = bench().figures(torch.tensor([-1.0, -1.0, -1.0 - ln2]), torch.tensor([-1.0, -1.0 - ln2, -1.0]))
    assert found == {
        "tokens": 3,
        "abs_log_ratio": 0.462,
        "kl_k1": 0.0,
        "kl_k3": pytest.approx(0.5 / 3, rel=1e-2),
        "ratio_outside_0.99_1.01": 0.667,
        "ratio_outside_0.8_1.28": 0.667,
        "max_abs_log_ratio": 0.693,
    }
