"""Videos through the model against transformers in fp32: positions, logits, gradients of every parameter, greedy rollouts."""

from __future__ import annotations

import pytest
import torch
from helpers.rows import (
    CPU,
    assert_gradients_close,
    build_model,
    gradients,
    one_rank,
    run_row,
    sequences,
    transformers_gradients,
)
from helpers.tiny import IMAGE_TOKEN, VIDEO_TOKEN, TinyModel, tiny_model
from helpers.videos import MixedPrompt, Part, mixed_group, mixed_prompt

from prism_nemo.models.qwen3_vl.model import Qwen3VLModel
from prism_nemo.packing.rows import make_row
from prism_nemo.rollout.base import SamplingParams
from prism_nemo.rollout.megatron import MegatronEngine

PROMPTS: dict[str, list[Part]] = {
    "a video": [4, (3, 4, 6), 5],
    "one pair of frames": [2, (1, 4, 4), 3],
    "video, image, video": [3, (2, 4, 8), 2, (6, 4), 1, (4, 2, 2), 6],
    "images around a video": [(4, 4), (2, 4, 4), (4, 4), 3],  # frames and images of one size
    "text": [9],
}


@pytest.fixture(scope="module", params=["dense", "moe"])
def tiny(request: pytest.FixtureRequest) -> TinyModel:
    one_rank()
    return tiny_model(experts=request.param == "moe")


@pytest.fixture
def model(tiny: TinyModel) -> Qwen3VLModel:
    return build_model(tiny.directory)


def prompts() -> list[MixedPrompt]:
    return [mixed_prompt(parts, seed=10 * number) for number, parts in enumerate(PROMPTS.values(), start=1)]


@pytest.mark.parametrize("name", PROMPTS)
def test_positions_equal_transformers(tiny: TinyModel, name: str) -> None:
    mixed = mixed_prompt(PROMPTS[name], seed=1)
    inputs = {key: value for key, value in mixed.transformers_inputs().items() if not key.startswith("pixel")}
    expected, delta = tiny.hf.model.get_rope_index(**inputs)
    assert torch.equal(mixed.prompt.position_ids, expected[:, 0])
    assert mixed.prompt.next_position == len(mixed.prompt) + int(delta)


def test_logits_and_gradients_equal_transformers(tiny: TinyModel, model: Qwen3VLModel) -> None:
    """One row with every prompt; those with videos and images alike, and text alone."""
    cases = prompts()
    groups = [mixed_group(mixed, (5, 3), seed=number) for number, mixed in enumerate(cases)]
    row = make_row(groups, pad_multiple=8)
    weight = torch.randn(row.num_labels, generator=torch.Generator().manual_seed(0))

    output = run_row(model, row)
    logits = output.hidden @ model.language_model.output_weight.t()
    (output.log_probs * weight).sum().backward()

    segments = [(mixed, segment.tokens) for mixed, group in zip(cases, groups, strict=True) for segment in group.segments]
    expected = [tiny.hf(**mixed.transformers_inputs(tokens)).logits[0] for mixed, tokens in segments]
    for index, want in zip(sequences(row.layout), expected, strict=True):
        torch.testing.assert_close(logits[index], want, atol=1e-4, rtol=0)
    log_probs = torch.cat(
        [
            want[-len(tokens) - 1 : -1].log_softmax(dim=-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
            for want, (_, tokens) in zip(expected, segments, strict=True)
        ]
    )
    torch.testing.assert_close(output.log_probs, log_probs, atol=1e-4, rtol=0)
    (log_probs * weight).sum().backward()
    found = gradients(model, tiny.config)
    assert_gradients_close(found, transformers_gradients(tiny.hf), 1e-4)
    assert all(grad.any() for grad in found.values())


def test_a_frame_is_seen_apart_from_the_others(model: Qwen3VLModel) -> None:
    """Only the pair of frames that changes has other visual tokens."""
    prompt = mixed_prompt([(3, 4, 6)], seed=3).prompt
    before, _ = model.vision_model(prompt.pixel_values, prompt.image_grid_thw)
    changed = prompt.pixel_values.clone()
    changed[24:48] += 1.0
    after, _ = model.vision_model(changed, prompt.image_grid_thw)
    difference = (after - before).abs().amax(dim=1)
    assert (difference[6:12] > 1e-3).all()
    assert difference[:6].max() < 1e-5 and difference[12:].max() < 1e-5


def test_greedy_tokens_equal_transformers(tiny: TinyModel, model: Qwen3VLModel) -> None:
    """All prompts in one batch. Visual tokens are banned, as the chat encoder has it."""
    banned = (IMAGE_TOKEN, VIDEO_TOKEN)
    cases = prompts()
    sampling = SamplingParams(0.0, 1.0, 0, 30, end_token_id=-1, banned_token_ids=banned)
    engine = MegatronEngine(model, device=CPU, max_batch_size=256)
    found = engine.generate([mixed.prompt for mixed in cases], sampling, num_rollouts_per_prompt=1, seeds=range(len(cases)))
    options = {"do_sample": False, "max_new_tokens": 30, "eos_token_id": None, "pad_token_id": 0, "suppress_tokens": list(banned)}
    for mixed, rollout in zip(cases, found, strict=True):
        everything = torch.ones(1, len(mixed.prompt), dtype=torch.int64)  # transformers would take token 0 for padding
        generated = tiny.hf.generate(**mixed.transformers_inputs(), attention_mask=everything, **options)
        expected = generated[0, len(mixed.prompt) :]
        assert rollout.tokens.tolist() == expected.tolist()
