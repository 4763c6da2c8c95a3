"""MathVista (Lu et al. 2023, arXiv 2310.02255), testmini.

Columns (Hub: AI4Math/MathVista; in the project's own data/testmini.json `image` is a path and there is no `decoded_image`):
pid, question, image, decoded_image, choices, unit, precision, answer, question_type, answer_type, metadata, query.

Its rule (`evaluation/calculate_score.py` of lupantech/MathVista): an extracted answer is brought into the answer's type and must
then be equal. Choices: the letter's text, or the choice with the smallest edit distance; integers cut, floats rounded to the
asked-for precision. There, a language model extracts the answer from the response; here it is the text of `<answer>`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prism_nemo.data.records import Record
from prism_nemo.errors import DataError
from prism_nemo.evaluation.benchmarks.files import LETTERS, Row, option_answers, option_lines, rows, with_images
from prism_nemo.evaluation.benchmarks.scores import Result, accuracy, broken_down, by_reward, edit_distance

BREAKDOWN = ("question_type", "answer_type", "language", "source", "category", "task", "context", "grade", "skills")
_LONGEST_COMPARED = 1000  # characters of an answer whose distance to the choices is taken
_ASKED = {
    "integer": "Give an integer as the answer.",
    "float": "Give a number with {precision} decimal places as the answer.",
    "list": "Give a list such as [1, 2, 3] as the answer.",
}


def read(path: Path, image_root: Path | None = None) -> Iterator[Record]:
    for row in rows(path, r"(^|/)testmini", image_root=image_root):
        yield _record(row)


def _record(row: Row) -> Record:
    kind, answer = row.choice("question_type", ("multi_choice", "free_form")), row.text("answer")
    answer_type = row.choice("answer_type", ("text", *_ASKED))
    choices = row.texts("choices")
    equivalent: tuple[str, ...] = ()
    truth = answer
    if kind == "multi_choice":
        if answer not in choices:
            raise DataError(f"the answer {answer[:80]!r} is none of the choices", where=row.where)
        truth = LETTERS[choices.index(answer)]
        equivalent = option_answers(truth, choices)
    image = row.image("decoded_image") or row.image("image")
    images = (image,) if image is not None else ()
    return Record(
        id=row.text("pid"),
        prompt=with_images(row.text("query", "") or _question(row, choices), images),
        images=images,
        answer=truth,
        equivalent_answers=equivalent,
        answer_kind="choice" if kind == "multi_choice" else None,
        source="mathvista",
        image_root=row.root,
        metadata={
            **row.fields("metadata"),
            "question_type": kind,
            "answer_type": answer_type,
            "choices": choices,
            "precision": row.integer("precision"),
            "published_answer": answer,
        },
    )


def _question(row: Row, choices: Sequence[str]) -> str:
    """For files without the published `query`."""
    unit = row.text("unit", "")
    question = row.text("question") + (f" (Unit: {unit})" if unit else "")
    if choices:
        return f"{question}\n{option_lines(choices)}\nGive the letter of the right option as the answer."
    asked = _ASKED.get(row.text("answer_type"), "")
    return f"{question}\n{asked.format(precision=row.integer('precision'))}".strip()


def right(result: Result) -> bool:
    """By the published rule."""
    if result.answer is None:
        return False
    given, truth = result.answer.strip(), str(result.field("published_answer"))
    if result.field("question_type") == "multi_choice":
        return _choice(given, result.field("choices")) == truth
    try:
        if result.field("answer_type") == "integer":
            return str(int(float(given))) == truth
        if result.field("answer_type") == "float":
            return str(round(float(given), result.field("precision"))) == truth
    except (ValueError, OverflowError):
        return False
    return given == truth


def _choice(given: str, choices: Sequence[str]) -> str:
    in_parentheses = re.search(r"\(([a-zA-Z])\)", given)
    letter = in_parentheses[1].upper() if in_parentheses else given
    if len(letter) == 1 and letter in LETTERS[: len(choices)]:
        return choices[LETTERS.index(letter)]
    return min(choices, key=lambda choice: edit_distance(letter[:_LONGEST_COMPARED], choice))


def score(results: Sequence[Result]) -> dict[str, Any]:
    return {
        "accuracy": accuracy(results, right),
        "accuracy_by_reward": accuracy(results, by_reward),
        "by": {name: broken_down(results, name, right) for name in BREAKDOWN},
    }
