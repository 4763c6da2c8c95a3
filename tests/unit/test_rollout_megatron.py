"""The Megatron rollout engine against transformers' `generate` and against the trainer's log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.rows import CPU, build_model, one_rank
from helpers.tiny import IMAGE_TOKEN, TinyModel, make_prompt, tiny_model
from torch import Tensor

import prism_nemo.rollout.megatron as megatron_module
from prism_nemo.config.enums import Precision
from prism_nemo.config.schema import ParallelConfig
from prism_nemo.engine.attention import RowAttention
from prism_nemo.engine.logprobs import label_log_probs
from prism_nemo.models.context import RowContext
from prism_nemo.models.qwen3_vl.config import Qwen3VLShape
from prism_nemo.models.qwen3_vl.language import gather_rows
from prism_nemo.models.qwen3_vl.model import Qwen3VLModel
from prism_nemo.models.weights import load_hf_weights
from prism_nemo.packing.groups import EncodedPrompt, Group, Segment
from prism_nemo.packing.rows import make_row
from prism_nemo.rollout.base import Rollout, RolloutError, SamplingParams
from prism_nemo.rollout.megatron import MegatronEngine

NEVER = -1  # an end token that no model samples
PROMPTS = (
    make_prompt([(4, 6), (8, 4)], seed=1),
    make_prompt([(6, 4)], seed=2, text_length=2),
    make_prompt([], seed=3, text_length=11),
    make_prompt([(2, 2), (4, 4), (2, 8)], seed=4, text_length=3),
    make_prompt([], seed=5, text_length=1),
)


@pytest.fixture(scope="module", params=["dense", "moe"])
def tiny(request: pytest.FixtureRequest) -> TinyModel:
    one_rank()
    return tiny_model(experts=request.param == "moe")


@pytest.fixture(scope="module")
def model(tiny: TinyModel) -> Qwen3VLModel:
    return build_model(tiny.directory)


@pytest.fixture(scope="module")
def dense() -> Qwen3VLModel:
    one_rank()
    return build_model(tiny_model().directory)


def engine_of(model: Qwen3VLModel, max_batch_size: int = 256) -> MegatronEngine:
    return MegatronEngine(model, device=CPU, max_batch_size=max_batch_size)


def params(
    temperature: float, max_new_tokens: int, *, end: int = NEVER, banned: Sequence[int] = (), top_p: float = 1.0, top_k: int = 0
) -> SamplingParams:
    return SamplingParams(temperature, top_p, top_k, max_new_tokens, end, tuple(banned))


def sample(
    model: Qwen3VLModel, sampling: SamplingParams, count: int, *, max_batch_size: int = 256, seed: int = 0
) -> list[Rollout]:
    """`count` rollouts of every prompt."""
    seeds = range(seed, seed + count * len(PROMPTS))
    return engine_of(model, max_batch_size).generate(PROMPTS, sampling, num_rollouts_per_prompt=count, seeds=seeds)


def transformers_greedy(hf: Any, prompt: EncodedPrompt, max_new_tokens: int, end: int | None) -> list[int]:
    ids = prompt.input_ids[None]
    images: dict[str, Tensor] = {}
    if prompt.image_grid_thw.numel():
        images = {
            "pixel_values": prompt.pixel_values,
            "image_grid_thw": prompt.image_grid_thw,
            "mm_token_type_ids": (ids == IMAGE_TOKEN).int(),
        }
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, "eos_token_id": end, "pad_token_id": 0}
    return hf.generate(input_ids=ids, **images, **options)[0, ids.shape[1] :].tolist()


def trainer_log_probs(
    model: Qwen3VLModel, prompt: EncodedPrompt, tokens: Tensor, temperature: float, banned: Sequence[int]
) -> Tensor:
    row = make_row([Group(prompt, (Segment(tokens, 0),))])
    with torch.no_grad():
        hidden = model.hidden_states(row, RowContext(attention=RowAttention(row.layout, CPU)))
        sources = gather_rows(hidden, row.label_source, model.config, model.pg_collection.tp)
        weight, tp = model.language_model.output_weight, model.pg_collection.tp
        return label_log_probs(sources, weight, row.label_ids, tp, temperature=temperature, banned_token_ids=banned)[0]


def same(left: Sequence[Rollout], right: Sequence[Rollout]) -> None:
    """The same rollouts but for rounding of the log-probabilities."""
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.finish_reason == other.finish_reason
        torch.testing.assert_close(one.log_probs, other.log_probs, atol=1e-5, rtol=0)


def test_greedy_tokens_equal_transformers(tiny: TinyModel, model: Qwen3VLModel) -> None:
    """Prompts of different lengths, with several images, one and none, in one batch; to the limit, and to an end token."""
    free = [transformers_greedy(tiny.hf, prompt, 40, None) for prompt in PROMPTS]
    assert [rollout.tokens.tolist() for rollout in sample(model, params(0.0, 40), 1)] == free
    end = free[0][7]
    expected = [transformers_greedy(tiny.hf, prompt, 20, end) for prompt in PROMPTS]
    assert len(expected[0]) <= 8
    found = sample(model, params(0.0, 20, end=end), 1)
    assert [rollout.tokens.tolist() for rollout in found] == expected
    assert [rollout.finish_reason for rollout in found] == ["stop" if tokens[-1] == end else "length" for tokens in expected]


@pytest.mark.parametrize(("temperature", "banned"), [(1.0, ()), (0.7, (3, IMAGE_TOKEN, 121))])
def test_log_probs_equal_the_trainers(model: Qwen3VLModel, temperature: float, banned: tuple[int, ...]) -> None:
    """Sequences end one by one on the way, so that the batch shrinks several times."""
    free = sample(model, params(temperature, 45, banned=banned), 8)
    end = int(torch.cat([rollout.tokens for rollout in free]).mode().values)
    rollouts = sample(model, params(temperature, 45, banned=banned, end=end), 8)
    lengths = [rollout.tokens.numel() for rollout in rollouts]
    assert len(set(lengths)) > 8
    for rollout in rollouts:
        expected = trainer_log_probs(model, PROMPTS[rollout.prompt_index], rollout.tokens, temperature, banned)
        torch.testing.assert_close(rollout.log_probs, expected, atol=1e-5, rtol=0)


def test_bf16_log_probs_are_near_the_trainers() -> None:
    one_rank()
    tiny = tiny_model()
    model = Qwen3VLModel(Qwen3VLShape.from_hf(tiny.config), ParallelConfig(), Precision.bf16)
    load_hf_weights(model, tiny.directory, tiny.config)
    differences = torch.cat(
        [
            rollout.log_probs - trainer_log_probs(model, PROMPTS[rollout.prompt_index], rollout.tokens, 1.0, ())
            for rollout in sample(model, params(1.0, 20), 2)
        ]
    )
    assert differences.abs().mean() < 0.02  # bf16 keeps 8 bits: logits of size 4 are 0.016 apart
    assert differences.abs().max() < 0.2


def test_same_seed_same_tokens_whatever_the_batch(model: Qwen3VLModel) -> None:
    free = sample(model, params(1.0, 12), 3, seed=50)
    end = int(torch.cat([rollout.tokens for rollout in free]).mode().values)
    sampling = params(1.0, 12, end=end)
    together = sample(model, sampling, 3, seed=50)
    assert {rollout.finish_reason for rollout in together} == {"stop", "length"}
    assert [rollout.prompt_index for rollout in together] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    for max_batch_size in (7, 2):  # two prompts at a time; a prompt's rollouts apart
        same(sample(model, sampling, 3, seed=50, max_batch_size=max_batch_size), together)
    backwards = engine_of(model).generate(
        PROMPTS[::-1], sampling, num_rollouts_per_prompt=1, seeds=[50 + 3 * index for index in range(len(PROMPTS))][::-1]
    )
    same(backwards[::-1], together[::3])


def test_prompts_in_several_rows_and_logits_in_pieces_change_nothing(
    dense: Qwen3VLModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = sample(dense, params(1.0, 6), 3)
    monkeypatch.setattr(megatron_module, "_PROMPT_TOKENS_PER_ROW", 40)
    monkeypatch.setattr(megatron_module, "_MAX_LOGITS", 4 * 128)
    same(sample(dense, params(1.0, 6), 3), expected)


def test_a_groups_rollouts_differ_by_their_seeds_alone(dense: Qwen3VLModel) -> None:
    rollouts = engine_of(dense).generate(PROMPTS[:1], params(1.0, 10), num_rollouts_per_prompt=5, seeds=[1, 2, 3, 2, 4])
    tokens = [tuple(rollout.tokens.tolist()) for rollout in rollouts]
    assert tokens[1] == tokens[3]
    assert len(set(tokens)) == 4


def test_every_prompt_runs_once_and_finished_sequences_leave(dense: Qwen3VLModel, monkeypatch: pytest.MonkeyPatch) -> None:
    patches, rows = [], []
    hooks = [
        dense.vision_model.register_forward_pre_hook(lambda module, inputs: patches.append(len(inputs[0]))),
        dense.language_model.embedding.word_embeddings.register_forward_pre_hook(
            lambda module, inputs: rows.append(len(inputs[0]))
        ),
    ]
    free = sample(dense, params(1.0, 30), 8)
    assert patches == [sum(len(prompt.pixel_values) for prompt in PROMPTS)]
    assert rows == [sum(len(prompt) for prompt in PROMPTS)] + [8 * len(PROMPTS)] * 29
    rows.clear()
    end = int(torch.cat([rollout.tokens for rollout in free]).mode().values)
    lengths = torch.tensor([rollout.tokens.numel() for rollout in sample(dense, params(1.0, 30, end=end), 8)])
    decoded = rows[1:]
    for step, size in enumerate(decoded, start=1):
        running = int((lengths > step).sum())
        assert running <= size <= running / 0.75
    assert len(decoded) == int(lengths.max()) - 1
    for hook in hooks:
        hook.remove()


def test_banned_tokens_never_appear_even_when_hot(dense: Qwen3VLModel) -> None:
    hot = torch.cat([rollout.tokens for rollout in sample(dense, params(5.0, 30), 8)])
    banned = (IMAGE_TOKEN, 0, 127, *range(30, 60))
    assert torch.isin(hot, torch.tensor(banned)).sum() > 50
    tokens = torch.cat([rollout.tokens for rollout in sample(dense, params(5.0, 30, banned=banned), 8)])
    assert not torch.isin(tokens, torch.tensor(banned)).any()


def test_one_token_and_an_end_at_once(dense: Qwen3VLModel) -> None:
    first = sample(dense, params(0.0, 1), 1)
    assert [(rollout.tokens.numel(), rollout.finish_reason) for rollout in first] == [(1, "length")] * len(PROMPTS)
    end = int(first[2].tokens)
    ended = sample(dense, params(0.0, 9, end=end), 1)[2]
    assert (ended.tokens.tolist(), ended.finish_reason, ended.log_probs.numel()) == ([end], "stop", 1)


def test_top_k_one_is_greedy_with_certainty(dense: Qwen3VLModel) -> None:
    greedy, certain = sample(dense, params(0.0, 8), 1), sample(dense, params(1.0, 8, top_k=1), 1)
    assert [rollout.tokens.tolist() for rollout in certain] == [rollout.tokens.tolist() for rollout in greedy]
    assert all((rollout.log_probs == 0).all() for rollout in certain)


def test_weights_are_the_models_own_and_the_version_is_told(dense: Qwen3VLModel) -> None:
    engine = engine_of(dense)

    def greedy() -> Rollout:
        return engine.generate(PROMPTS[:1], params(0.0, 5), num_rollouts_per_prompt=1, seeds=[0])[0]

    before = greedy()
    weight = dense.language_model.output_weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight.copy_(kept.roll(1, dims=0))
        engine.update_weights((), version=3)
        after = greedy()
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert before.weights_version == -1
    assert after.weights_version == 3
    assert int(after.tokens[0]) == int(before.tokens[0]) + 1
    with pytest.raises(AssertionError, match="from version 3 back to 2"):
        engine.update_weights((), version=2)


def test_no_generation_while_asleep(dense: Qwen3VLModel) -> None:
    engine = engine_of(dense)
    engine.sleep()
    with pytest.raises(AssertionError, match="asleep"):
        engine.generate(PROMPTS[:1], params(0.0, 1), num_rollouts_per_prompt=1, seeds=[0])
    engine.wake_up()
    assert len(engine.generate(PROMPTS[:1], params(0.0, 1), num_rollouts_per_prompt=1, seeds=[0])) == 1


def test_nothing_to_do(dense: Qwen3VLModel) -> None:
    assert engine_of(dense).generate([], params(1.0, 4), num_rollouts_per_prompt=8, seeds=[]) == []


def test_the_modules_modes_are_restored(dense: Qwen3VLModel) -> None:
    dense.train()
    dense.vision_model.eval()
    seen: list[bool] = []
    hook = dense.language_model.decoder.register_forward_pre_hook(lambda module, inputs: seen.append(module.training))
    before = [module.training for module in dense.modules()]
    sample(dense, params(0.0, 2), 1)
    hook.remove()
    assert [module.training for module in dense.modules()] == before
    assert True in before
    assert False in before
    assert seen == [False, False]


def test_logits_that_are_not_finite_are_an_error() -> None:
    one_rank()
    model = build_model(tiny_model().directory)
    with torch.no_grad():
        model.language_model.decoder.final_layernorm.weight[3] = float("nan")
    with pytest.raises(RolloutError, match="not finite"):
        sample(model, params(1.0, 3), 2)
