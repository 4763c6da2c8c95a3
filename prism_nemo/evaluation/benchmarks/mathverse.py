"""MathVerse (Zhang et al. 2024, arXiv 2403.14624), testmini: every problem in five versions, with less and less in the text.

Columns (Hub: AI4Math/MathVerse testmini.parquet, and CaraJ/MathVerse-lmmseval, which adds `question_for_eval`): sample_index,
problem_index, problem_version, question, image, answer, question_type, metadata {split, source, subject, subfield}, query_wo,
query_cot.

Its rule (`evaluation/score_answer_s2.py` of ZrrSkywalker/MathVerse): a language model extracts the answer, and another decides
whether it agrees with the true one; accuracy over all records, per version, subject and subfield. Here, the answer is the text
of `<answer>`, and the configured reward decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prism_nemo.data.records import Record
from prism_nemo.evaluation.benchmarks.files import LETTERS, Row, option_answers, rows, with_images
from prism_nemo.evaluation.benchmarks.scores import Result, accuracy, broken_down, by_reward

VERSIONS = ("Text Dominant", "Text Lite", "Vision Intensive", "Vision Dominant", "Vision Only")
_OPTION = re.compile(r"^\s*\(?([A-Z])\s*[:.)]\s*(.+?)\s*$", re.MULTILINE)


def read(path: Path, image_root: Path | None = None) -> Iterator[Record]:
    """Of a folder the file with all five versions; the sixth version, Text Only, is in a file of its own."""
    for row in rows(path, r"(^|/)testmini\.", image_root=image_root):
        yield _record(row)


def _record(row: Row) -> Record:
    question = row.text("question_for_eval", "") or row.text("question", "")
    answer = row.text("answer").strip()
    options = _options(question)
    image = row.image("image")
    images = (image,) if image is not None else ()
    about = row.fields("metadata")
    choice = row.choice("question_type", ("multi-choice", "free-form")) == "multi-choice"
    return Record(
        id=row.text("sample_index"),
        prompt=with_images(row.text("query_cot", "") or question, images),
        images=images,
        answer=answer,
        equivalent_answers=option_answers(answer, options) if choice else (),
        answer_kind="choice" if choice else None,
        source="mathverse",
        image_root=row.root,
        metadata={
            "category": row.text("problem_version"),
            "problem_version": row.text("problem_version"),
            "problem_index": row.text("problem_index"),
            "question_type": row.text("question_type"),
            "subject": about.get("subject"),
            "subfield": about.get("subfield"),
        },
    )


def _options(question: str) -> list[str]:
    """The texts behind `Choices:`, where they are lettered from A without a gap."""
    _, _, choices = question.rpartition("Choices:")
    found = _OPTION.findall(choices)
    return [text for _, text in found] if [letter for letter, _ in found] == list(LETTERS[: len(found)]) else []


def score(results: Sequence[Result]) -> dict[str, Any]:
    versions = broken_down(results, "problem_version", by_reward)
    five = [versions[name]["accuracy"] for name in VERSIONS if name in versions]
    return {
        "accuracy": accuracy(results, by_reward),
        **({"mean_of_versions": sum(five) / len(five)} if five else {}),
        "by": {
            "problem_version": versions,
            **{name: broken_down(results, name, by_reward) for name in ("subject", "subfield", "question_type")},
        },
    }
