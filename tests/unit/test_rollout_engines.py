"""Every rollout engine against transformers and against the trainer, on the same prompts: several images, one, none."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from helpers.rows import CPU
from helpers.served import MAX_LENGTH, Served, served
from torch import Tensor

from prism_nemo.config.enums import Draws, RolloutEngineKind
from prism_nemo.config.rollout import RolloutConfig, VLLMConfig
from prism_nemo.engine.attention import RowAttention
from prism_nemo.engine.logprobs import label_log_probs
from prism_nemo.models.context import RowContext
from prism_nemo.models.qwen3_vl.language import gather_rows
from prism_nemo.models.qwen3_vl.model import Qwen3VLModel
from prism_nemo.models.weights import HFTensors
from prism_nemo.packing.groups import EncodedPrompt, Group, Segment
from prism_nemo.packing.rows import make_row
from prism_nemo.rollout.base import Rollout, RolloutError, SamplingParams
from prism_nemo.rollout.megatron import MegatronEngine
from prism_nemo.rollout.stopping import Tokenizer

END = 2
MODELS = {"experts": {"experts": True, "tied": False}, "dense": {}, "untied": {"tied": False}}
ENGINES = ["megatron", pytest.param("vllm", marks=pytest.mark.vllm), pytest.param("vllm-shared", marks=pytest.mark.vllm)]


@cache
def model_of(name: str) -> Qwen3VLModel:
    return served(**MODELS[name]).model()


def vllm_config(draws: Draws = Draws.engine, **settings: Any) -> RolloutConfig:
    return RolloutConfig(engine=RolloutEngineKind.vllm, vllm=VLLMConfig(kv_cache_gb=0.1, draws=draws), **settings)


def vllm_engine(place: Served, config: RolloutConfig) -> Any:
    from prism_nemo.rollout.vllm import ServedModel, VLLMEngine

    return VLLMEngine(config, ServedModel(place.directory, place.config, torch.float32, CPU, MAX_LENGTH))


@cache
def engine_of(kind: str, name: str) -> Any:
    """With the model's weights, as version 0. Engines live as long as the process."""
    place, model = served(**MODELS[name]), model_of(name)
    if kind == "megatron":
        engine: Any = MegatronEngine(model, device=CPU, max_batch_size=64, decode=Tokenizer(place.directory).decode)
    else:
        engine = vllm_engine(place, vllm_config(Draws.shared if kind == "vllm-shared" else Draws.engine))
    engine.update_weights(HFTensors(model, place.config), 0)
    return engine


@pytest.fixture(params=MODELS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=ENGINES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def params(temperature: float, max_new_tokens: int, place: Served, *, end: int = END, **more: Any) -> SamplingParams:
    return replace(SamplingParams(temperature, 1.0, 0, max_new_tokens, end, place.special), **more)


def sample(engine: Any, prompts: Sequence[EncodedPrompt], sampling: SamplingParams, count: int, seed: int = 0) -> list[Rollout]:
    seeds = range(seed, seed + count * len(prompts))
    return list(engine.generate(prompts, sampling, num_rollouts_per_prompt=count, seeds=seeds))


def trainer_log_probs(model: Qwen3VLModel, prompt: EncodedPrompt, tokens: Tensor, sampling: SamplingParams) -> Tensor:
    row = make_row([Group(prompt, (Segment(tokens, 0),))])
    with torch.no_grad():
        hidden = model.hidden_states(row, RowContext(attention=RowAttention(row.layout, CPU)))
        return label_log_probs(
            gather_rows(hidden, row.label_source, model.config, model.pg_collection.tp),
            model.language_model.output_weight,
            row.label_ids,
            model.pg_collection.tp,
            temperature=sampling.temperature or 1.0,
            banned_token_ids=sampling.banned_token_ids,
        )[0]


@cache
def transformers_model(name: str) -> Any:
    import transformers

    directory = served(**MODELS[name]).directory
    return transformers.AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()


def transformers_greedy(name: str, prompt: EncodedPrompt, max_new_tokens: int) -> list[int]:
    place = served(**MODELS[name])
    ids = prompt.input_ids[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if prompt.image_grid_thw.numel():
        inputs |= {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
        inputs |= {"mm_token_type_ids": prompt.image_mask[None].int()}
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, "eos_token_id": END, "pad_token_id": 0}
    options |= {"suppress_tokens": list(place.special)}
    return list(transformers_model(name).generate(**inputs, **options)[0, ids.shape[1] :].tolist())


def same(left: Sequence[Rollout], right: Sequence[Rollout], tolerance: float = 2e-5) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.prompt_index == other.prompt_index
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.finish_reason == other.finish_reason
        torch.testing.assert_close(one.log_probs, other.log_probs, atol=tolerance, rtol=0)


def test_texts_end_responses_whatever_their_tokens(kind: str, name: str) -> None:
    """As the whole of them would be cut behind the token that completes a text; the end token ends them still."""
    place, engine = served(**MODELS[name]), engine_of(kind, name)
    decode = Tokenizer(place.directory).decode
    free = params(1.0, 24, place)
    whole = sample(engine, place.prompts, free, 4)
    texts = [decode(rollout.tokens.tolist()) for rollout in whole]
    stops = tuple(text[middle : middle + 4].strip() for text in texts[::5] if (middle := len(text) // 2) > 4)
    assert all(stops)
    expected = []
    for rollout in whole:
        tokens = rollout.tokens.tolist()
        ends = (n for n in range(1, len(tokens) + 1) if any(stop in decode(tokens[:n]) for stop in stops))
        length = next(ends, None)
        cut = {} if length is None else {"tokens": rollout.tokens[:length], "log_probs": rollout.log_probs[:length]}
        expected.append(replace(rollout, **cut, finish_reason="stop" if length is not None else rollout.finish_reason))
    stopped = sample(engine, place.prompts, replace(free, stop_texts=stops), 4)
    same(stopped, expected)
    assert sum(len(one.tokens) < len(other.tokens) for one, other in zip(stopped, whole, strict=True)) > 2


def test_greedy_tokens_equal_transformers(kind: str, name: str) -> None:
    place = served(**MODELS[name])
    rollouts = sample(engine_of(kind, name), place.prompts, params(0.0, 24, place), 1)
    assert [rollout.tokens.tolist() for rollout in rollouts] == [transformers_greedy(name, p, 24) for p in place.prompts]
    assert all((rollout.finish_reason == "stop") == (int(rollout.tokens[-1]) == END) for rollout in rollouts)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_log_probs_equal_the_trainers(kind: str, name: str, temperature: float) -> None:
    place = served(**MODELS[name])
    sampling = params(temperature, 30, place)
    rollouts = sample(engine_of(kind, name), place.prompts, sampling, 6 if temperature else 1)
    for rollout in rollouts:
        expected = trainer_log_probs(model_of(name), place.prompts[rollout.prompt_index], rollout.tokens, sampling)
        torch.testing.assert_close(rollout.log_probs, expected, atol=2e-5, rtol=0)


def test_ends_limits_and_what_is_banned(kind: str) -> None:
    place = served()
    rollouts = sample(engine_of(kind, "dense"), place.prompts, params(2.0, 40, place), 8)
    assert [rollout.prompt_index for rollout in rollouts] == [index for index in range(len(place.prompts)) for _ in range(8)]
    for rollout in rollouts:
        tokens = rollout.tokens.tolist()
        assert not set(tokens) & set(place.special)
        assert END not in tokens[:-1]
        assert rollout.finish_reason == ("stop" if tokens[-1] == END else "length")
        assert len(tokens) == 40 or rollout.finish_reason == "stop"
        assert rollout.weights_version == 0
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}


def test_same_seed_same_rollout_whatever_the_call(kind: str) -> None:
    place, engine = served(), engine_of(kind, "dense")
    sampling = params(1.0, 16, place)
    together = sample(engine, place.prompts, sampling, 3, seed=7)
    alone = [
        engine.generate([prompt], sampling, num_rollouts_per_prompt=1, seeds=[7 + 3 * index + member])[0]
        for index, prompt in enumerate(place.prompts)
        for member in range(3)
    ]
    same([replace(rollout, prompt_index=0) for rollout in together], alone)
    assert len({tuple(rollout.tokens.tolist()) for rollout in together[:3]}) > 1


def test_tokens_come_as_often_as_they_are_probable(kind: str) -> None:
    place = served()
    sampling = params(1.0, 1, place, top_k=4)
    rollouts = sample(engine_of(kind, "dense"), place.prompts[2:3], sampling, 2000)
    tokens = torch.cat([rollout.tokens for rollout in rollouts])
    for token in tokens.unique():
        drawn = tokens == token
        expected = next(rollout.log_probs for rollout, hit in zip(rollouts, drawn, strict=True) if hit).exp()
        assert abs(float(drawn.float().mean()) - float(expected)) < 0.05  # four standard deviations and a half at 1/2
    assert len(tokens.unique()) == 4


@pytest.mark.vllm
@pytest.mark.parametrize("limits", [{}, {"top_k": 5}, {"top_p": 0.8}, {"temperature": 0.7}])
def test_shared_draws_give_the_megatron_engines_rollouts(name: str, limits: Mapping[str, Any]) -> None:
    """But where a random number lies within rounding of the edge between two tokens: none does with these seeds."""
    place = served(**MODELS[name])
    sampling = replace(params(1.0, 24, place), **limits)
    ours, theirs = (sample(engine_of(kind, name), place.prompts, sampling, 4, seed=1) for kind in ("megatron", "vllm-shared"))
    same(ours, theirs)


# Weights


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["vllm", "vllm-shared"])
def test_after_many_updates_an_engine_is_as_new(kind: str, name: str) -> None:
    """Bit by bit, images included: nothing is kept that was computed by other weights, and no tensor of theirs."""
    place = served(**MODELS[name])
    draws = Draws.shared if kind == "vllm-shared" else Draws.engine
    used, fresh = (vllm_engine(place, vllm_config(draws)) for _ in range(2))
    sampling = params(1.0, 16, place)
    weights = [place.tensors(seed) for seed in (1, 2)]
    outputs = []
    for version in range(20):
        used.update_weights(weights[version % 2].items(), version)
        outputs.append(sample(used, place.prompts, sampling, 2))
    fresh.update_weights(weights[1].items(), 19)
    expected = sample(fresh, place.prompts, sampling, 2)
    same(outputs[-1], expected, tolerance=0.0)
    same([replace(rollout, weights_version=19) for rollout in outputs[1]], expected, tolerance=0.0)
    assert outputs[0][0].tokens.tolist() != expected[0].tokens.tolist()
    assert [rollouts[0].weights_version for rollouts in outputs] == list(range(20))


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("forget", "broken"),
    [
        ("reset_prefix_cache", "keys and values"),
        ("reset_encoder_cache", "features of images"),
        ("tied head", "the output head"),
    ],
)
def test_what_goes_wrong_without(forget: str, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would notice: leaving one thing out changes what is sampled."""
    place = served()
    engine = vllm_engine(place, vllm_config())
    sampling = params(0.0, 8, place)
    first, second = place.tensors(1), place.tensors(2)
    engine.update_weights(first.items(), 0)
    sample(engine, place.prompts, sampling, 1)
    engine.update_weights(second.items(), 1)
    expected = sample(engine, place.prompts, sampling, 1)
    engine.update_weights(first.items(), 2)
    sample(engine, place.prompts, sampling, 1)
    leave_out(engine, forget, monkeypatch)
    engine.update_weights(second.items(), 3)
    try:
        found = sample(engine, place.prompts, sampling, 1)
    except Exception:
        return  # a cache that is out of step with another may also end the engine
    assert any(
        one.tokens.tolist() != other.tokens.tolist() or not torch.equal(one.log_probs, other.log_probs)
        for one, other in zip(found, expected, strict=True)
    ), f"{broken} were stale, and nothing changed"


def leave_out(engine: Any, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if what == "tied head":  # as where its product is taken with a packed copy of the embedding
        head = engine._llm.collective_rpc("get_model")[0].language_model.lm_head
        old = head.weight.detach().clone()
        monkeypatch.setattr(head, "cpu_linear", lambda x, weight, bias: torch.nn.functional.linear(x, old, bias))
    elif what == "reset_prefix_cache":
        monkeypatch.setattr(engine._llm, "reset_prefix_cache", lambda: True)
    else:
        monkeypatch.setattr(engine._llm.llm_engine, "reset_encoder_cache", lambda: None)
        monkeypatch.setattr(engine._llm, "reset_mm_cache", lambda: None)


@pytest.mark.vllm
def test_incomplete_weights_are_refused_and_nothing_is_sampled_by_them() -> None:
    place = served()
    engine = vllm_engine(place, vllm_config())
    prompts, sampling = place.prompts[:1], params(0.0, 2, place)
    with pytest.raises(RolloutError, match="no weights"):
        sample(engine, prompts, sampling, 1)
    tensors = place.tensors()
    missing = {key: tensor for key, tensor in tensors.items() if not key.endswith("norm.weight")}
    with pytest.raises(RolloutError, match=r"missing or unknown, model\.language_model"):
        engine.update_weights(missing.items(), 0)
    with pytest.raises(RolloutError, match="no weights"):
        sample(engine, prompts, sampling, 1)

    def interrupted() -> Any:
        yield from list(tensors.items())[:7]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.update_weights(interrupted(), 1)
    with pytest.raises(RolloutError, match="no weights"):
        sample(engine, prompts, sampling, 1)
    engine.update_weights(tensors.items(), 2)
    same(sample(engine, prompts, sampling, 1), sample(engine_of("vllm", "dense"), prompts, sampling, 1), tolerance=0.0)


# What cannot be sampled from


def without(prompt: EncodedPrompt, place: int) -> EncodedPrompt:
    keep = torch.arange(len(prompt)) != place
    return replace(
        prompt, input_ids=prompt.input_ids[keep], position_ids=prompt.position_ids[:, keep], image_mask=prompt.image_mask[keep]
    )


def doubled(prompt: EncodedPrompt, place: int) -> EncodedPrompt:
    order = torch.cat([torch.arange(place + 1), torch.arange(place, len(prompt))])
    return replace(
        prompt, input_ids=prompt.input_ids[order], position_ids=prompt.position_ids[:, order], image_mask=prompt.image_mask[order]
    )


@pytest.mark.vllm
@pytest.mark.parametrize("change", [without, doubled])
@pytest.mark.parametrize("which", [0, 1])
def test_image_tokens_must_be_those_of_the_images(change: Callable[[EncodedPrompt, int], EncodedPrompt], which: int) -> None:
    place = served()
    prompt = place.prompts[which]
    wrong = change(prompt, int(prompt.image_mask.nonzero()[0]))
    with pytest.raises(RolloutError, match="image tokens, its images make"):
        sample(engine_of("vllm", "dense"), [wrong], params(0.0, 2, place), 1)


@pytest.mark.vllm
def test_too_long_a_prompt_and_logits_that_are_not_finite() -> None:
    place = served()
    with pytest.raises(RolloutError, match="do not fit into 256") as caught:
        sample(engine_of("vllm", "dense"), place.prompts, params(0.0, 250, place), 1)
    assert caught.value.where == "data.max_prompt_length, data.max_response_length"
    for draws in Draws:
        engine = vllm_engine(place, vllm_config(draws))
        broken = place.tensors()
        broken["model.language_model.norm.weight"] = torch.full_like(broken["model.language_model.norm.weight"], float("nan"))
        engine.update_weights(broken.items(), 0)
        with pytest.raises(RolloutError, match="not finite"):
            sample(engine, place.prompts[:1], params(1.0, 2, place), 1)


@pytest.mark.vllm
def test_time_is_up(kind: str = "vllm") -> None:
    """What there is by then is a rollout; the next call starts anew."""
    place = served()
    engine = vllm_engine(place, vllm_config())
    engine.update_weights(place.tensors().items(), 0)
    stopped = sample(engine, place.prompts, params(1.0, 60, place, time_limit_seconds=1e-6), 2)
    assert {rollout.finish_reason for rollout in stopped} == {"timeout"}
    assert all(len(rollout.tokens) for rollout in stopped)
    whole = sample(engine, place.prompts, params(1.0, 60, place), 2)
    for part, rollout in zip(stopped, whole, strict=True):
        assert rollout.tokens[: len(part.tokens)].tolist() == part.tokens.tolist()
    assert {rollout.finish_reason for rollout in whole} <= {"stop", "length"}


@pytest.mark.vllm
def test_the_training_process_keeps_its_random_numbers() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    vllm_engine(served(), vllm_config())
    assert torch.equal(torch.rand(2), expected)
