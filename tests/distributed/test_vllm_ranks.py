"""vLLM in the training processes of two ranks: an engine each, one over both, and each its own prompts; against one rank."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist
from helpers.ranks import RankError, run_ranks
from helpers.rows import CPU
from helpers.served import MAX_LENGTH, Served, served

from prism_nemo.config.enums import Device, Draws, Precision, RolloutEngineKind
from prism_nemo.config.rollout import RolloutConfig, VLLMConfig
from prism_nemo.config.schema import ModelConfig, ParallelConfig, RuntimeConfig
from prism_nemo.engine.runtime import session
from prism_nemo.models.policy import PolicyModel
from prism_nemo.packing.groups import EncodedPrompt
from prism_nemo.rollout.base import Rollout, RolloutError, SamplingParams
from prism_nemo.rollout.megatron import MegatronEngine

ROLLOUTS = 3
CASES = {"an engine a rank": (2, 1), "one engine over both": (2, 2), "each its own prompts": (1, 1)}  # ours, vLLM's TP
Outcome = list[tuple[int, list[int], list[float], str, int]]


def outcome(rollouts: list[Rollout]) -> Outcome:
    return [(r.prompt_index, r.tokens.tolist(), r.log_probs.tolist(), r.finish_reason, r.weights_version) for r in rollouts]


def sampling() -> SamplingParams:
    return SamplingParams(1.0, 1.0, 0, 16, 2, served().special)


class Fast:
    """A clock that has run a thousand times as fast as others."""

    def monotonic(self) -> float:
        return 1000 * time.monotonic()


def in_trouble(engine: Any, place: Served, policy: PolicyModel) -> dict[str, Any]:
    """What the ranks of one model find: their clocks differ, one is given a wrong prompt, one does not take the weights."""
    from prism_nemo.rollout.vllm import decoding

    def generate(prompts: Sequence[EncodedPrompt], **limits: Any) -> Outcome:
        seeds = range(ROLLOUTS * len(prompts))
        return outcome(engine.generate(prompts, replace(sampling(), **limits), num_rollouts_per_prompt=ROLLOUTS, seeds=seeds))

    found: dict[str, Any] = {}
    decoding.time = Fast() if dist.get_rank() == 1 else time  # type: ignore[assignment]
    forever = {"max_new_tokens": 150, "end_token_id": place.special[0]}
    found["limited"] = generate(place.prompts, time_limit_seconds=0.3, **forever)
    decoding.time = time  # type: ignore[assignment]
    wrong = place.prompts[1]
    order = [int(wrong.image_mask.nonzero()[0]), *range(len(wrong))]
    doubled = replace(
        wrong, input_ids=wrong.input_ids[order], position_ids=wrong.position_ids[:, order], image_mask=wrong.image_mask[order]
    )
    found["wrong prompt"] = message(lambda: generate([place.prompts[0], doubled, place.prompts[2]]))
    rpc = engine._llm.collective_rpc
    if dist.get_rank() == 1:  # its engine misses a tensor
        engine._llm.collective_rpc = lambda *args, **named: [parameters | {"it.weight"} for parameters in rpc(*args, **named)]
    found["unfilled"] = message(lambda: engine.update_weights(policy.hf_tensors(), 2))
    engine._llm.collective_rpc = rpc
    found["without"] = message(lambda: generate(place.prompts))
    engine.update_weights(policy.hf_tensors(), 1)
    found["after"] = generate(place.prompts)
    return found


def message(make: Callable[[], Any]) -> str:
    try:
        make()
    except RolloutError as error:
        return error.what
    return "nothing"


def on_vllm(tensor_parallel: int, engine_parallel: int) -> tuple[Outcome, dict[str, Any]]:
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
        found = outcome(engine.generate(prompts, sampling(), num_rollouts_per_prompt=ROLLOUTS, seeds=seeds))
        return found, in_trouble(engine, place, policy) if tensor_parallel > 1 else {}


def with_a_rank_that_fails() -> None:
    from prism_nemo.rollout.vllm import ServedModel, VLLMEngine

    place, parallel = served(), ParallelConfig(tensor_model_parallel_size=2)
    vllm = VLLMConfig(kv_cache_gb=0.1, tensor_model_parallel_size=2)
    with session(parallel, RuntimeConfig(device=Device.cpu)) as runtime:
        policy = PolicyModel(ModelConfig(path=str(place.directory), precision=Precision.fp32), parallel, runtime)
        engine = VLLMEngine(RolloutConfig(engine=RolloutEngineKind.vllm, vllm=vllm), ServedModel.of(policy, MAX_LENGTH))
        engine.update_weights(policy.hf_tensors(), 0)
        step, done = engine._llm.llm_engine.step, []

        def fail() -> Any:
            done.append(True)
            if len(done) > 3:
                raise MemoryError("no room in vLLM")
            return step()

        if dist.get_rank() == 0:
            engine._llm.llm_engine.step = fail
        engine.generate(place.prompts, sampling(), num_rollouts_per_prompt=1, seeds=range(len(place.prompts)))


@pytest.mark.vllm
def test_a_rank_that_fails_within_vllm_ends_those_that_wait_for_it_there() -> None:
    """They cannot be told, and the limit of collectives is not theirs: the watch over ranks ends them."""
    with pytest.raises(RankError, match=r"EngineBroken: vLLM failed on this rank: MemoryError: no room in vLLM") as raised:
        run_ranks(with_a_rank_that_fails, 2, timeout_seconds=400.0, fresh=True)
    assert "not finished after" not in str(raised.value)


@pytest.mark.vllm
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_sample_what_one_samples(case: str) -> None:
    place = served()
    engine = MegatronEngine(place.model(), device=CPU, max_batch_size=64)
    engine.update_weights((), 1)
    seeds = range(ROLLOUTS * len(place.prompts))
    expected = outcome(engine.generate(place.prompts, sampling(), num_rollouts_per_prompt=ROLLOUTS, seeds=seeds))
    tensor_parallel, engine_parallel = CASES[case]
    ranks = run_ranks(on_vllm, 2, tensor_parallel, engine_parallel, timeout_seconds=200.0, fresh=True)
    found, trouble = zip(*ranks, strict=True)
    if tensor_parallel > 1:
        check_trouble(*trouble, expected)
    for rank in range(2):
        own = expected
        if tensor_parallel == 1:
            own = [(one[0] // 2, *one[1:]) for one in expected if one[0] % 2 == rank]
        assert [one[:2] + one[3:] for one in found[rank]] == [one[:2] + one[3:] for one in own]
        for one, other in zip(found[rank], own, strict=True):
            assert one[2] == pytest.approx(other[2], abs=2e-5)


def check_trouble(first: dict[str, Any], second: dict[str, Any], expected: Outcome) -> None:
    """Both ranks are told the same, and nothing is left of it."""
    assert first["limited"] == second["limited"]
    assert len(first["limited"]) == len(expected)
    assert all(tokens and reason in ("timeout", "length") for _, tokens, _, reason, _ in first["limited"])
    for found in (first, second):
        assert "image tokens, its images make" in found["wrong prompt"]
        assert found["unfilled"] == "1 tensors are missing or unknown, it.weight among them"
        assert found["without"] == "the engine has no weights"
        assert [one[:2] for one in found["after"]] == [one[:2] for one in expected]
