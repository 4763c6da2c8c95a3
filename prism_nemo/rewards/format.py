"""The response format `<caption>…</caption> <think>…</think> <answer>…</answer>`, strictly, and its two segments.

Valid means: each of the six tags occurs exactly once, in this order, with only white space before, between and behind the three
elements, and an answer that is not empty. Tags are lower case and without attributes; anything else in angle brackets is plain
text, which is allowed inside an element and not outside. Parsing counts and finds fixed strings, so it is linear in the text.
"""

from __future__ import annotations

from dataclasses import dataclass

from prism_nemo.errors import DataError

TAGS = ("<caption>", "</caption>", "<think>", "</think>", "<answer>", "</answer>")


@dataclass(frozen=True)
class ParsedResponse:
    """A response of valid format.

    caption, think, answer            the inner texts, stripped; `answer` is never empty
    perception_span, reasoning_span   (start, end) of the two segments, in characters of `text`
    """

    text: str
    caption: str
    think: str
    answer: str
    perception_span: tuple[int, int]
    reasoning_span: tuple[int, int]

    @property
    def perception_segment(self) -> str:
        """The text from `<caption>` to `</caption>`, character for character."""
        start, end = self.perception_span
        return self.text[start:end]

    @property
    def reasoning_segment(self) -> str:
        """The text from `<think>` to `</answer>`, character for character."""
        start, end = self.reasoning_span
        return self.text[start:end]


def parse_response(text: str) -> ParsedResponse | None:
    """The response's parts, or None when its format is not valid."""
    if any(text.count(tag) != 1 for tag in TAGS):
        return None
    starts = [text.find(tag) for tag in TAGS]
    ends = [start + len(tag) for start, tag in zip(starts, TAGS, strict=True)]
    if starts != sorted(starts):
        return None
    outside = (text[: starts[0]], text[ends[1] : starts[2]], text[ends[3] : starts[4]], text[ends[5] :])
    if any(part.strip() for part in outside):
        return None
    caption, think, answer = (text[ends[opening] : starts[opening + 1]].strip() for opening in (0, 2, 4))
    if not answer:
        return None
    return ParsedResponse(
        text=text,
        caption=caption,
        think=think,
        answer=answer,
        perception_span=(starts[0], ends[1]),
        reasoning_span=(starts[2], ends[5]),
    )


def response_text(caption: str, think: str, answer: str) -> str:
    """A response of valid format with these parts. Raises DataError when they cannot make one."""
    text = f"<caption>{caption}</caption> <think>{think}</think> <answer>{answer}</answer>"
    if parse_response(text) is None:
        raise DataError(
            "these parts make no valid response",
            where=text[:200],
            remedy="the answer may not be empty, and no part may contain one of the tags " + " ".join(TAGS),
        )
    return text
