"""Tiny random Qwen3-VL models from transformers, and prompts for them: what the tests hold our models to."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism_nemo.convert.hf import load_model_config
from prism_nemo.packing.groups import EncodedPrompt, Group, Segment, SegmentKind, text_prompt
from prism_nemo.packing.positions import mrope_positions

PATCH_SIZE = 4
PATCH_WIDTH = 3 * 2 * PATCH_SIZE**2  # channels, frames of a patch, pixels
MERGE = 2
NUM_EXPERTS, TOPK = 4, 2
NUM_TEXT_TOKENS = 100  # ordinary tokens are below
IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END = 120, 121, 122, 123

_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
}
_EXPERTS = {"num_experts": NUM_EXPERTS, "num_experts_per_tok": TOPK, "moe_intermediate_size": 40}
_VISION = {
    "hidden_size": 32,
    "depth": 4,
    "num_heads": 4,
    "intermediate_size": 48,
    "out_hidden_size": 64,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 2],
    "patch_size": PATCH_SIZE,
}
_TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VIDEO_TOKEN,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}


@dataclass(frozen=True, eq=False)
class TinyModel:
    """One random model: transformers' own (fp32, eval), where it is saved, and its config.json in the Hub's form."""

    hf: Any
    directory: Path
    config: dict[str, Any]
    keep: tempfile.TemporaryDirectory[str]  # the directory lives as long as this


@cache
def tiny_model(*, experts: bool = False, tied: bool = False, deepstack: tuple[int, ...] = (0, 2)) -> TinyModel:
    """The same weights in every process. All parameters are random, norms and biases too: none may be left out unseen."""
    import transformers  # seconds, which ranks that only make prompts spare themselves

    vision = {**_VISION, "deepstack_visual_indexes": list(deepstack)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if experts:
            text = {**_TEXT, **_EXPERTS}
            moe_config = transformers.Qwen3VLMoeConfig(
                text_config=text, vision_config=vision, tie_word_embeddings=tied, **_TOKENS
            )
            hf = transformers.Qwen3VLMoeForConditionalGeneration(moe_config)
        else:
            config = transformers.Qwen3VLConfig(text_config=_TEXT, vision_config=vision, tie_word_embeddings=tied, **_TOKENS)
            hf = transformers.Qwen3VLForConditionalGeneration(config)
        with torch.no_grad():
            for parameter in hf.parameters():
                parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 1 else 0.05))
    hf = hf.float().eval()
    keep = tempfile.TemporaryDirectory(prefix="tiny-qwen3vl-")
    directory = Path(keep.name) / "model"
    hf.save_pretrained(directory)
    return TinyModel(hf, directory, load_model_config(directory), keep)


def random_tokens(length: int, seed: int) -> Tensor:
    """int64 [length] of ordinary text tokens."""
    return torch.randint(0, NUM_TEXT_TOKENS, (length,), generator=torch.Generator().manual_seed(seed))


def make_prompt(images: Sequence[tuple[int, int]], *, seed: int, text_length: int = 4) -> EncodedPrompt:
    """Text, image, text, image, ..., text with random pixels; `images` are (rows, columns) of patches, () for text alone."""
    if not images:
        return text_prompt(random_tokens(text_length, seed), PATCH_WIDTH)
    parts = [random_tokens(text_length, seed)]
    for number, (rows, columns) in enumerate(images, start=1):
        visual = torch.full((rows * columns // MERGE**2,), IMAGE_TOKEN)
        after = random_tokens(text_length + number, seed + 1000 * number)
        parts += [torch.tensor([VISION_START]), visual, torch.tensor([VISION_END]), after]
    input_ids = torch.cat(parts)
    mask = input_ids == IMAGE_TOKEN
    grid = torch.tensor([[1, rows, columns] for rows, columns in images])
    patches = int(grid.prod(dim=1).sum())
    return EncodedPrompt(
        input_ids=input_ids,
        position_ids=mrope_positions(input_ids, mask, grid, spatial_merge_size=MERGE),
        image_mask=mask,
        pixel_values=torch.randn(patches, PATCH_WIDTH, generator=torch.Generator().manual_seed(seed)),
        image_grid_thw=grid,
    )


def make_group(
    images: Sequence[tuple[int, int]],
    segments: Sequence[int],
    *,
    seed: int,
    kinds: Sequence[SegmentKind] = (SegmentKind.RESPONSE,),
    text_length: int = 4,
) -> Group:
    """A prompt (see `make_prompt`) and segments of the given lengths, whose kinds repeat."""
    made = tuple(
        Segment(random_tokens(length, seed + 77 * (index + 1)), sample=index, kind=kinds[index % len(kinds)])
        for index, length in enumerate(segments)
    )
    return Group(make_prompt(images, seed=seed, text_length=text_length), made)


def transformers_logits(hf: Any, prompt: EncodedPrompt, tokens: Tensor) -> Tensor:
    """Logits [prompt + tokens, vocabulary] that transformers computes for one sequence, positions included."""
    input_ids = torch.cat([prompt.input_ids, tokens])[None]
    if not prompt.image_grid_thw.numel():
        return hf(input_ids=input_ids).logits[0]
    return hf(
        input_ids=input_ids,
        pixel_values=prompt.pixel_values,
        image_grid_thw=prompt.image_grid_thw,
        mm_token_type_ids=(input_ids == IMAGE_TOKEN).int(),
    ).logits[0]
