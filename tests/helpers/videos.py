"""Prompts that mix text, images and videos, and the same as transformers' models take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from helpers.tiny import IMAGE_TOKEN, MERGE, PATCH_WIDTH, VIDEO_TOKEN, VISION_END, VISION_START, random_tokens
from torch import Tensor

from prism_nemo.packing.groups import EncodedPrompt, Group, Segment
from prism_nemo.packing.positions import mrope_positions

TIMESTAMP = 5  # tokens that stand for a frame's `<0.5 seconds>`

Part = int | tuple[int, int] | tuple[int, int, int]  # text tokens; an image's rows, columns; a video's times, rows, columns


@dataclass(frozen=True, eq=False)
class MixedPrompt:
    """Our encoded prompt, and transformers' inputs of the same, apart by kind."""

    prompt: EncodedPrompt
    pixels: dict[int, Tensor]  # by token: the patches of all images, and of all videos
    grids: dict[int, Tensor]  # by token: [images, 3] and [videos, 3]

    def transformers_inputs(self, tokens: Tensor | None = None) -> dict[str, Any]:
        """Keyword arguments of the model's call, for the prompt continued by `tokens`."""
        ids = self.prompt.input_ids if tokens is None else torch.cat([self.prompt.input_ids, tokens])
        inputs: dict[str, Any] = {"input_ids": ids[None]}
        inputs["mm_token_type_ids"] = ((ids == IMAGE_TOKEN).int() + 2 * (ids == VIDEO_TOKEN).int())[None]
        for token, pixels, grid in (
            (IMAGE_TOKEN, "pixel_values", "image_grid_thw"),
            (VIDEO_TOKEN, "pixel_values_videos", "video_grid_thw"),
        ):
            if token in self.grids:
                inputs |= {pixels: self.pixels[token], grid: self.grids[token]}
        return inputs


def mixed_prompt(parts: Sequence[Part], *, seed: int) -> MixedPrompt:
    """The parts one after another; every frame of a video in markers of its own behind a timestamp, as Qwen3-VL's processor."""
    ids: list[Tensor] = []
    blocks: list[tuple[int, list[int], Tensor]] = []  # token, what transformers calls its grid, patches
    for number, part in enumerate(parts):
        if isinstance(part, int):
            ids.append(random_tokens(part, seed + 31 * number))
            continue
        token, grid = (IMAGE_TOKEN, [1, *part]) if len(part) == 2 else (VIDEO_TOKEN, list(part))
        time, rows, columns = grid
        pad = torch.full((rows * columns // MERGE**2,), token)
        ids.append(torch.tensor([VISION_START]))
        for frame in range(time):
            if token == VIDEO_TOKEN:
                ids += [random_tokens(TIMESTAMP, seed + 31 * number + 7 * frame), torch.tensor([VISION_START])]
            ids.append(pad)
            if token == VIDEO_TOKEN:
                ids.append(torch.tensor([VISION_END]))
        ids.append(torch.tensor([VISION_END]))
        generator = torch.Generator().manual_seed(seed + 31 * number)
        blocks.append((token, grid, torch.randn(time * rows * columns, PATCH_WIDTH, generator=generator)))
    input_ids = torch.cat(ids)
    mask = (input_ids == IMAGE_TOKEN) | (input_ids == VIDEO_TOKEN)
    frames = torch.tensor([[1, *grid[1:]] for _, grid, _ in blocks for _ in range(grid[0])], dtype=torch.int64).view(-1, 3)
    prompt = EncodedPrompt(
        input_ids=input_ids,
        position_ids=mrope_positions(input_ids, mask, frames, spatial_merge_size=MERGE),
        image_mask=mask,
        pixel_values=torch.cat([torch.zeros(0, PATCH_WIDTH), *(patches for _, _, patches in blocks)]),
        image_grid_thw=frames,
    )
    kinds = sorted({token for token, _, _ in blocks})
    return MixedPrompt(
        prompt,
        {kind: torch.cat([patches for token, _, patches in blocks if token == kind]) for kind in kinds},
        {kind: torch.tensor([grid for token, grid, _ in blocks if token == kind]) for kind in kinds},
    )


def mixed_group(mixed: MixedPrompt, segments: Sequence[int], *, seed: int) -> Group:
    """The prompt and segments of the given lengths."""
    return Group(
        mixed.prompt,
        tuple(Segment(random_tokens(length, seed + 77 * (index + 1)), sample=index) for index, length in enumerate(segments)),
    )
