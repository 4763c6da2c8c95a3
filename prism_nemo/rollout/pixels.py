"""Pixels on their way to a rollout server: one byte each where that loses nothing, and a still frame once.

Qwen3-VL's processor turns 8-bit pixels into float32 by one increasing function, so that an image has at most 256 different
values, and shows it as two equal frames: 8 times fewer bytes. Which value each byte stands for travels along, read off the very
patches that are packed; what does not come back to the last bit goes as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

_CHANNELS, _FRAMES = 3, 2  # a patch vector is [channels, frames, height, width]
_VALUES = 256


def pack_pixels(patches: Tensor) -> dict[str, Tensor]:
    """Tensors from which `unpack_pixels` makes the same float32 [patches, patch_size] again, bit for bit."""
    count, width = patches.shape
    if patches.numel() == 0 or width % (_CHANNELS * _FRAMES):
        return {"pixel_values": patches}
    # -1 to 1 becomes 0 to 255. Any function would do that gives different values different bytes: what it does is checked.
    codes = ((patches + 1) * ((_VALUES - 1) / 2)).round_().clamp_(0, _VALUES - 1).to(torch.uint8)
    table = torch.zeros(_VALUES, dtype=torch.float32)
    table[codes.flatten().long()] = patches.flatten()
    if not torch.equal(table[codes.long()].view(torch.int32), patches.contiguous().view(torch.int32)):
        return {"pixel_values": patches}
    frames = codes.view(count, _CHANNELS, _FRAMES, -1)
    still = torch.equal(frames[:, :, 0], frames[:, :, 1])
    return {"pixel_codes": frames[:, :, :1].contiguous() if still else frames, "pixel_table": table}


def unpack_pixels(tensors: Mapping[str, Tensor]) -> Tensor:
    """float32 [patches, patch_size]. Raises KeyError or ValueError for what `pack_pixels` did not make."""
    if "pixel_codes" not in tensors:
        patches = tensors["pixel_values"]
        if patches.dtype != torch.float32 or patches.dim() != 2:
            raise ValueError("pixels of a wrong type")
        return patches
    codes, table = tensors["pixel_codes"], tensors["pixel_table"]
    fits = codes.dtype == torch.uint8 and codes.dim() == 4 and codes.shape[1] == _CHANNELS and codes.shape[2] in (1, _FRAMES)
    if not fits or table.dtype != torch.float32 or tuple(table.shape) != (_VALUES,):
        raise ValueError("packed pixels of a wrong type")
    return table[codes.expand(-1, -1, _FRAMES, -1).flatten(1).long()]
