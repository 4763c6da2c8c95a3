"""What goes into a packed row: one prompt, run through the network once, and the segments that share it."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor


class SegmentKind(IntEnum):
    """What a segment is. Discriminator segments are told apart; a policy's segment is a whole response."""

    RESPONSE = 0
    PERCEPTION = 1
    REASONING = 2


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """A prompt as the network sees it, image tokens already expanded.

    input_ids       int64   [length]
    position_ids    int64   [3, length]              temporal, height, width (see `packing.positions`)
    image_mask      bool    [length]                 True at image and video tokens
    pixel_values    float32 [patches, patch_size]    patches in 2x2 merge-block order; [0, patch_size] without an image
    image_grid_thw  int64   [images, 3]              patches in time, height, width of every image

    Images and the frames of videos stand in the order of the prompt. What makes one patch in time (two frames of a video) is
    one image here: [1, height, width].
    """

    input_ids: Tensor
    position_ids: Tensor
    image_mask: Tensor
    pixel_values: Tensor
    image_grid_thw: Tensor

    def __len__(self) -> int:
        return self.input_ids.numel()

    @property
    def next_position(self) -> int:
        """The position of the first token after the prompt, the same on all three axes."""
        return int(self.position_ids.max()) + 1


@dataclass(frozen=True, eq=False)
class Segment:
    """Tokens that continue a prompt, seeing it and themselves alone.

    `sample` is the index by which the caller finds what belongs to the segment (advantage, old log-probabilities, …).
    """

    tokens: Tensor  # int64 [length]
    sample: int
    kind: SegmentKind = SegmentKind.RESPONSE

    def __len__(self) -> int:
        return self.tokens.numel()


@dataclass(frozen=True, eq=False)
class Group:
    """One prompt and all segments that continue it."""

    prompt: EncodedPrompt
    segments: tuple[Segment, ...] = field(default_factory=tuple)

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + sum(len(segment) for segment in self.segments)


def without_images(prompt: EncodedPrompt) -> EncodedPrompt:
    """The prompt with its image and video tokens taken out and text positions throughout; the times of frames stay."""
    return text_prompt(prompt.input_ids[~prompt.image_mask], prompt.pixel_values.shape[1])


def text_prompt(input_ids: Tensor, patch_size: int) -> EncodedPrompt:
    """An `EncodedPrompt` without images. `patch_size` is the width of one (absent) patch vector."""
    length = input_ids.numel()
    return EncodedPrompt(
        input_ids=input_ids,
        position_ids=torch.arange(length).expand(3, -1).clone(),
        image_mask=torch.zeros(length, dtype=torch.bool),
        pixel_values=torch.zeros(0, patch_size),
        image_grid_thw=torch.zeros(0, 3, dtype=torch.int64),
    )
