"""The words of the digits task: questions, responses, noisy responses and the content probe's other side.

A strip of digits is asked a question; the response reads it, derives the result and answers:

    largest minus smallest   <caption> 3 5 1 </caption> <think> 3 5 1 largest 5 minus smallest 1 is 4 </think>
                             <answer> 4 </answer>

The reasoning restates every digit, so that both segments say what the image shows: the discriminator scores them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_DIGITS = 4
MAX_NUMBER = 9 * MAX_DIGITS
MISREAD = 0.4  # probability that a noisy demonstration misreads a digit, as any other digit alike
MISCOUNT = 0.1  # probability that its result is off by one
CLEAN = 0.15  # share of public demonstrations without any noise

QUESTIONS = {
    "largest": "largest",
    "difference": "largest minus smallest",
    "evens": "how many even",
    "sum": "sum",  # the harder variant: not in the demo
}
DEMO_QUESTIONS = ("largest", "difference", "evens")
WORDS = ("largest", "smallest", "minus", "plus", "is", "even", "odd", "how", "many", "sum")
TAGS = ("<caption>", "</caption>", "<think>", "</think>", "<answer>", "</answer>")
SYSTEM_PROMPT = "<caption> <think> <answer>"  # in the task's vocabulary: set data.system_prompt to it


@dataclass(frozen=True)
class Response:
    """A response in its parts; `text` is what a model writes."""

    caption: str
    think: str
    answer: str

    @property
    def text(self) -> str:
        return f"<caption> {self.caption} </caption> <think> {self.think} </think> <answer> {self.answer} </answer>"


def result(question: str, digits: Sequence[int]) -> int:
    """The number that answers `question` about `digits`."""
    if question == "largest":
        return max(digits)
    if question == "difference":
        return max(digits) - min(digits)
    if question == "evens":
        return sum(digit % 2 == 0 for digit in digits)
    return sum(digits)


def respond(question: str, digits: Sequence[int], *, answer: int | None = None) -> Response:
    """The response of someone who reads `digits`, and who arrives at `answer` where that is given instead of the right result."""
    answer = result(question, digits) if answer is None else answer
    read = " ".join(map(str, digits))
    if question == "largest":
        think = f"{read} largest is {answer}"
    elif question == "difference":
        think = f"{read} largest {max(digits)} minus smallest {min(digits)} is {answer}"
    elif question == "evens":
        think = " ".join(f"{digit} {'odd' if digit % 2 else 'even'}" for digit in digits) + f" is {answer}"
    else:
        totals = [*np.cumsum(digits)[1:-1].tolist(), answer]
        think = str(digits[0]) + "".join(f" plus {digit} is {total}" for digit, total in zip(digits[1:], totals, strict=True))
    return Response(caption=read, think=think, answer=str(answer))


def respond_noisily(question: str, digits: Sequence[int], rng: np.random.Generator) -> Response:
    """A public demonstration: consistent with what it reads, which is often not what is there, and sometimes off by one."""
    if rng.random() < CLEAN:
        return respond(question, digits)
    read = [_other_digit(digit, rng) if rng.random() < MISREAD else digit for digit in digits]
    answer = result(question, read)
    if rng.random() < MISCOUNT:
        most = {"evens": len(digits), "sum": MAX_NUMBER}.get(question, 9)
        answer += 1 if answer == 0 or (answer < most and rng.random() < 0.5) else -1
    return respond(question, read, answer=answer)


def probe(question: str, digits: Sequence[int], rng: np.random.Generator) -> Response:
    """The clean response with one digit changed in each segment, not the same change in both.

    The reasoning is what it would be for the changed digit; a change is drawn among those that touch the fewest words (nearly
    always the digit alone), so that the image, and not the text, tells which of the two is right.
    """
    true = respond(question, digits)
    place = int(rng.integers(len(digits)))
    caption = respond(question, _with(digits, place, _other_digit(digits[place], rng))).caption
    places = [(index, other) for index, digit in enumerate(digits) for other in range(10) if other != digit]
    changes = [respond(question, _with(digits, index, other)) for index, other in places]
    least = min(_words_apart(true, change) for change in changes)
    nearest = [change for change in changes if _words_apart(true, change) == least]
    reasoning = nearest[int(rng.integers(len(nearest)))]
    return Response(caption=caption, think=reasoning.think, answer=reasoning.answer)


def _other_digit(digit: int, rng: np.random.Generator) -> int:
    return (digit + int(rng.integers(1, 10))) % 10


def _with(digits: Sequence[int], index: int, digit: int) -> list[int]:
    return [*digits[:index], digit, *digits[index + 1 :]]


def _words_apart(one: Response, other: Response) -> int:
    """In how many words of the reasoning segment two responses to the same question differ."""
    pairs = zip([*one.think.split(), one.answer], [*other.think.split(), other.answer], strict=True)
    return sum(a != b for a, b in pairs)
