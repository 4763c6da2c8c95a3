"""The response format: what is valid, what is not, the exact segments, and linear time on hostile input."""

from __future__ import annotations

import time

import pytest

from prism_nemo.errors import DataError
from prism_nemo.rewards.format import TAGS, parse_response, response_text

GOOD = "<caption> three digits: 1 2 3 </caption>\n<think>1 + 2\nis 3 </think> <answer> 3 </answer>\n"


def test_parts_and_segments() -> None:
    parsed = parse_response(GOOD)
    assert parsed is not None
    assert (parsed.caption, parsed.think, parsed.answer) == ("three digits: 1 2 3", "1 + 2\nis 3", "3")
    assert parsed.perception_segment == "<caption> three digits: 1 2 3 </caption>"
    assert parsed.reasoning_segment == "<think>1 + 2\nis 3 </think> <answer> 3 </answer>"
    assert GOOD[slice(*parsed.perception_span)] == parsed.perception_segment
    assert GOOD[slice(*parsed.reasoning_span)] == parsed.reasoning_segment


def test_segments_are_exact_substrings_so_that_teacher_and_student_are_treated_alike() -> None:
    bare = parse_response(GOOD.strip())
    padded = parse_response("\n\t " + GOOD + "  \n")
    assert bare is not None and padded is not None
    assert (bare.perception_segment, bare.reasoning_segment) == (padded.perception_segment, padded.reasoning_segment)


@pytest.mark.parametrize(
    "text",
    [
        "<caption>c</caption><think>t</think><answer>a</answer>",
        "<caption></caption><think></think><answer>a</answer>",  # only the answer may not be empty
        "<caption>a < b > c</caption><think><b>bold</b></think><answer>x < 3</answer>",
        "<caption>the tag <CAPTION> is text</caption><think>t</think><answer>a</answer>",
        "\u00a0<caption>c</caption>\u2003<think>t</think>\r\n<answer>a</answer>",
    ],
)
def test_valid(text: str) -> None:
    assert parse_response(text) is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "42",
        "<answer>42</answer>",
        "<think>t</think> <answer>a</answer>",
        "<caption>c</caption> <answer>a</answer>",
        "<caption>c</caption> <think>t</think>",
        "<caption>c</caption> <think>t</think> <answer></answer>",
        "<caption>c</caption> <think>t</think> <answer> \n </answer>",
        "<caption>c</caption> <think>t</think> <answer>a",
        "<caption>c</caption> <think>t</think> a</answer>",
        "<caption>c</caption> <think>t <answer>a</answer>",
        "well: <caption>c</caption> <think>t</think> <answer>a</answer>",
        "<caption>c</caption> so <think>t</think> <answer>a</answer>",
        "<caption>c</caption> <think>t</think> so <answer>a</answer>",
        "<caption>c</caption> <think>t</think> <answer>a</answer> done",
        "<caption>c</caption> <think>t</think> <answer>a</answer><|im_end|>",
        "<caption>c</caption> <think>t</think> <answer>a</answer>\u200b",
        "<think>t</think> <caption>c</caption> <answer>a</answer>",
        "<caption>c</caption> <answer>a</answer> <think>t</think>",
        "</caption>c<caption> <think>t</think> <answer>a</answer>",
        "<Caption>c</Caption> <think>t</think> <answer>a</answer>",
        "<caption >c</caption> <think>t</think> <answer>a</answer>",
        # what a lenient pattern accepts, grading the first answer: repeated and nested tags
        "<caption>c</caption> <think>t</think> <answer>3</answer> <answer>4</answer>",
        "<caption>c</caption> <think>t <answer>3</answer></think> <answer>4</answer>",
        "<caption>c</caption> <think>t</think> <answer><answer>3</answer></answer>",
        "<caption>c</caption> <think>t</think> <answer>3<answer>4</answer>",
        "<caption>c</caption> <think>a</think> <think>t</think> <answer>3</answer>",
        "<caption><think>t</think></caption> <answer>3</answer>",
        "<caption>c<think></caption>t</think> <answer>3</answer>",
        "<caption>c</caption> <think>t<answer></think>3</answer>",
        GOOD + GOOD,
    ],
)
def test_invalid(text: str) -> None:
    assert parse_response(text) is None


@pytest.mark.parametrize("tag", TAGS)
def test_every_tag_is_needed_exactly_once(tag: str) -> None:
    assert parse_response(GOOD.replace(tag, "")) is None
    assert parse_response(GOOD.replace(tag, tag + tag)) is None
    assert parse_response(GOOD.replace(tag, tag.upper())) is None


def test_response_text_round_trip() -> None:
    text = response_text("a caption", "some thought", "7")
    assert text == "<caption>a caption</caption> <think>some thought</think> <answer>7</answer>"
    parsed = parse_response(text)
    assert parsed is not None
    assert (parsed.caption, parsed.think, parsed.answer) == ("a caption", "some thought", "7")


@pytest.mark.parametrize("parts", [("c", "t", " "), ("c", "t </think>", "a"), ("<answer>", "t", "a"), ("c", "t", "a</answer> b")])
def test_response_text_refuses_what_would_not_parse(parts: tuple[str, str, str]) -> None:
    with pytest.raises(DataError, match="no valid response"):
        response_text(*parts)


@pytest.mark.parametrize(
    "hostile",
    [
        "<caption>" * 110_000,
        "<" * 1_000_000,
        " " * 1_000_000,
        "<caption>" + " " * 1_000_000,
        "<caption>c</caption> <think>" + "</think" * 140_000,
        "<caption>" + "<think" * 160_000 + "</caption>",
        "".join(TAGS) * 20_000,
        " " * 500_000 + "<caption></caption> <think></think> <answer>" + " " * 500_000 + "</answer>",
    ],
)
def test_a_million_characters_take_no_time(hostile: str) -> None:
    start = time.perf_counter()
    assert parse_response(hostile) is None
    assert time.perf_counter() - start < 0.5  # about 5 ms; a backtracking pattern takes minutes


def test_a_long_valid_response() -> None:
    parsed = parse_response(response_text("c" * 400_000, "<think" * 100_000, "a"))
    assert parsed is not None
    assert len(parsed.caption) == 400_000
    assert len(parsed.think) == 600_000
