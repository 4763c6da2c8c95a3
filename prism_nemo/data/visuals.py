"""What stands at a placeholder of a prompt: text with one token per merged patch, and the patches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prism_nemo.errors import ConfigError

IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
MAX_ASPECT_RATIO = 200  # the processors' own bound
_PADS = re.compile("|".join(map(re.escape, (IMAGE_PAD, VIDEO_PAD))))


@dataclass(frozen=True, eq=False)
class VisualBlock:
    """One image or one video.

    text          takes the place of the one `pad` that the chat template writes
    pixel_values  float32 [patches, patch_size]
    grid          int64 [blocks, 3]: patches in time (1), height, width of the image, or of every patch in time of the video
    """

    pad: str
    text: str
    pixel_values: Tensor
    grid: Tensor


def image_block(pixel_values: Tensor, grid: Tensor, *, merge_size: int) -> VisualBlock:
    """Of one image's patches and its grid [1, 3]."""
    return VisualBlock(IMAGE_PAD, IMAGE_PAD * (int(grid.prod()) // merge_size**2), pixel_values, grid)


def video_block(pixel_values: Tensor, grid: Sequence[int], timestamps: Sequence[float], *, merge_size: int) -> VisualBlock:
    """Of one video's patches, its grid (times, height, width), and the seconds of every patch in time."""
    times, height, width = grid
    pads = VIDEO_PAD * (height * width // merge_size**2)
    text = "".join(f"{timestamp_text(seconds)}{VISION_START}{pads}{VISION_END}" for seconds in timestamps)
    return VisualBlock(VIDEO_PAD, text, pixel_values, torch.tensor([[1, height, width]] * times, dtype=torch.int64))


def timestamp_text(seconds: float) -> str:
    """How the prompt names the time of a frame."""
    return f"<{seconds:.1f} seconds>"


def expand_pads(text: str, blocks: Sequence[VisualBlock]) -> str:
    """The chat template's text with every pad replaced by its block's text.

    The markers that the template puts around a video's pad stay around all of its frames, as in transformers' processor since
    5.10. Raises ConfigError when the template wrote other pads than the blocks need.
    """
    found, wanted = _PADS.findall(text), [block.pad for block in blocks]
    if found != wanted:
        written, needed = (f"{pads.count(IMAGE_PAD)} image and {pads.count(VIDEO_PAD)} video tokens" for pads in (found, wanted))
        raise ConfigError(
            f"the chat template wrote {written}, the prompt has {needed}",
            where="chat_template.jinja",
            remedy="use Qwen3-VL's chat template",
        )
    replacements = iter(blocks)
    return _PADS.sub(lambda _: next(replacements).text, text)
