"""Experts that are cut over two ranks, in the policy and in the vLLM engine that both share; against one rank."""

from __future__ import annotations

import pytest
from helpers.ranks import run_ranks
from helpers.rows import CPU
from helpers.served import MAX_LENGTH, served

from prism_nemo.config.enums import Device, Draws, Precision, RolloutEngineKind
from prism_nemo.config.rollout import RolloutConfig, VLLMConfig
from prism_nemo.config.schema import ModelConfig, ParallelConfig, RuntimeConfig
from prism_nemo.engine.runtime import Runtime, session
from prism_nemo.models.policy import PolicyModel
from prism_nemo.rollout.base import SamplingParams
from prism_nemo.rollout.megatron import MegatronEngine

Outcome = list[tuple[list[int], list[float]]]
EXPERTS = {"experts": True, "tied": False}
DENSE = {"experts": False, "tied": False}


def sampling() -> SamplingParams:
    return SamplingParams(1.0, 1.0, 0, 12, 2, served(**EXPERTS).special)


def on_vllm() -> Outcome:
    """Behind an engine without experts, with which vLLM has made its groups."""
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    with session(parallel, RuntimeConfig(device=Device.cpu)) as runtime:
        sampled(runtime, parallel, DENSE)
        return sampled(runtime, parallel, EXPERTS)


def sampled(runtime: Runtime, parallel: ParallelConfig, model: dict[str, bool]) -> Outcome:
    from prism_nemo.rollout.vllm import ServedModel, VLLMEngine

    place = served(**model)
    vllm = VLLMConfig(kv_cache_gb=0.1, draws=Draws.shared, tensor_model_parallel_size=2)
    policy = PolicyModel(ModelConfig(path=str(place.directory), precision=Precision.fp32), parallel, runtime)
    engine = VLLMEngine(RolloutConfig(engine=RolloutEngineKind.vllm, vllm=vllm), ServedModel.of(policy, MAX_LENGTH))
    engine.update_weights(policy.hf_tensors(), 0)
    seeds = range(2 * len(place.prompts))
    rollouts = engine.generate(place.prompts, sampling(), num_rollouts_per_prompt=2, seeds=seeds)
    return [(rollout.tokens.tolist(), rollout.log_probs.tolist()) for rollout in rollouts]


@pytest.mark.vllm
def test_two_ranks_sample_what_one_samples() -> None:
    place = served(**EXPERTS)
    engine = MegatronEngine(place.model(), device=CPU, max_batch_size=64)
    engine.update_weights((), 0)
    seeds = range(2 * len(place.prompts))
    expected = engine.generate(place.prompts, sampling(), num_rollouts_per_prompt=2, seeds=seeds)
    for found in run_ranks(on_vllm, 2, timeout_seconds=300.0, fresh=True):
        assert [tokens for tokens, _ in found] == [rollout.tokens.tolist() for rollout in expected]
        for (_, log_probs), rollout in zip(found, expected, strict=True):
            assert log_probs == pytest.approx(rollout.log_probs.tolist(), abs=2e-5)
