"""MMMU-Pro (Yue et al. 2024, arXiv 2409.02813): MMMU with ten options, and the same questions inside an image.

Columns (Hub: MMMU/MMMU_Pro), test split. "standard (10 options)": id, question with `<image 1>`, …, options (a list, written
as Python does), explanation, image_1 … image_7, img_type, answer (a letter), topic_difficulty, subject. "vision": id, image,
options, answer, subject; question and options are in the image only.

Its rule (`mmmu-pro/evaluate.py` of MMMU-Benchmark/MMMU): as MMMU's for multiple choice, where a letter may also end in a
period; the score is the mean of the two settings' accuracies. Here, the response is the text of `<answer>`; where it names no
option it is wrong, not guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prism_nemo.data.records import ImageSource, Record
from prism_nemo.errors import DataError
from prism_nemo.evaluation.benchmarks.files import LETTERS, Row, option_answers, option_lines, rows, with_images
from prism_nemo.evaluation.benchmarks.mmmu import DISCIPLINE_OF, named_option, place_images, subject_scores
from prism_nemo.evaluation.benchmarks.scores import Result, accuracy, by_reward

_ASKED = "Give the letter of the right option as the answer."


def read(path: Path, image_root: Path | None = None) -> Iterator[Record]:
    """The settings that the folder holds, or the one of the file. Not "standard (4 options)", which the score leaves out."""
    for row in rows(path, r"^(?!.*4 options).*test", image_root=image_root):
        yield _record(row)


def _record(row: Row) -> Record:
    images: tuple[ImageSource, ...]
    setting = "vision" if "question" not in row.values else "standard"
    options, answer = row.texts("options"), row.text("answer")
    if answer not in tuple(LETTERS[: len(options)]):
        raise DataError(f"the answer {answer[:80]!r} is no letter of the {len(options)} options", where=row.where)
    if setting == "vision":
        image = row.image("image")
        if image is None:
            raise DataError("the row has no `image`, and no `question`", where=row.where)
        prompt, images = with_images(f"Answer the question in the image. {_ASKED}", [image]), (image,)
    else:
        prompt, images = place_images(row, f"{row.text('question')}\n{option_lines(options)}\n{_ASKED}")
    subject = row.text("subject", "").replace(" ", "_")
    return Record(
        id=f"{setting}/{row.text('id')}",
        prompt=prompt,
        images=images,
        answer=answer,
        equivalent_answers=option_answers(answer, options),
        answer_kind="choice",
        source="mmmu_pro",
        image_root=row.root,
        metadata={
            "category": setting,
            "setting": setting,
            "subject": subject,
            "discipline": DISCIPLINE_OF.get(subject),
            "topic_difficulty": row.text("topic_difficulty", ""),
            "options": options,
        },
    )


def right(result: Result) -> bool:
    """By the published rule."""
    return result.answer is not None and named_option(result.answer, result.field("options"), dotted=True) == result.record.answer


def score(results: Sequence[Result]) -> dict[str, Any]:
    settings = {
        name: subject_scores(group, right)
        for name in ("standard", "vision")
        if (group := [result for result in results if result.field("setting") == name])
    }
    return {
        "accuracy": sum(scores["accuracy"] for scores in settings.values()) / len(settings) if settings else 0.0,
        "accuracy_by_reward": accuracy(results, by_reward),
        **settings,
    }
