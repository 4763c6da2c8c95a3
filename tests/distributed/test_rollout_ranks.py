"""The Megatron rollout engine on two ranks against one, in fp32: tensor parallelism, and experts spread over data parallelism."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from helpers.rows import CPU, build_model, one_rank
from helpers.tiny import NUM_EXPERTS, make_prompt, tiny_model

from prism_nemo.config.enums import Device, Precision
from prism_nemo.config.schema import ParallelConfig, RuntimeConfig
from prism_nemo.engine.runtime import initialize, session
from prism_nemo.models.qwen3_vl.model import Qwen3VLModel
from prism_nemo.packing.groups import EncodedPrompt
from prism_nemo.rollout.base import Rollout, SamplingParams
from prism_nemo.rollout.megatron import MegatronEngine

PROMPTS = (make_prompt([(4, 6), (2, 4)], seed=1), make_prompt([], seed=2, text_length=8), make_prompt([(2, 2)], seed=3))
ROLLOUTS = 3  # nine sequences: under sequence parallelism two ranks must pad the row
CASES: dict[str, tuple[dict[str, bool], bool]] = {
    "dense": ({}, False),
    "dense_tied": ({"tied": True}, False),
    "dense_sequence_parallel": ({}, True),
    "moe": ({"experts": True}, False),  # sequence parallelism comes with the experts
}
BANNED = (*range(10, 64), *range(74, 128))  # tokens 0 to 63 are the first rank's part; few are left, so the end comes soon
SAMPLINGS = {
    "greedy": SamplingParams(0.0, 1.0, 0, 10, -1, ()),
    "sampled": SamplingParams(1.2, 0.98, 19, 20, 5, BANNED),
}
Outcome = list[tuple[list[int], list[float], str]]


def outcome(rollouts: list[Rollout]) -> Outcome:
    return [(rollout.tokens.tolist(), rollout.log_probs.tolist(), rollout.finish_reason) for rollout in rollouts]


def generate(
    model: Qwen3VLModel, sampling: SamplingParams, prompts: tuple[EncodedPrompt, ...] = PROMPTS, first: int = 0
) -> Outcome:
    engine = MegatronEngine(model, device=CPU, max_batch_size=64)
    seeds = range(first * ROLLOUTS, (first + len(prompts)) * ROLLOUTS)
    return outcome(engine.generate(prompts, sampling, num_rollouts_per_prompt=ROLLOUTS, seeds=seeds))


def with_distributed_experts(directory: Path) -> Qwen3VLModel:
    """A model with half of the experts on each of two data-parallel ranks; its weights are those of the whole model."""
    initialize(ParallelConfig(), RuntimeConfig(device=Device.cpu))
    whole = build_model(directory)
    parallel = ParallelConfig(expert_model_parallel_size=2)
    initialize(parallel, RuntimeConfig(device=Device.cpu))
    model = Qwen3VLModel(whole.shape, parallel, Precision.fp32)
    weights = dict(whole.named_parameters())
    first = dist.get_rank() * NUM_EXPERTS // 2
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            source = re.sub(r"local_experts\.(\d+)", lambda match: f"local_experts.{int(match[1]) + first}", name)
            parameter.copy_(weights[source])
    return model


def on_two_ranks(directories: dict[str, Path]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    with session(ParallelConfig(tensor_model_parallel_size=2), RuntimeConfig(device=Device.cpu)):
        for name, (_, sequence_parallel) in CASES.items():
            parallel = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
            model = build_model(directories[name], parallel)
            assert model.config.sequence_parallel == (sequence_parallel or name == "moe")
            found[name] = {kind: generate(model, sampling) for kind, sampling in SAMPLINGS.items()}
        model = with_distributed_experts(directories["moe"])
        mine = slice(0, 2) if dist.get_rank() == 0 else slice(2, 3)  # unequal work
        found["experts"] = {kind: generate(model, sampling, PROMPTS[mine], mine.start) for kind, sampling in SAMPLINGS.items()}
        nothing_here = PROMPTS if dist.get_rank() == 0 else ()
        found["experts_one_idle"] = {kind: generate(model, sampling, nothing_here) for kind, sampling in SAMPLINGS.items()}
    return found


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    directories = {name: tiny_model(**model).directory for name, (model, _) in CASES.items()}
    return run_ranks(on_two_ranks, 2, directories)


def one_ranks(name: str, kind: str) -> Outcome:
    one_rank()
    return generate(build_model(tiny_model(**CASES[name][0]).directory), SAMPLINGS[kind])


def assert_same(found: Outcome, expected: Outcome) -> None:
    assert [(tokens, reason) for tokens, _, reason in found] == [(tokens, reason) for tokens, _, reason in expected]
    for (_, left, _), (_, right, _) in zip(found, expected, strict=True):
        assert left == pytest.approx(right, abs=1e-5)


@pytest.mark.parametrize("kind", SAMPLINGS)
@pytest.mark.parametrize("name", CASES)
def test_tensor_parallel_ranks_sample_what_one_rank_samples(two_ranks: list[dict[str, Any]], name: str, kind: str) -> None:
    expected = one_ranks(name, kind)
    assert two_ranks[0][name][kind] == two_ranks[1][name][kind]  # to the last digit
    assert_same(two_ranks[0][name][kind], expected)
    if kind == "sampled":
        assert {token < 64 for tokens, _, _ in expected for token in tokens} == {True, False}
        assert len({len(tokens) for tokens, _, _ in expected}) > 3  # the batch shrank on the way


@pytest.mark.parametrize("kind", SAMPLINGS)
def test_ranks_that_share_experts_may_have_unequal_work(two_ranks: list[dict[str, Any]], kind: str) -> None:
    expected = one_ranks("moe", kind)
    assert_same(two_ranks[0]["experts"][kind] + two_ranks[1]["experts"][kind], expected)
    assert_same(two_ranks[0]["experts_one_idle"][kind], expected)
    assert two_ranks[1]["experts_one_idle"][kind] == []
