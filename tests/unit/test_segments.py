"""Text -> a discriminator's segments: one way, whoever wrote it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.stages import stage_config, tiny_task

from prism_nemo.config.enums import DiscriminatorView
from prism_nemo.data.chat import ChatEncoder
from prism_nemo.data.readers import read_records
from prism_nemo.data.segments import KINDS, response_segments
from prism_nemo.errors import DataError
from prism_nemo.packing.groups import SegmentKind

TEXT = "<caption> 4 7 1 </caption> <think> largest is 7 </think> <answer> 7 </answer>"
VIEWS = list(DiscriminatorView)


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    data = stage_config("sft", tiny_task().model).data
    return ChatEncoder.from_directory(tiny_task().model, data, image_root=None)


def test_segments_by_hand(encoder: ChatEncoder) -> None:
    perception, reasoning = response_segments(TEXT, encoder, DiscriminatorView.segments, sample=3)
    assert encoder.decode(perception.tokens) == "<caption> 4 7 1 </caption>"
    assert encoder.decode(reasoning.tokens) == "<think> largest is 7 </think> <answer> 7 </answer>"
    assert (perception.kind, reasoning.kind) == (SegmentKind.PERCEPTION, SegmentKind.REASONING)
    (whole,) = response_segments(TEXT, encoder, DiscriminatorView.whole, sample=3)
    assert encoder.decode(whole.tokens) == TEXT
    assert whole.kind == SegmentKind.RESPONSE
    assert {segment.sample for segment in (perception, reasoning, whole)} == {3}
    assert (len(perception), len(reasoning), len(whole)) == (6, 9, 14)


@pytest.mark.parametrize("view", VIEWS)
def test_every_segment_is_scored_at_the_same_kind_of_token(encoder: ChatEncoder, view: DiscriminatorView) -> None:
    """The end of the turn, once, at the end: no text token, no padding, for any teacher's response of the task."""
    for record in read_records(tiny_task().data.teacher, image_root=None, max_bad_sample_share=0).records:
        assert record.response is not None
        found = response_segments(record.response, encoder, view, sample=0)
        assert tuple(segment.kind for segment in found) == KINDS[view]
        for segment in found:
            ends = segment.tokens == encoder.end_token_id
            assert ends.nonzero().flatten().tolist() == [len(segment) - 1]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("written", [f"  {TEXT}\n", TEXT.replace("> <", ">\n\n<"), TEXT.replace("</caption> ", "</caption>\t")])
def test_white_space_around_the_segments_does_not_tell_who_wrote_them(
    encoder: ChatEncoder, view: DiscriminatorView, written: str
) -> None:
    expected = response_segments(TEXT, encoder, view, sample=0)
    found = response_segments(written, encoder, view, sample=1)
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        TEXT.replace("</think>", ""),
        f"{TEXT} 7",
        f"{TEXT} {TEXT}",
        TEXT.replace("<answer> 7 </answer>", "<answer> </answer>"),
        "<think> largest is 7 </think> <caption> 4 7 1 </caption> <answer> 7 </answer>",
    ],
)
def test_a_response_in_another_format_has_no_segments(encoder: ChatEncoder, view: DiscriminatorView, text: str) -> None:
    with pytest.raises(DataError, match="the response is not <caption>"):
        response_segments(text, encoder, view, sample=0)


@pytest.mark.parametrize(
    "text", [TEXT.replace("4 7", "4 <|im_end|> 7"), TEXT.replace("4 7", "<|image_pad|>"), TEXT.replace("4", "four")]
)
def test_special_tokens_and_unknown_words_are_no_text(encoder: ChatEncoder, text: str) -> None:
    with pytest.raises(DataError):
        response_segments(text, encoder, DiscriminatorView.segments, sample=0)


@pytest.mark.parametrize(("view", "longest"), [(DiscriminatorView.segments, 9), (DiscriminatorView.whole, 14)])
def test_a_long_segment_is_refused_and_never_cut(encoder: ChatEncoder, view: DiscriminatorView, longest: int) -> None:
    fits, short = (
        ChatEncoder.from_directory(tiny_task().model, replace(encoder.data, max_response_length=limit), image_root=None)
        for limit in (longest, longest - 1)
    )
    assert max(len(segment) for segment in response_segments(TEXT, fits, view, sample=0)) == longest
    with pytest.raises(DataError, match=f"{longest} tokens, the limit is {longest - 1}"):
        response_segments(TEXT, short, view, sample=0)
