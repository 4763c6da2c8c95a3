"""A video -> chosen frames -> patches, grid and timestamps: Qwen3-VL's way, as in transformers' video processor.

Frames are chosen evenly so that the model sees `data.video_fps` a second, within the least and the most frames. Two frames make
one patch in time, whose timestamp is the mean of theirs; an odd last frame counts twice. All frames get one size, such that
together they have no more pixels than the processor allows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from prism_nemo.config.schema import DataConfig
from prism_nemo.data.video_frames import FrameReader
from prism_nemo.data.visuals import MAX_ASPECT_RATIO, VisualBlock, video_block
from prism_nemo.errors import ConfigError, DataError

CONFIG_FILE = "video_preprocessor_config.json"
MAX_VIDEO_PIXELS = 2**32  # of all chosen frames as they come, before they are scaled: 768 frames of 2000 x 2000 are fewer
_BICUBIC = 3  # Pillow's number
_ALWAYS = ("do_resize", "do_rescale", "do_normalize")


@dataclass(frozen=True)
class VideoProcessor:
    """How videos become patches: sizes and colours from the model's own file, choice of frames from the configuration."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int  # of all frames together
    max_pixels: int
    mean: tuple[float, ...]  # of pixels in [0, 1], by channel
    std: tuple[float, ...]
    fps: float
    min_frames: int
    max_frames: int
    max_tokens: int  # visual tokens of one video

    @classmethod
    def from_config(cls, config: Mapping[str, Any], vision: Mapping[str, int], data: DataConfig) -> VideoProcessor:
        """From the parsed `video_preprocessor_config.json` and the model's `vision_config`.

        Raises ConfigError where they do not fit together, where the file asks for what this class does not do, and for bounds
        on the pixels that leave no room.
        """
        for name, models in (
            ("patch_size", vision["patch_size"]),
            ("merge_size", vision["spatial_merge_size"]),
            ("temporal_patch_size", vision["temporal_patch_size"]),
        ):
            if config.get(name) != models:
                raise _unusable(f"the video processor's {name} is {config.get(name)}, the model's is {models}")
        for name, needed in [(name, True) for name in _ALWAYS] + [("resample", _BICUBIC), ("rescale_factor", 1 / 255)]:
            if config.get(name, needed) != needed:
                raise _unusable(f"the video processor's {name} is {config[name]}, only {needed} is supported")
        if config.get("cap_pixels_per_frame"):
            raise _unusable("the video processor caps the pixels of single frames, which is not supported")
        size = config.get("size") or {}
        least = size.get("shortest_edge") if data.video_min_pixels is None else data.video_min_pixels
        most = size.get("longest_edge") if data.video_max_pixels is None else data.video_max_pixels
        token = (vision["patch_size"] * vision["spatial_merge_size"]) ** 2
        if least is None or most is None or not 0 < least <= most or most < vision["temporal_patch_size"] * token:
            raise ConfigError(
                f"a video cannot have between {least} and {most} pixels",
                where=f"data.video_min_pixels, data.video_max_pixels, {CONFIG_FILE}",
                remedy=f"the least at most the most, and room for one visual token of {vision['temporal_patch_size']} frames",
            )
        return cls(
            patch_size=vision["patch_size"],
            merge_size=vision["spatial_merge_size"],
            temporal_patch_size=vision["temporal_patch_size"],
            min_pixels=least,
            max_pixels=most,
            mean=tuple(config.get("image_mean", (0.5, 0.5, 0.5))),
            std=tuple(config.get("image_std", (0.5, 0.5, 0.5))),
            fps=data.video_fps,
            min_frames=data.video_min_frames,
            max_frames=data.video_max_frames,
            max_tokens=data.max_prompt_length,
        )

    def __call__(self, reader: FrameReader) -> VisualBlock:
        """The video's patches and what stands for them in the prompt.

        Raises DataError for a video of a single frame or of too many, of frames of several sizes or of a shape that is not a
        picture's, and for one that alone exceeds the prompt's length: before its frames are decoded, but for the first.
        """
        chosen = self.choose_frames(reader)
        images = reader.read(chosen)
        first = next(images)
        height, width = self.frame_size(len(chosen), first.height, first.width, where=reader.where)
        rows, columns = height // self.patch_size, width // self.patch_size
        times = -(-len(chosen) // self.temporal_patch_size)
        self._check_amount(len(chosen), first, times * rows * columns // self.merge_size**2, reader.where)
        frames = torch.empty(len(chosen), 3, height, width, dtype=torch.uint8)
        frames[0] = _scaled(first, height, width)
        for number, image in enumerate(images, start=1):
            if image.size != first.size:
                raise DataError(
                    f"the video's frames have {first.width} x {first.height} and {image.width} x {image.height} pixels",
                    where=reader.where,
                    remedy="give all frames of a video the same size",
                )
            frames[number] = _scaled(image, height, width)
        seconds = self.timestamps([reader.seconds(index) for index in chosen])
        return video_block(self._patches(frames), (times, rows, columns), seconds, merge_size=self.merge_size)

    def choose_frames(self, reader: FrameReader) -> list[int]:
        """Indices of the frames that the model sees, ascending."""
        bounds = self.min_frames, self.max_frames
        return choose_frames(reader, fps=self.fps, bounds=bounds, least=self.temporal_patch_size)

    def frame_size(self, frames: int, height: int, width: int, *, where: str = "") -> tuple[int, int]:
        """Height and width in pixels that every one of so many frames is scaled to: whole merged patches."""
        unit = self.patch_size * self.merge_size
        if min(height, width) < unit:
            scale = max(unit / height, unit / width)
            height, width = int(height * scale), int(width * scale)
        if max(height, width) > MAX_ASPECT_RATIO * min(height, width):
            raise DataError(
                f"the video is {width} x {height} pixels, more than {MAX_ASPECT_RATIO} times as long as wide", where=where
            )
        rows, columns = round(height / unit), round(width / unit)
        pixels = round(frames / self.temporal_patch_size) * self.temporal_patch_size * rows * columns * unit**2
        if pixels > self.max_pixels:
            shrink = math.sqrt(frames * height * width / self.max_pixels)
            rows, columns = (max(1, math.floor(side / shrink / unit)) for side in (height, width))
        elif pixels < self.min_pixels:
            grow = math.sqrt(self.min_pixels / (frames * height * width))
            rows, columns = (math.ceil(side * grow / unit) for side in (height, width))
        return rows * unit, columns * unit

    def timestamps(self, seconds: Sequence[float]) -> list[float]:
        """Of every patch in time: the mean of its first and last frame's; the last frame fills it up."""
        size = self.temporal_patch_size
        filled = [*seconds, *[seconds[-1]] * (-len(seconds) % size)]
        return [(filled[start] + filled[start + size - 1]) / 2 for start in range(0, len(filled), size)]

    def _check_amount(self, frames: int, first: Image, tokens: int, where: str) -> None:
        pixels = frames * first.width * first.height
        if pixels > MAX_VIDEO_PIXELS:
            raise DataError(
                f"the video's {frames} frames have {pixels} pixels, the limit is {MAX_VIDEO_PIXELS}",
                where=where,
                remedy="scale them down, or lower data.video_max_frames",
            )
        if tokens > self.max_tokens:
            raise DataError(
                f"the video alone has {tokens} visual tokens, the limit of a prompt is {self.max_tokens}",
                where=where,
                remedy="raise data.max_prompt_length, or lower data.video_max_pixels, data.video_fps or data.video_max_frames",
            )

    def _patches(self, frames: Tensor) -> Tensor:
        """uint8 [frames, 3, height, width] -> float32 [patches, patch_size], in merge-block order."""
        values = frames.float()
        mean, std = (torch.tensor(numbers).view(3, 1, 1) * 255.0 for numbers in (self.mean, self.std))
        values.sub_(mean).div_(std)
        missing = -len(values) % self.temporal_patch_size
        if missing:
            values = torch.cat([values, values[-1:].expand(missing, -1, -1, -1)])
        times, merge, patch = self.temporal_patch_size, self.merge_size, self.patch_size
        rows, columns = (side // (patch * merge) for side in values.shape[2:])
        cut = values.view(-1, times, 3, rows, merge, patch, columns, merge, patch)
        return cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, 3 * times * patch**2)


def choose_frames(reader: FrameReader, *, fps: float, bounds: tuple[int, int], least: int = 2) -> list[int]:
    """Indices of frames, evenly `fps` a second within the fewest and most of `bounds`, ascending; all that have timestamps.

    Raises DataError for fewer than `least`, and for more timestamps than frames may be.
    """
    fewest, most = bounds
    if reader.timestamps is not None:
        if reader.count > most:
            raise DataError(
                f"the video has {reader.count} frames with timestamps, the limit is {most}",
                where=reader.where,
                remedy="raise data.video_max_frames, leave frames out, or give `fps` so that they are chosen evenly",
            )
        number = reader.count
    else:
        assert reader.fps is not None
        number = int(min(reader.count / reader.fps * fps, most))
        number = min(max(number, fewest), reader.count)
    if number < least:
        raise DataError(f"the video has {reader.count} frame", where=reader.where, remedy="give it as an image")
    return [int(index) for index in np.linspace(0, reader.count - 1, number).round()]


def _scaled(image: Image, height: int, width: int) -> Tensor:
    """uint8 [3, height, width], bicubic with antialiasing: torchvision's arithmetic, which is torch's."""
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    if pixels.shape[1:] == (height, width):
        return pixels
    size = (height, width)
    return torch.nn.functional.interpolate(pixels[None], size, mode="bicubic", antialias=True, align_corners=False)[0]


def _unusable(what: str) -> ConfigError:
    return ConfigError(what, where=CONFIG_FILE, remedy="use the video processor that comes with the Qwen3-VL model")
