"""Graded responses made by hand."""

from __future__ import annotations

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
    }
    return Sample(**{**values, **fields})


def answered(name: str, *samples: Sample, **fields: Any) -> Answered:
    return Answered(Record(id=name, prompt="?", answer="1", **fields), samples)
