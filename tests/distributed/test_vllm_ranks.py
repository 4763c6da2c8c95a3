"""vLLM in the training processes of two ranks: an engine each, one over both, and each its own prompts; against one rank."""

from __future__ import annotations

import pytest
import torch.distributed as dist
from helpers.ranks import run_ranks
from helpers.rows import CPU
from helpers.served import MAX_LENGTH, served

from prism_nemo.config.enums import Device, Draws, Precision, RolloutEngineKind
from prism_nemo.config.rollout import RolloutConfig, VLLMConfig
from prism_nemo.config.schema import ModelConfig, ParallelConfig, RuntimeConfig
from prism_nemo.engine.runtime import session
from prism_nemo.models.policy import PolicyModel
from prism_nemo.rollout.base import Rollout, SamplingParams
from prism_nemo.rollout.megatron import MegatronEngine

ROLLOUTS = 3
CASES = {"an engine a rank": (2, 1), "one engine over both": (2, 2), "each its own prompts": (1, 1)}  # ours, vLLM's TP
Outcome = list[tuple[int, list[int], list[float], str, int]]


def outcome(rollouts: list[Rollout]) -> Outcome:
    return [(r.prompt_index, r.tokens.tolist(), r.log_probs.tolist(), r.finish_reason, r.weights_version) for r in rollouts]


def sampling() -> SamplingParams:
    return SamplingParams(1.0, 1.0, 0, 16, 2, served().special)


def on_vllm(tensor_parallel: int, engine_parallel: int) -> Outcome:
    from prism_nemo.rollout.vllm import ServedModel, VLLMEngine

    place, parallel = served(), ParallelConfig(tensor_model_parallel_size=tensor_parallel)
    vllm = VLLMConfig(kv_cache_gb=0.1, draws=Draws.shared, tensor_model_parallel_size=engine_parallel)
    with session(parallel, RuntimeConfig(device=Device.cpu)) as runtime:
        policy = PolicyModel(ModelConfig(path=str(place.directory), precision=Precision.fp32), parallel, runtime)
        engine = VLLMEngine(RolloutConfig(engine=RolloutEngineKind.vllm, vllm=vllm), ServedModel.of(policy, MAX_LENGTH))
        for version in range(2):
            engine.update_weights(policy.hf_tensors(), version)
        mine = range(len(place.prompts)) if tensor_parallel > 1 else range(dist.get_rank(), len(place.prompts), 2)
        seeds = [ROLLOUTS * index + member for index in mine for member in range(ROLLOUTS)]
        prompts = [place.prompts[index] for index in mine]
        return outcome(engine.generate(prompts, sampling(), num_rollouts_per_prompt=ROLLOUTS, seeds=seeds))


@pytest.mark.vllm
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_sample_what_one_samples(case: str) -> None:
    place = served()
    engine = MegatronEngine(place.model(), device=CPU, max_batch_size=64)
    engine.update_weights((), 1)
    seeds = range(ROLLOUTS * len(place.prompts))
    expected = outcome(engine.generate(place.prompts, sampling(), num_rollouts_per_prompt=ROLLOUTS, seeds=seeds))
    tensor_parallel, engine_parallel = CASES[case]
    found = run_ranks(on_vllm, 2, tensor_parallel, engine_parallel)
    for rank in range(2):
        own = expected
        if tensor_parallel == 1:
            own = [(one[0] // 2, *one[1:]) for one in expected if one[0] % 2 == rank]
        assert [one[:2] + one[3:] for one in found[rank]] == [one[:2] + one[3:] for one in own]
        for one, other in zip(found[rank], own, strict=True):
            assert one[2] == pytest.approx(other[2], abs=2e-5)
