"""MRoPE positions of a prompt, against numbers worked out by hand and transformers' own `get_rope_index`."""

from __future__ import annotations

import pytest
import torch
from transformers import Qwen3VLConfig, Qwen3VLModel

from prism_nemo.errors import DataError
from prism_nemo.packing.positions import mrope_positions

IMAGE = 9
MERGE = 2


def tokens(*parts: int | tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Input ids, image mask and grids of a prompt: an int is so much text, a pair an image of rows x columns merged tokens."""
    ids, grids = [], []
    for part in parts:
        if isinstance(part, int):
            ids += [1] * part
        else:
            ids += [IMAGE] * (part[0] * part[1])
            grids.append([1, part[0] * MERGE, part[1] * MERGE])
    input_ids = torch.tensor(ids)
    return input_ids, input_ids == IMAGE, torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)


@pytest.fixture(scope="module")
def oracle() -> Qwen3VLModel:
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 8}
    vision = {
        "hidden_size": 8,
        "depth": 1,
        "num_heads": 1,
        "intermediate_size": 8,
        "out_hidden_size": 8,
        "deepstack_visual_indexes": [0],
    }
    with torch.device("meta"):
        return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))


def test_an_image_between_text_by_hand() -> None:
    positions = mrope_positions(*tokens(2, (2, 3), 2), spatial_merge_size=MERGE)
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


@pytest.mark.parametrize(
    "parts",
    [
        (7,),
        (3, (4, 4), 5),
        (3, (1, 6), 2),
        (1, (6, 1), 4),
        (4, (2, 3), 1, (5, 2), 3, (1, 1), 2),
        ((3, 2), 2),
        (2, (3, 2)),
    ],
    ids=["text", "square", "flat", "tall", "three images", "image first", "image last"],
)
def test_equal_to_transformers(oracle: Qwen3VLModel, parts: tuple[int | tuple[int, int], ...]) -> None:
    input_ids, image_mask, grids = tokens(*parts)
    expected, delta = oracle.get_rope_index(input_ids[None], image_mask[None].int(), image_grid_thw=grids if len(grids) else None)
    positions = mrope_positions(input_ids, image_mask, grids, spatial_merge_size=MERGE)
    assert positions.dtype == torch.int64
    assert torch.equal(positions, expected[:, 0])
    assert int(positions.max()) + 1 - len(input_ids) == int(delta)


@pytest.mark.parametrize(
    ("input_ids", "grids", "message"),
    [
        ([1, 9, 9, 1], [[1, 2, 6]], "its images need more"),
        ([1, 9, 9, 9, 1], [[1, 2, 4]], "its images fill 2"),
        ([1, 9, 1, 9, 1], [[1, 2, 4]], "not contiguous"),
    ],
)
def test_tokens_that_do_not_fit_the_images(input_ids: list[int], grids: list[list[int]], message: str) -> None:
    ids = torch.tensor(input_ids)
    with pytest.raises(DataError, match=message):
        mrope_positions(ids, ids == IMAGE, torch.tensor(grids), spatial_merge_size=MERGE)
