"""Multimodal rotary positions (MRoPE): the one builder that every stage and the rollout engines use."""

from __future__ import annotations

import torch
from torch import Tensor

from prism_nemo.errors import DataError


def mrope_positions(input_ids: Tensor, image_mask: Tensor, image_grid_thw: Tensor, *, spatial_merge_size: int) -> Tensor:
    """Temporal, height and width positions of one prompt, int64 [3, length].

    Text advances all three by 1. An image that starts at position p occupies (p, p + row, p + column) on its merged grid,
    and the text behind it goes on at p + max(rows, columns). As in the model's `get_rope_index`. A video's frames, each in
    markers of its own behind its timestamp, are images to it.

    input_ids int64 [length], image_mask bool [length], image_grid_thw int64 [images, 3] in patches before merging.
    Raises DataError when the image tokens and the grids do not match.
    """
    length = input_ids.numel()
    positions = torch.empty(3, length, dtype=torch.int64)
    cursor = 0  # index into the tokens
    start = 0  # next text position
    image_starts = image_mask.nonzero().flatten().tolist()
    consumed = 0
    for time, height, width in image_grid_thw.tolist():
        rows, columns = height // spatial_merge_size, width // spatial_merge_size
        count = time * rows * columns
        if consumed + count > len(image_starts):
            raise DataError(
                f"the prompt has {len(image_starts)} image tokens, its images need more",
                remedy="one placeholder per image, expanded once",
            )
        first = image_starts[consumed]
        if image_starts[consumed + count - 1] != first + count - 1:
            raise DataError("the tokens of one image are not contiguous", where=f"token {first}")
        text = first - cursor
        positions[:, cursor:first] = torch.arange(start, start + text)
        start += text
        grid = torch.stack(torch.meshgrid(torch.arange(time), torch.arange(rows), torch.arange(columns), indexing="ij")).flatten(
            1
        )
        positions[:, first : first + count] = grid + start
        start += max(rows, columns)
        cursor = first + count
        consumed += count
    if consumed != len(image_starts):
        raise DataError(
            f"the prompt has {len(image_starts)} image tokens, its images fill {consumed}",
            remedy="one placeholder per image, expanded once",
        )
    positions[:, cursor:] = torch.arange(start, start + length - cursor)
    return positions
