"""vLLM's engine with several calls under way: each is as it would be alone, and what becomes of one touches no other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from helpers.rows import CPU
from helpers.served import MAX_LENGTH, served

from prism_nemo.config.enums import Draws, RolloutEngineKind
from prism_nemo.config.rollout import RolloutConfig, VLLMConfig
from prism_nemo.packing.groups import EncodedPrompt
from prism_nemo.rollout.base import ContinuousEngine, Rollout, RolloutError, SamplingParams

pytestmark = pytest.mark.vllm
COUNT = 2
SAMPLING = SamplingParams(1.0, 1.0, 0, 24, 2, served().special)
WAYS = (  # to sample, each in a call of its own
    SAMPLING,
    replace(SAMPLING, temperature=0.7, max_new_tokens=30),
    replace(SAMPLING, temperature=0.0, max_new_tokens=17),
    replace(SAMPLING, top_k=5, max_new_tokens=9),
    replace(SAMPLING, top_p=0.8, time_limit_seconds=1000.0),
    replace(SAMPLING, temperature=1.3, end_token_id=3),
)


@cache
def engine_of(draws: Draws, max_batch_size: int = 64) -> Any:
    from prism_nemo.rollout.vllm import ServedModel, VLLMEngine

    place = served()
    config = RolloutConfig(
        engine=RolloutEngineKind.vllm, vllm=VLLMConfig(kv_cache_gb=0.1, draws=draws), max_batch_size=max_batch_size
    )
    engine = VLLMEngine(config, ServedModel(place.directory, place.config, torch.float32, CPU, MAX_LENGTH))
    engine.update_weights(place.tensors().items(), 7)
    return engine


@pytest.fixture(params=Draws)
def engine(request: pytest.FixtureRequest) -> Any:
    return engine_of(request.param)


def add(engine: Any, prompts: Sequence[EncodedPrompt], sampling: SamplingParams = SAMPLING, seed: int = 0) -> Any:
    return engine.add(prompts, sampling, num_rollouts_per_prompt=COUNT, seeds=range(seed, seed + COUNT * len(prompts)))


def alone(engine: Any, prompts: Sequence[EncodedPrompt], sampling: SamplingParams = SAMPLING, seed: int = 0) -> list[Rollout]:
    seeds = range(seed, seed + COUNT * len(prompts))
    return list(engine.generate(prompts, sampling, num_rollouts_per_prompt=COUNT, seeds=seeds))


def finish(engine: Any, *generations: Any) -> None:
    while not all(generation.done for generation in generations):
        engine.step()


def same(left: Sequence[Rollout], right: Sequence[Rollout]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert (one.prompt_index, one.finish_reason) == (other.prompt_index, other.finish_reason)
        assert one.weights_version == other.weights_version == 7
        torch.testing.assert_close(one.log_probs, other.log_probs, atol=2e-5, rtol=0)


def empty(engine: Any) -> None:
    """Nothing is left of what was generated."""
    assert engine._decoder.idle
    assert not engine._decoder._owner
    assert not engine._llm.llm_engine.has_unfinished_requests()
    if engine._config.vllm.draws is Draws.shared:
        logits_processors = engine._llm.llm_engine.engine_core.engine_core.model_executor.driver_worker
        (draws,) = (
            one for one in logits_processors.model_runner.input_batch.logitsprocs.all if type(one).__name__ == "SharedDraws"
        )
        assert not draws._log_probs


def test_calls_that_come_while_others_run_are_what_they_are_alone(engine: Any) -> None:
    """One more every few steps, each with its own prompts, seeds and way to sample."""
    assert isinstance(engine, ContinuousEngine)
    prompts = served().prompts
    calls = [((prompts[index], prompts[(index + 1) % len(prompts)]), way, 100 * index) for index, way in enumerate(WAYS)]
    expected = [alone(engine, *call) for call in calls]
    generations = []
    for call in calls:
        generations.append(add(engine, *call))
        for _ in range(4):
            engine.step()
    assert sum(not generation.done for generation in generations) > 2
    finish(engine, *generations)
    for generation, rollouts in zip(generations, expected, strict=True):
        same(generation.rollouts(), rollouts)
    empty(engine)


def test_more_than_there_is_room_for(draws: Draws = Draws.shared) -> None:
    engine = engine_of(draws, max_batch_size=3)
    prompts = served().prompts
    expected = [alone(engine, [prompt], seed=index) for index, prompt in enumerate(prompts)]
    generations = [add(engine, [prompt], seed=index) for index, prompt in enumerate(prompts)]
    finish(engine, *generations)
    for generation, rollouts in zip(generations, expected, strict=True):
        same(generation.rollouts(), rollouts)
    empty(engine)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 9])
def test_a_call_that_is_dropped_leaves_nothing(engine: Any, steps: int) -> None:
    """Its log-probabilities neither: the next calls have their own, and as many as tokens."""
    first, second, *_, last = served().prompts
    expected = alone(engine, [second], seed=5)
    dropped, kept = add(engine, [first]), add(engine, [second], seed=5)
    for _ in range(steps):
        engine.step()
    engine.drop(dropped)
    engine.drop(dropped)
    after = add(engine, [last], replace(SAMPLING, temperature=0.0))
    finish(engine, kept, after)
    same(kept.rollouts(), expected)
    same(after.rollouts(), alone(engine, [last], replace(SAMPLING, temperature=0.0)))
    empty(engine)


def test_an_interrupt_leaves_nothing(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the library's step, and between two steps."""
    prompts = served().prompts[:2]
    expected = alone(engine, prompts, replace(SAMPLING, max_new_tokens=3))
    vllm_step, own_step = engine._llm.llm_engine.step, engine.step
    for where, name, step in ((engine._llm.llm_engine, "step", vllm_step), (engine, "step", own_step)):
        left = [5]

        def interrupted(step: Any = step, left: list[int] = left) -> Any:
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt
            return step()

        with monkeypatch.context() as patch:
            patch.setattr(where, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                alone(engine, prompts)
        empty(engine)
        same(alone(engine, prompts, replace(SAMPLING, max_new_tokens=3)), expected)


def test_time_limits_are_each_calls_own(engine: Any) -> None:
    prompts = served().prompts
    long = replace(SAMPLING, max_new_tokens=100, end_token_id=3)
    whole = alone(engine, prompts, long)
    free = add(engine, prompts, long)
    for _ in range(3):
        engine.step()
    limited = add(engine, prompts, replace(long, time_limit_seconds=1e-6))
    finish(engine, limited)
    assert not free.done
    for part, rollout in zip(limited.rollouts(), whole, strict=True):
        assert 1 <= len(part.tokens) <= 3
        assert part.finish_reason == "timeout" or part.tokens.tolist() == rollout.tokens.tolist()
        assert rollout.tokens[: len(part.tokens)].tolist() == part.tokens.tolist()
        torch.testing.assert_close(part.log_probs, rollout.log_probs[: len(part.tokens)], atol=2e-5, rtol=0)
    finish(engine, free)
    same(free.rollouts(), whole)
    empty(engine)


def test_time_that_is_up_while_there_is_no_room_gives_a_token_each(draws: Draws = Draws.shared) -> None:
    engine = engine_of(draws, max_batch_size=3)
    limited = add(engine, served().prompts, replace(SAMPLING, max_new_tokens=100, time_limit_seconds=1e-6))
    finish(engine, limited)
    rollouts = limited.rollouts()
    assert len(rollouts) == COUNT * len(served().prompts)
    assert all(1 <= len(rollout.tokens) == len(rollout.log_probs) for rollout in rollouts)
    empty(engine)


def test_what_goes_wrong_with_one_call_is_its_own(engine: Any) -> None:
    """An image token too many, too many tokens, pixels that are no numbers: the call beside them is as it is alone."""
    prompts = served().prompts
    expected = alone(engine, prompts[2:4])
    kept = add(engine, prompts[2:4])
    engine.step()
    wrong = prompts[0]
    order = [0, *range(len(wrong))]
    order = order if bool(wrong.image_mask[0]) else [int(wrong.image_mask.nonzero()[0]), *range(len(wrong))]
    doubled = replace(
        wrong,
        input_ids=wrong.input_ids[order],
        position_ids=wrong.position_ids[:, order],
        image_mask=wrong.image_mask[order],
    )
    with pytest.raises(RolloutError, match="image tokens, its images make"):
        add(engine, [prompts[1], doubled])
    with pytest.raises(RolloutError, match="do not fit"):
        add(engine, prompts, replace(SAMPLING, max_new_tokens=MAX_LENGTH))
    with pytest.raises(RolloutError, match=r"vLLM refuses the request: .*out-of-vocab"):
        add(engine, prompts, replace(SAMPLING, end_token_id=10**6))
    spoilt = replace(prompts[1], pixel_values=torch.full_like(prompts[1].pixel_values, float("nan")))
    with pytest.raises(RolloutError, match="pixels are not finite"):
        add(engine, [prompts[2], spoilt])
    finish(engine, kept)
    same(kept.rollouts(), expected)
    empty(engine)


def test_weights_that_are_not_finite_leave_nothing_behind(engine: Any) -> None:
    """Every call fails by itself, after its first token where that shows it; with sound weights again all is as before."""
    prompts, tensors = served().prompts, served().tensors()
    expected = alone(engine, prompts)
    broken = dict(tensors)
    name = "model.language_model.layers.0.self_attn.v_proj.weight"
    broken[name] = torch.full_like(broken[name], float("nan"))
    engine.update_weights(broken.items(), 6)
    generations = [add(engine, [prompt]) for prompt in prompts]
    finish(engine, *generations)
    for generation in generations:
        with pytest.raises(RolloutError, match="not finite"):
            generation.rollouts()
    engine.update_weights(tensors.items(), 7)
    same(alone(engine, prompts), expected)
    empty(engine)


def test_nor_in_the_cache_of_an_engine_that_the_next_stage_takes_over() -> None:
    from prism_nemo.rollout.vllm import ServedModel, VLLMEngine

    place = served()
    config = RolloutConfig(
        engine=RolloutEngineKind.vllm, vllm=VLLMConfig(kv_cache_gb=0.001, enable_prefix_caching=False), max_batch_size=8
    )
    model = ServedModel(place.directory, place.config, torch.float32, CPU, MAX_LENGTH)
    expected = alone(engine_of(Draws.engine), place.prompts)
    broken = place.tensors()
    name = "model.language_model.layers.0.self_attn.v_proj.weight"
    broken[name] = torch.full_like(broken[name], float("nan"))
    first = VLLMEngine(config, model)
    first.update_weights(broken.items(), 7)
    with pytest.raises(RolloutError, match="not finite"):
        alone(first, place.prompts)
    first.close()
    second = VLLMEngine(config, model)
    assert second._llm is first._llm
    second.update_weights(place.tensors().items(), 7)
    same(alone(second, place.prompts), expected)


def test_when_responses_are_put_back_for_want_of_room_they_are_the_same(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM forgets what a response's keys and values are, and computes them again: tokens and log-probabilities stay."""
    from prism_nemo.rollout.vllm import ServedModel, VLLMEngine

    place, long = served(), replace(SAMPLING, max_new_tokens=100, end_token_id=3)
    config = RolloutConfig(
        engine=RolloutEngineKind.vllm,
        vllm=VLLMConfig(kv_cache_gb=0.001, draws=engine._config.vllm.draws),  # 16 blocks; one response may take 8
        max_batch_size=64,
    )
    small = VLLMEngine(config, ServedModel(place.directory, place.config, torch.float32, CPU, MAX_LENGTH))
    small.update_weights(place.tensors().items(), 7)
    scheduler, put_back = small._llm.llm_engine.engine_core.engine_core.scheduler, []
    preempt = scheduler._preempt_request
    monkeypatch.setattr(scheduler, "_preempt_request", lambda *one, **more: (put_back.append(one), preempt(*one, **more))[1])
    same(alone(small, place.prompts, long), alone(engine, place.prompts, long))
    assert put_back
    empty(small)


def test_when_the_engine_fails_all_calls_end_and_later_ones_are_sound(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = served().prompts
    expected = alone(engine, prompts[:2])
    generations = [add(engine, [prompt]) for prompt in prompts[:3]]
    engine.step()

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine._llm.llm_engine.engine_core.engine_core.model_executor, "execute_model", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            finish(engine, *generations)
    for generation in generations:
        assert generation.done
        with pytest.raises(RuntimeError, match="out of memory"):
            generation.rollouts()
    empty(engine)
    same(alone(engine, prompts[:2]), expected)


def test_no_weights_are_taken_while_something_is_generated(engine: Any) -> None:
    generation = add(engine, served().prompts[:1])
    with pytest.raises(AssertionError, match="being generated"):
        engine.update_weights((), 8)
    finish(engine, generation)
    assert generation.rollouts()[0].weights_version == 7


def test_memory_that_is_given_back_is_taken_back_in_either_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """What vLLM is told, in what order; its own part of it needs a GPU."""
    engine, told = engine_of(Draws.engine), list[str]()
    monkeypatch.setattr(engine, "_model", replace(engine._model, device=torch.device("cuda")))
    monkeypatch.setattr(engine._llm, "sleep", lambda level: told.append(f"sleep {level}"))
    monkeypatch.setattr(engine._llm, "wake_up", lambda tags: told.extend(tags))
    prompts, tensors = served().prompts[:1], served().tensors()
    before = alone(engine, prompts)

    def takes_weights() -> None:
        engine.update_weights(tensors.items(), 7)

    for first, second in ((takes_weights, engine.wake_up), (engine.wake_up, takes_weights)):
        told.clear()
        assert engine.sleep() is False and engine.sleep() is False
        with pytest.raises(RolloutError, match="no weights"):
            alone(engine, prompts)
        first()
        with pytest.raises((RolloutError, AssertionError), match=r"no weights|asleep"):
            alone(engine, prompts)
        second()
        engine.wake_up()
        same(alone(engine, prompts), before)
        assert told[0] == "sleep 2" and sorted(told[1:]) == ["kv_cache", "weights"]
    told.clear()
    engine.sleep()
    takes_weights()
    engine.sleep()  # vLLM does not fall asleep where a part of it does already
    assert told == ["sleep 2", "weights", "kv_cache", "sleep 2"]
    takes_weights()
    engine.wake_up()
    same(alone(engine, prompts), before)
