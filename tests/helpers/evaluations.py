"""Graded responses made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from prism_nemo.data.records import Record
from prism_nemo.evaluation.samples import Answered, Sample


def sample(answer: str | None = "1", correct: float | None = 1.0, **fields: Any) -> Sample:
    """A response; without an answer one of invalid format."""
    valid = answer is not None
    values: dict[str, Any] = {
        "valid": valid,
        "answer": answer,
        "correct": correct if valid or correct is None else 0.0,
        "reward": None if correct is None else 0.8 * correct + 0.2 * valid,
        "caption_correct": None,
        "caption_f1": None,
        "tokens": 10,
        "truncated": False,
        "vote": None,
    }
    return Sample(**{**values, **fields})


def voting(*samples: Sample) -> tuple[Sample, ...]:
    """The same with votes for equal texts."""
    texts = [each.answer for each in samples]
    return tuple(replace(each, vote=None if each.answer is None else texts.index(each.answer)) for each in samples)


def answered(name: str, *samples: Sample, **fields: Any) -> Answered:
    return Answered(Record(id=name, prompt="?", answer="1", **fields), voting(*samples))
