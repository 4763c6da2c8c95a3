"""What travels between a run and its rollout servers: to the last bit, and nothing else."""

from __future__ import annotations

import random
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from helpers.tiny import PATCH_WIDTH, make_prompt
from PIL import Image

from prism_nemo.packing.groups import EncodedPrompt
from prism_nemo.rollout.answers import read_answer
from prism_nemo.rollout.base import Rollout, SamplingParams
from prism_nemo.rollout.pixels import pack_pixels, unpack_pixels
from prism_nemo.rollout.wire import GenerateRequest, WireError, decode_request, encode_answer, encode_request

SAMPLING = SamplingParams(0.7, 0.9, 50, 6, 5, (120, 121), ("</answer>", "é"), time_limit_seconds=2.5)
PROMPTS = [make_prompt([(4, 6), (2, 2)], seed=1), make_prompt([], seed=2)]
REQUEST = GenerateRequest("7.0.1", "ab12", PROMPTS, SAMPLING, 2, [0, 2**63 - 1, 2**64 - 1, 17])


def same_prompt(one: EncodedPrompt, other: EncodedPrompt) -> bool:
    pairs = [(getattr(one, field.name), getattr(other, field.name)) for field in fields(EncodedPrompt)]
    return all(left.dtype == right.dtype and left.equal(right) for left, right in pairs)


def still(values: torch.Tensor) -> torch.Tensor:
    """Patches of two equal frames from values [patches, channels, pixels]."""
    return values.unsqueeze(2).expand(-1, -1, 2, -1).flatten(1).contiguous()


def processed(mean: float, std: float, seed: int = 0) -> torch.Tensor:
    """8-bit pixels as the model's processor makes them."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(
        patch_size=16, merge_size=2, temporal_patch_size=2, image_mean=[mean] * 3, image_std=[std] * 3
    )
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (96, 160, 3), dtype=np.uint8))
    return processor(images=[image], return_tensors="pt")["pixel_values"].float()


def rollouts() -> list[Rollout]:
    made = []
    for number, (length, reason) in enumerate([(3, "stop"), (6, "length"), (2, "timeout"), (6, "stop")]):
        tokens = torch.arange(10, 10 + length)
        if reason == "stop":
            tokens[-1] = 5
        made.append(Rollout(number // 2, tokens, -torch.rand(length), reason, 4))  # type: ignore[arg-type]
    return made


def test_a_request_comes_back_whole() -> None:
    found = decode_request(encode_request(REQUEST))
    assert all(map(same_prompt, found.prompts, PROMPTS))
    assert replace(found, prompts=()).__dict__ == {**REQUEST.__dict__, "prompts": ()}


def test_an_answer_comes_back_whole() -> None:
    made = rollouts()
    for one, other in zip(read_answer(REQUEST, encode_answer(REQUEST, made), version=4, vocab_size=128), made, strict=True):
        assert one.tokens.equal(other.tokens) and one.tokens.dtype == torch.int64
        assert one.log_probs.equal(other.log_probs)
        assert (one.prompt_index, one.finish_reason, one.weights_version) == (other.prompt_index, other.finish_reason, 4)


@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.5)])
def test_the_pixels_of_an_image_take_an_eighth(mean: float, std: float) -> None:
    patches = processed(mean, std)
    packed = pack_pixels(patches)
    assert unpack_pixels(packed).view(torch.int32).equal(patches.view(torch.int32))
    assert sum(tensor.nbytes for tensor in packed.values()) == patches.nbytes // 8 + 4 * 256


def test_the_pixels_of_a_video_take_a_quarter() -> None:
    frames = processed(0.5, 0.5).view(-1, 3, 2, 256).clone()
    frames[:, :, 1] = processed(0.5, 0.5, seed=1).view(-1, 3, 2, 256)[:, :, 0]
    packed = pack_pixels(frames.flatten(1))
    assert unpack_pixels(packed).view(torch.int32).equal(frames.flatten(1).view(torch.int32))
    assert sum(tensor.nbytes for tensor in packed.values()) == frames.nbytes // 4 + 4 * 256


@pytest.mark.parametrize(
    "patches",
    [
        torch.randn(5, PATCH_WIDTH),
        processed(0.48, 0.27),  # another processor's
        torch.full((2, PATCH_WIDTH), float("nan")),
        torch.tensor([[0.0, -0.0] * (PATCH_WIDTH // 2)]),
        torch.full((2, PATCH_WIDTH), 1e30),
        torch.zeros(0, PATCH_WIDTH),
        torch.randint(0, 256, (3, 7)) / 127.5 - 1,  # no patches of this model
        still(torch.randint(0, 256, (4, 3, 16)) / 255 * 2 - 1),
    ],
    ids=["noise", "other", "nan", "zeros", "large", "none", "width", "still"],
)
def test_any_pixels_come_back_to_the_last_bit(patches: torch.Tensor) -> None:
    assert unpack_pixels(pack_pixels(patches)).view(torch.int32).equal(patches.view(torch.int32))


@pytest.mark.parametrize("kind", ["request", "answer"])
def test_damaged_bodies_are_refused_and_never_crash(kind: str) -> None:
    """Cut, and with bytes changed. What happens to be readable is checked on."""
    body = encode_request(REQUEST) if kind == "request" else encode_answer(REQUEST, rollouts())
    draw = random.Random(0)

    def read(damaged: bytes) -> bool:
        try:
            if kind == "request":
                decode_request(damaged)
            else:
                read_answer(REQUEST, damaged, version=4, vocab_size=128)
        except WireError:
            return False
        return True

    assert read(body)
    assert not any(read(body[:length]) for length in [*range(200), *range(200, len(body), 97)])
    refused = 0
    for _ in range(3000):
        damaged = bytearray(body)
        for _ in range(draw.randint(1, 4)):
            limit = len(body) if draw.random() < 0.5 else min(len(body), 1500)  # headers are short
            damaged[draw.randrange(limit)] = draw.randrange(256)
        refused += not read(bytes(damaged))
    assert refused > 300


@pytest.mark.parametrize(
    "seeds",
    [[1, 2, 3], [1, 2, 3, -1], [1, 2, 3, 2**64], [1, 2, 3, "x"]],
    ids=["few", "negative", "large", "text"],
)
def test_seeds_that_cannot_be(seeds: list[int]) -> None:
    with pytest.raises(WireError):
        decode_request(encode_request(replace(REQUEST, seeds=seeds)))


def test_a_seed_that_is_infinite() -> None:
    body = encode_request(replace(REQUEST, seeds=[1, 2, 3, 77777]))
    with pytest.raises(WireError):
        decode_request(body.replace(b"77777", b"1e999"))
