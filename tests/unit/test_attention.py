"""Attention over rows and images against a float64 softmax under a mask that is written out token by token."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from prism_nemo.engine import attention
from prism_nemo.engine.attention import ImageAttention, RowAttention
from prism_nemo.packing.rows import GroupLayout, RowLayout

CPU = torch.device("cpu")
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
SCALE = 0.3
HAND_LAYOUTS = [
    RowLayout((GroupLayout(1, (1,)),)),
    RowLayout((GroupLayout(5, ()),), padding=3),
    RowLayout((GroupLayout(3, tuple(range(1, 17))),)),
    RowLayout((GroupLayout(4, (2, 2)), GroupLayout(9, (1, 6, 3)), GroupLayout(2, (5,)), GroupLayout(1, ())), padding=5),
]
ATTENTION = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def random_layout(seed: int) -> RowLayout:
    pick = random.Random(seed)
    groups = tuple(
        GroupLayout(pick.randint(1, 12), tuple(pick.randint(1, 9) for _ in range(pick.randint(0, 6))))
        for _ in range(pick.randint(1, 4))
    )
    return RowLayout(groups, padding=pick.choice([0, 0, 1, 7]))


LAYOUTS = [*HAND_LAYOUTS, *(random_layout(seed) for seed in range(30))]


def written_out_mask(layout: RowLayout) -> Tensor:
    """bool [length, length], from the definition: what a token may see is its group's prefix and its own segment, so far."""
    mask = torch.zeros(layout.length, layout.length, dtype=torch.bool)
    cursor = 0
    for group in layout.groups:
        prefix = range(cursor, cursor + group.prefix)
        cursor += group.prefix
        for query in prefix:
            for key in range(prefix.start, query + 1):
                mask[query, key] = True
        for length in group.segments:
            for query in range(cursor, cursor + length):
                for key in [*prefix, *range(cursor, query + 1)]:
                    mask[query, key] = True
            cursor += length
    return mask


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """The textbook's attention, [T, H, D]; zeros where a token may see nothing."""
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) * SCALE
    weights = torch.where(mask, scores, -1e30).softmax(dim=-1) * mask
    return torch.einsum("hqk,khd->qhd", weights, value)


def random_heads(length: int, dtype: torch.dtype = torch.float64, *, kv_heads: int = KV_HEADS) -> list[Tensor]:
    """Query, key and value."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(length, heads, HEAD_DIM) for heads in (HEADS, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def outputs_and_gradients(attend: ATTENTION, heads: list[Tensor], real: Tensor) -> list[Tensor]:
    """Output at real tokens, and the gradients of query, key and value for a random linear loss over it."""
    heads = [tensor.detach().clone().requires_grad_() for tensor in heads]
    out = attend(*heads, SCALE)[real]
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    (out * weight).sum().backward()
    return [out.detach(), *(tensor.grad for tensor in heads if tensor.grad is not None)]


def assert_same(attend: ATTENTION, mask: Tensor, heads: list[Tensor], real: Tensor, tolerance: float) -> None:
    found = outputs_and_gradients(attend, heads, real)
    expected = outputs_and_gradients(lambda q, k, v, scale: masked_attention(q, k, v, mask), [h.double() for h in heads], real)
    assert len(found) == len(expected) == 4
    for mine, want in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
def test_row_attention_equals_the_masked_softmax(layout: RowLayout) -> None:
    real = layout.token_group >= 0
    mask = written_out_mask(layout)
    assert_same(RowAttention(layout, CPU), mask, random_heads(layout.length), real, 1e-12)
    assert_same(RowAttention(layout, CPU), mask, random_heads(layout.length, torch.float32), real, 1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=range(len(LAYOUTS)))
def test_mask_function_of_flex_attention_is_the_same_mask(layout: RowLayout) -> None:
    """Padding is left out: it sees other padding, which no row reads, and no real token sees it."""
    index = torch.arange(layout.length)
    nothing = torch.zeros((), dtype=torch.int64)
    found = RowAttention(layout, CPU).mask_function()(nothing, nothing, index[:, None], index[None, :])
    real = layout.token_group >= 0
    assert torch.equal(found[real], written_out_mask(layout)[real])
    assert found.diagonal().all()  # a query that sees nothing would give NaN


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("layout", LAYOUTS[:8], ids=range(8))
def test_flex_attention_equals_the_masked_softmax(layout: RowLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's path with FlexAttention uncompiled, which is all that runs without a GPU, and forward only."""
    monkeypatch.setattr(attention, "_compiled_flex", flex_attention)
    heads = [tensor.detach() for tensor in random_heads(layout.length)]
    real = layout.token_group >= 0
    out = RowAttention(layout, CPU)._flex(*heads, SCALE)
    torch.testing.assert_close(out[real], masked_attention(*heads, written_out_mask(layout))[real], atol=1e-12, rtol=1e-12)


def test_padding_gets_zeros_and_no_gradient() -> None:
    layout = HAND_LAYOUTS[3]
    heads = random_heads(layout.length)
    out = RowAttention(layout, CPU)(*heads, SCALE)
    assert not out[-layout.padding :].any()
    out.sum().backward()
    assert not any(tensor.grad[-layout.padding :].any() for tensor in heads)  # type: ignore[index]


def test_row_of_padding_alone() -> None:
    out = RowAttention(RowLayout((), padding=6), CPU)(*random_heads(6), SCALE)
    assert torch.equal(out, torch.zeros(6, HEADS, HEAD_DIM, dtype=torch.float64))


@pytest.mark.parametrize("limit", [1, 100, 400])
def test_cutting_the_batch_of_segments_changes_nothing(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = RowLayout((GroupLayout(7, (3, 9, 1, 4)), GroupLayout(2, (5, 2, 8))), padding=2)
    assert _segment_batches(layout) == 1
    monkeypatch.setattr(attention, "_MAX_MASK_ELEMENTS", limit)
    assert _segment_batches(layout) == {1: 7, 100: 5, 400: 2}[limit]
    assert_same(RowAttention(layout, CPU), written_out_mask(layout), random_heads(layout.length), layout.token_group >= 0, 1e-12)


def _segment_batches(layout: RowLayout) -> int:
    batches, _ = RowAttention(layout, CPU)._plan
    masks = [batch.mask for batch in batches if batch.mask is not None]
    sizes = [mask.numel() for mask in masks]
    assert all(size <= attention._MAX_MASK_ELEMENTS or mask.shape[0] == 1 for size, mask in zip(sizes, masks, strict=True))
    return len(masks)


@pytest.mark.parametrize("lengths", [(1,), (4, 4), (6, 4, 6, 9, 4), (16,)])
def test_image_attention_equals_the_masked_softmax(lengths: tuple[int, ...]) -> None:
    image = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    mask = image[:, None] == image[None, :]
    real = torch.ones(sum(lengths), dtype=torch.bool)
    assert_same(ImageAttention(lengths, CPU), mask, random_heads(sum(lengths), kv_heads=HEADS), real, 1e-12)
