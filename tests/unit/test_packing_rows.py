"""PackedRow: its fields by hand, packing to a budget, and its promise: a `prefix + segment` gets what it gets when alone."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from helpers.rows import assert_gradients_close, build_model, gradients, one_rank, routing_of, run_row, sequences
from helpers.tiny import MERGE, PATCH_WIDTH, TinyModel, make_group, tiny_model
from torch import Tensor

from prism_nemo.errors import ConfigError, DataError
from prism_nemo.models.context import PADDING, PROMPT, token_kinds
from prism_nemo.models.qwen3_vl.model import Qwen3VLModel
from prism_nemo.packing.groups import Group, Segment, SegmentKind, text_prompt
from prism_nemo.packing.positions import mrope_positions
from prism_nemo.packing.rows import GroupLayout, PackedRow, make_row, pack_rows, split_to_budget

UNEVEN = [3, 11, 1, 6, 2, 9, 4, 4, 17, 1, 5, 8, 2, 12, 7, 3]
ROWS = {
    "one_segment": [make_group([(4, 6), (2, 4)], (7,), seed=10)],
    "two_segments": [make_group([(4, 6), (2, 4)], (9, 2), seed=11)],
    "sixteen_segments": [make_group([(4, 6)], UNEVEN, seed=12)],
    "one_token_prompt": [make_group((), (3, 5), seed=13, text_length=1)],
    "several_groups": [
        make_group([(4, 4)], (5, 1, 8), seed=14),
        make_group((), (), seed=15),  # a prompt that nobody answered
        make_group((), (6,), seed=16, text_length=9),
        make_group([(2, 6), (6, 2)], (), seed=17),
        make_group([(8, 4), (4, 4)], (2, 10), seed=18),
    ],
}


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> None:
    one_rank()


@pytest.fixture(scope="module", params=["dense", "moe"])
def tiny(request: pytest.FixtureRequest) -> TinyModel:
    return tiny_model(experts=request.param == "moe")


@pytest.fixture
def model(tiny: TinyModel) -> Qwen3VLModel:
    return build_model(tiny.directory)


def loss_of(hidden: Tensor, log_probs: Tensor, number: int) -> Tensor:
    """Reaches every value of a segment's hidden states and log-probabilities with a weight of its own."""
    generator = torch.Generator().manual_seed(number)
    return (hidden * torch.randn(hidden.shape, generator=generator)).sum() + (
        log_probs * torch.randn(log_probs.shape, generator=generator)
    ).sum()


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("pad_multiple", [1, 32])
def test_row_equals_each_sequence_alone(tiny: TinyModel, model: Qwen3VLModel, name: str, pad_multiple: int) -> None:
    groups = ROWS[name]
    row = make_row(groups, pad_multiple=pad_multiple)
    assert row.layout.length % pad_multiple == 0
    packed = run_row(model, row)
    segments = [(group, segment) for group in groups for segment in group.segments]
    loss = torch.zeros(())
    for number, ((group, segment), index) in enumerate(zip(segments, sequences(row.layout), strict=True)):
        alone = run_row(model, make_row([Group(group.prompt, (segment,))]))
        mine = row.label_segment == number
        torch.testing.assert_close(packed.hidden[index], alone.hidden, atol=1e-5, rtol=0)
        torch.testing.assert_close(packed.log_probs[mine], alone.log_probs, atol=1e-5, rtol=0)
        torch.testing.assert_close(packed.entropy[mine], alone.entropy, atol=1e-5, rtol=0)
        loss_of(alone.hidden[-len(segment) :], alone.log_probs, number).backward()
        own = index[-len(segment) :]
        loss = loss + loss_of(packed.hidden[own], packed.log_probs[mine], number)
    expected = gradients(model, tiny.config)
    model.zero_grad(set_to_none=True)
    loss.backward()
    assert_gradients_close(gradients(model, tiny.config), expected, 1e-5)


def test_a_segment_sees_nothing_of_the_others(model: Qwen3VLModel) -> None:
    """Other tokens in one segment and another image in one prompt change that segment, that group, and nothing else."""
    first, second = make_group([(4, 4)], (5, 6, 4), seed=20), make_group([(4, 4)], (3, 5), seed=21)
    base = run_row(model, make_row([first, second])).hidden.detach()
    other_segment = make_group([(4, 4)], (5, 6, 4), seed=22).segments[1]
    changed = Group(first.prompt, (first.segments[0], other_segment, first.segments[2]))
    moved = (run_row(model, make_row([changed, second])).hidden.detach() - base).abs().amax(dim=1) > 1e-6
    start = len(first.prompt) + 5
    assert moved.nonzero().flatten().tolist() == list(range(start, start + 6))

    other_prompt = make_group([(4, 4)], (), seed=23).prompt
    prompt = replace(first.prompt, pixel_values=other_prompt.pixel_values)
    moved = (run_row(model, make_row([Group(prompt, first.segments), second])).hidden.detach() - base).abs().amax(dim=1) > 1e-6
    image_start = int(first.prompt.image_mask.nonzero()[0])
    assert moved.nonzero().flatten().tolist() == list(range(image_start, first.num_tokens))


def test_balance_loss_leaves_outputs_alone(model: Qwen3VLModel) -> None:
    row = make_row(ROWS["several_groups"], pad_multiple=8)
    plain = run_row(model, row)
    routed = run_row(model, row, routing_of(row, coefficient=0.1))
    assert torch.equal(plain.hidden, routed.hidden)


def hand_row() -> PackedRow:
    """Two groups of 6 + (2, 3) and 2 + (1) tokens, padded to 16."""
    first = make_group([(2, 2)], (), seed=30, text_length=1)  # text, start, image token, end, two of text
    first = Group(
        first.prompt,
        (
            Segment(torch.tensor([11, 12]), sample=7, kind=SegmentKind.PERCEPTION),
            Segment(torch.tensor([13, 14, 15]), sample=5, kind=SegmentKind.REASONING),
        ),
    )
    second = Group(text_prompt(torch.tensor([21, 22]), PATCH_WIDTH), (Segment(torch.tensor([23]), sample=9),))
    return make_row([first, second], pad_multiple=16)


def test_fields_of_a_row_by_hand() -> None:
    row = hand_row()
    #          0 1 2 3 4 5 | 6 7 | 8 9 10 || 11 12 | 13 || 14 15
    assert row.layout.groups == (GroupLayout(6, (2, 3)), GroupLayout(2, (1,)))
    assert (row.layout.padding, row.layout.length, row.num_tokens, row.num_segments, row.num_labels) == (2, 16, 14, 3, 6)
    assert row.input_ids[6:].tolist() == [11, 12, 13, 14, 15, 21, 22, 23, 0, 0]
    # One merged image token at position 2 takes one position; both segments go on at 6, the second group starts again.
    text = [0, 1, 2, 3, 4, 5, 6, 7, 6, 7, 8, 0, 1, 2]
    assert [axis[:14] for axis in row.position_ids.tolist()] == [text] * 3
    assert row.image_index.tolist() == [2]
    assert row.label_source.tolist() == [5, 6, 5, 8, 9, 12]
    assert row.label_ids.tolist() == [11, 12, 13, 14, 15, 23]
    assert row.label_segment.tolist() == [0, 0, 1, 1, 1, 2]
    assert row.sample_of_label.tolist() == [7, 7, 5, 5, 5, 9]
    assert row.segment_sample.tolist() == [7, 5, 9]
    assert row.segment_kind.tolist() == [SegmentKind.PERCEPTION, SegmentKind.REASONING, SegmentKind.RESPONSE]
    assert row.segment_end.tolist() == [7, 10, 13]
    assert row.layout.token_group.tolist() == [0] * 11 + [1] * 3 + [-1] * 2
    assert row.layout.token_segment.tolist() == [-1] * 6 + [0, 0, 1, 1, 1] + [-1, -1, 2] + [-1, -1]
    kinds = [PROMPT] * 6 + [1, 1, 2, 2, 2] + [PROMPT, PROMPT, 0] + [PADDING, PADDING]
    assert token_kinds(row).tolist() == kinds


def test_segments_go_on_after_the_widest_axis_of_an_image() -> None:
    """4 x 6 patches are 2 x 3 = 6 tokens that take positions 2 to 4: text goes on at 5, with the 9th token."""
    row = make_row([make_group([(4, 6)], (2, 1), seed=31, text_length=1)])
    assert row.position_ids[:, 2:8].tolist() == [[2] * 6, [2, 2, 2, 3, 3, 3], [2, 3, 4, 2, 3, 4]]
    for axis in row.position_ids[:, 8:].tolist():
        assert axis == [5, 6, 7, 8, 9, 8]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ("t i i t", "its images need more"),
        ("t i i t i i t", "not contiguous"),
        ("t i i i i t i", "has 5 image tokens, its images fill 4"),
    ],
)
def test_image_tokens_must_match_the_grids(tokens: str, message: str) -> None:
    """One image of 4 x 4 patches: 4 merged tokens."""
    mask = torch.tensor([token == "i" for token in tokens.split()])
    with pytest.raises(DataError, match=message):
        mrope_positions(mask.long(), mask, torch.tensor([[1, 4, 4]]), spatial_merge_size=MERGE)


def test_a_row_for_an_idle_rank() -> None:
    row = make_row([], pad_multiple=4, patch_size=PATCH_WIDTH)
    assert (row.layout.length, row.num_tokens, row.num_labels, row.num_segments) == (4, 0, 0, 0)
    assert row.pixel_values.shape == (0, PATCH_WIDTH)
    assert row.layout.token_group.tolist() == [-1] * 4


def tokens_of(rows: list[PackedRow]) -> list[tuple[int, ...]]:
    return sorted(tuple(row.input_ids[index].tolist()) for row in rows for index in sequences(row.layout))


@pytest.mark.parametrize("max_tokens", [40, 64, 200])
def test_packing_keeps_every_sequence_and_the_budget(max_tokens: int) -> None:
    pick = random.Random(max_tokens)
    groups = [
        make_group([(2, 4)] * (seed % 3), [pick.randint(1, 9) for _ in range(pick.randint(1, 12))], seed=seed, text_length=3)
        for seed in range(12)
    ]
    rows = pack_rows(groups, max_tokens=max_tokens, pad_multiple=8)
    assert all(row.num_tokens <= max_tokens and row.layout.length % 8 == 0 for row in rows)
    alone = [make_row([Group(group.prompt, (segment,))]) for group in groups for segment in group.segments]
    assert tokens_of(rows) == tokens_of(alone)
    again = pack_rows(groups, max_tokens=max_tokens, pad_multiple=8)
    assert [row.input_ids.tolist() for row in again] == [row.input_ids.tolist() for row in rows]


def test_first_fit_decreasing_by_hand() -> None:
    """Sizes 4, 7, 3, 6 into rows of 10: 7 + 3 and 6 + 4, members in their own order."""
    groups = [make_group((), (size - 2,), seed=size, text_length=2) for size in (4, 7, 3, 6)]
    rows = pack_rows(groups, max_tokens=10)
    assert [[group.length for group in row.layout.groups] for row in rows] == [[7, 3], [4, 6]]


def test_split_to_budget_by_hand() -> None:
    group = make_group((), (3, 2, 4, 1), seed=40, text_length=5)
    parts = split_to_budget(group, 10)
    assert [[len(segment) for segment in part.segments] for part in parts] == [[3, 2], [4, 1]]
    assert all(part.prompt is group.prompt for part in parts)
    assert split_to_budget(group, 15)[0].segments == group.segments


@pytest.mark.parametrize("segments", [(2, 6), ()])
def test_what_never_fits_is_an_error_that_names_the_key(segments: tuple[int, ...]) -> None:
    group = make_group((), segments, seed=41, text_length=5 if segments else 11)
    with pytest.raises(ConfigError, match="max_tokens_per_row"):
        split_to_budget(group, 10)
