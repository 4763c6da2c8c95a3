"""MMMU (Yue et al. 2023, arXiv 2311.16502), validation: 30 subjects in six disciplines, multiple choice and open questions.

Columns (Hub: MMMU/MMMU, a folder for each subject): id ("validation_Accounting_1"), question with `<image 1>`, …, options (a
list, written as Python does), explanation, image_1 … image_7, img_type, answer, topic_difficulty, question_type
("multiple-choice", "open"), subfield.

Its rule (`eval/eval_utils.py` of MMMU-Benchmark/MMMU): of the options that a response names in brackets, otherwise as a word,
otherwise by their text in a longer response, the last; where there is none, one by chance. Open: a true number among the
response's, both rounded to two decimals, or the true text within the response's. Accuracy per subject, per discipline and over
all, every record counting the same. Here, the response is the text of `<answer>`; where it names no option it is wrong, not
guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prism_nemo.data.records import IMAGE_PLACEHOLDER, ImageSource, Record
from prism_nemo.errors import DataError
from prism_nemo.evaluation.benchmarks.files import LETTERS, Row, option_answers, option_lines, rows
from prism_nemo.evaluation.benchmarks.scores import Result, Rule, accuracy, as_number, broken_down, by_reward

DISCIPLINES = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
DISCIPLINE_OF = {subject: discipline for discipline, subjects in DISCIPLINES.items() for subject in subjects}
_IMAGE = re.compile(r"<image (\d+)>")
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][+-]?\d+)?|-?\.\d+")
_LONG = 5  # words: only a longer answer is searched for the texts of options
_DECIMALS = 2


def read(path: Path, image_root: Path | None = None) -> Iterator[Record]:
    for row in rows(path, "validation", image_root=image_root):
        yield _record(row)


def _record(row: Row) -> Record:
    subject = "_".join(row.text("id").split("_")[1:-1])
    options, answer = row.texts("options"), row.text("answer")
    choice = row.choice("question_type", ("multiple-choice", "open")) == "multiple-choice"
    answers = [answer]
    if choice and answer not in tuple(LETTERS[: len(options)]):
        raise DataError(f"the answer {answer[:80]!r} is no letter of the {len(options)} options", where=row.where)
    if not choice and answer.startswith("["):
        answers = row.texts("answer")
        if not answers:
            raise DataError("there is no answer", where=row.where)
    asked = f"\n{option_lines(options)}\nGive the letter of the right option as the answer." if choice else ""
    prompt, images = place_images(row, row.text("question") + asked)
    return Record(
        id=row.text("id"),
        prompt=prompt,
        images=images,
        answer=answers[0],
        equivalent_answers=option_answers(answer, options) if choice else tuple(answers[1:]),
        answer_kind="choice" if choice else None,
        source="mmmu",
        image_root=row.root,
        metadata={
            "category": subject,
            "subject": subject,
            "discipline": DISCIPLINE_OF.get(subject),
            "question_type": row.text("question_type"),
            "topic_difficulty": row.text("topic_difficulty", ""),
            "options": options if choice else [],
            "published_answers": answers,
        },
    )


def place_images(row: Row, text: str) -> tuple[str, tuple[ImageSource, ...]]:
    """The text with each image where `<image N>` first names it, and the images in that order; images it never names come first.

    Named again, an image is `image N`: what was seen once need not be shown twice.
    """
    found = {number: image for number in range(1, 8) if (image := row.image(f"image_{number}")) is not None}
    order: list[int] = []

    def placed(match: re.Match[str]) -> str:
        number = int(match[1])
        if number not in found:
            raise DataError(f"the text names image {number}, and the row has none", where=row.where)
        if number in order:
            return f"image {number}"
        order.append(number)
        return IMAGE_PLACEHOLDER

    text = _IMAGE.sub(placed, text)
    unnamed = [number for number in found if number not in order]
    images = tuple(found[number] for number in (*unnamed, *order))
    return f"{IMAGE_PLACEHOLDER * len(unnamed)}\n{text}" if unnamed else text, images


def right(result: Result) -> bool:
    """By the published rule."""
    if result.answer is None:
        return False
    if result.field("question_type") == "multiple-choice":
        return named_option(result.answer, result.field("options")) == result.record.answer
    return _open(result.answer, result.field("published_answers"))


def named_option(given: str, options: Sequence[str], *, dotted: bool = False) -> str | None:
    """The letter of the option that an answer names last; None for none. `dotted`: a word may end in a period (MMMU-Pro)."""
    text = f" {given.strip(',.!?;: ' + chr(39))} "
    letters = LETTERS[: len(options)]
    forms = [[f"({letter})" for letter in letters], [f" {letter} " for letter in letters]]
    if dotted:
        forms.append([f"{letter}." for letter in letters])
    for form in forms:
        places = {letter: text.rfind(written) for letter, written in zip(letters, form, strict=True)}
        if max(places.values(), default=-1) >= 0:
            return max(places, key=lambda letter: places[letter])
    if len(text.split()) <= _LONG:
        return None
    places = {letter: text.lower().rfind(option.lower()) for letter, option in zip(letters, options, strict=True) if option}
    return max(places, key=lambda letter: places[letter]) if max(places.values(), default=-1) >= 0 else None


def _open(given: str, truths: Sequence[str]) -> bool:
    numbers = {round(value, _DECIMALS) for text in (given, *_NUMBER.findall(given)) if (value := as_number(text)) is not None}
    text = f" {given.strip().strip('.').lower()} "
    for truth in truths:
        value = as_number(truth)
        if value is not None and round(value, _DECIMALS) in numbers:
            return True
        wanted = truth.strip().lower()
        if value is None and wanted and (f" {wanted} " if len(wanted) == 1 else wanted) in text:
            return True
    return False


def score(results: Sequence[Result]) -> dict[str, Any]:
    return {
        **subject_scores(results, right),
        "accuracy_by_reward": accuracy(results, by_reward),
        "by_question_type": broken_down(results, "question_type", right),
    }


def subject_scores(results: Sequence[Result], right: Rule) -> dict[str, Any]:
    """Accuracy over all records, and by subject and discipline, with the means over these in which each counts the same."""
    subjects = broken_down(results, "subject", right)
    disciplines = broken_down(results, "discipline", right)
    scores: dict[str, Any] = {"accuracy": accuracy(results, right)}
    for name, table in (("subjects", subjects), ("disciplines", disciplines)):
        if table:
            scores[f"mean_of_{name}"] = sum(row["accuracy"] for row in table.values()) / len(table)
    return {**scores, "by": {"discipline": disciplines, "subject": subjects}}
