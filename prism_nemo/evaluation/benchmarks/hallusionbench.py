"""HallusionBench (Guan et al. 2023, arXiv 2310.14566): yes or no about figures and their altered copies.

Columns (the project's own HallusionBench.json, where `filename` is a path; Hub: lmms-lab/HallusionBench, where `image` is an
image, in the files image-… and non_image-…, which belong together): category (VD: the question needs the figure, VS: it does
not), subcategory, visual_input ("0": no figure), set_id, figure_id ("0": the original), sample_note, question_id, question,
gt_answer_details, gt_answer ("1": yes), filename.

Its rule (`utils.py` of tianyi-lab/HallusionBench): a response is right, wrong or unclear. Unclear is right for a VS question
without its figure, and wrong otherwise.

    aAcc   of the questions, the right ones
    fAcc   of the figures, those with every question right; a VS question without its figure is about none
    qAcc   of the questions of a set, those that are right with every figure of the set; easy: with the original, hard: with all
           others

There, a language model judges the response; here, an answer that begins with yes or no is that, anything else is unclear, and a
response of invalid format is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prism_nemo.data.records import Record
from prism_nemo.errors import DataError
from prism_nemo.evaluation.benchmarks.files import Row, rows, with_images
from prism_nemo.evaluation.benchmarks.scores import Result, accuracy, by_reward

FIGURE = ("category", "subcategory", "set_id", "figure_id")
QUESTION = ("category", "subcategory", "set_id", "question_id")
_ANSWERS = {"0": "No", "1": "Yes"}
_FIRST_WORD = re.compile(r"\W*([A-Za-z]+)")


def read(path: Path, image_root: Path | None = None) -> Iterator[Record]:
    """A folder's file is HallusionBench.json, or all of its parquet files."""
    path = Path(path)
    published = path / "HallusionBench.json"
    for row in rows(published if published.is_file() else path, "image-", image_root=image_root):
        yield _record(row)


def _record(row: Row) -> Record:
    truth = _ANSWERS.get(row.text("gt_answer"))
    if truth is None:
        raise DataError(f"`gt_answer` is {row.text('gt_answer')!r}, neither 0 nor 1", where=row.where)
    place = {name: row.text(name) for name in ("category", "subcategory", "set_id", "figure_id", "question_id")}
    image = None if row.text("visual_input") == "0" else row.image("image") or row.image("filename")
    images = (image,) if image is not None else ()
    return Record(
        id="/".join(place.values()),
        prompt=with_images(f"{row.text('question')}\nGive yes or no as the answer.", images),
        images=images,
        answer=truth,
        answer_kind="boolean",
        source="hallusionbench",
        image_root=row.root,
        metadata={**place, "visual_input": row.text("visual_input")},
    )


def right(result: Result) -> bool:
    """By the published rule."""
    if result.answer is None:
        return False
    word = _FIRST_WORD.match(result.answer)
    given = word[1].capitalize() if word else ""
    if given not in _ANSWERS.values():
        return _without_its_figure(result)
    return given == result.record.answer


def _without_its_figure(result: Result) -> bool:
    return result.field("category") == "VS" and result.field("figure_id") == "0"


def _groups(results: Sequence[Result], *names: str) -> float:
    """The share of groups, by these fields, in which every response is right."""
    groups: dict[tuple[str, ...], list[bool]] = {}
    for result in results:
        groups.setdefault(tuple(result.field(name) for name in names), []).append(right(result))
    return sum(map(all, groups.values())) / len(groups) if groups else 0.0


def _accuracies(results: Sequence[Result]) -> dict[str, float]:
    about_a_figure = [result for result in results if not _without_its_figure(result)]
    found = {"aAcc": accuracy(results, right)}
    if about_a_figure:
        found["fAcc"] = _groups(about_a_figure, *FIGURE)
    found["qAcc"] = _groups(results, *QUESTION)
    for name, original in (("easy", True), ("hard", False)):
        part = [result for result in results if (result.field("figure_id") == "0") is original]
        if part:
            found[name] = _groups(part, *QUESTION)
    return found


def score(results: Sequence[Result]) -> dict[str, Any]:
    parts = {name: [result for result in results if result.field("category") == name] for name in ("VD", "VS")}
    return {
        **_accuracies(results),
        "accuracy_by_reward": accuracy(results, by_reward),
        "by": {name: _accuracies(part) for name, part in parts.items() if part},
    }
