"""MATH-Vision (Wang et al. 2024, arXiv 2402.14804), test or testmini.

Columns (Hub: MathLLMs/MathVision; in the project's own data/test.jsonl `image` is a path and there is no `decoded_image`):
id, question, options, image, decoded_image, answer, solution, level, subject. The question names its pictures `<image1>`,
`<image2>`, …, which are one image.

Its rule (`evaluation/evaluate.py` of mathllm/MATH-V): the answer is the letter or the option's text, the same text without
regard to case, or of the same value rounded to two decimals, where the value is what latex2sympy makes of it. Here, values are
compared by the reward, and plain numbers also rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prism_nemo.data.records import Record
from prism_nemo.errors import DataError
from prism_nemo.evaluation.benchmarks.files import LETTERS, Row, option_answers, option_lines, rows, with_images
from prism_nemo.evaluation.benchmarks.scores import Result, accuracy, as_number, broken_down, by_reward

_DECIMALS = 2


def read(path: Path, image_root: Path | None = None) -> Iterator[Record]:
    """A folder with both splits is the test split; for testmini, name its file."""
    for row in rows(path, r"(^|/)test[-.]", r"(^|/)testmini", image_root=image_root):
        yield _record(row)


def _record(row: Row) -> Record:
    options, answer = row.texts("options"), row.text("answer")
    if options and answer not in tuple(LETTERS[: len(options)]):
        raise DataError(f"the answer {answer[:80]!r} is no letter of the {len(options)} options", where=row.where)
    image = row.image("decoded_image") or row.image("image")
    images = (image,) if image is not None else ()
    question = row.text("question")
    if options and options != list(LETTERS[: len(options)]):  # where options are pictures, their texts are the letters
        question = f"{question}\n{option_lines(options)}"
    if options:
        question += "\nGive the letter of the right option as the answer."
    return Record(
        id=row.text("id"),
        prompt=with_images(question, images),
        images=images,
        answer=answer,
        equivalent_answers=option_answers(answer, options) if options else (),
        answer_kind="choice" if options else None,
        source="mathvision",
        image_root=row.root,
        metadata={
            "category": row.text("subject", ""),
            "subject": row.text("subject", ""),
            "level": row.integer("level"),
            "options": options,
        },
    )


def right(result: Result) -> bool:
    """By the reward, or by the published rule's texts and numbers."""
    if result.answer is None:
        return False
    if by_reward(result):
        return True
    truth, options = str(result.record.answer), result.field("options")
    return any(_same(result.answer, text) for text in (truth, *([options[LETTERS.index(truth)]] if options else [])))


def _same(given: str, truth: str) -> bool:
    if given.strip().lower() == truth.strip().lower():
        return True
    values = as_number(given), as_number(truth)
    return values[0] is not None and values[1] is not None and round(values[0], _DECIMALS) == round(values[1], _DECIMALS)


def score(results: Sequence[Result]) -> dict[str, Any]:
    return {
        "accuracy": accuracy(results, right),
        "accuracy_by_reward": accuracy(results, by_reward),
        "by": {name: broken_down(results, name, right) for name in ("subject", "level")},
    }
