"""Graded responses as an evaluation keeps them: one line of samples.jsonl each. No torch here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prism_nemo.data.records import Record


@dataclass(frozen=True)
class Sample:
    """One graded response.

    answer           the text of its `<answer>`; None where the format is invalid
    correct          the share of the verified answer that was found, mostly 0 or 1; None where none is known
    reward           what RLVR would give for it; None likewise
    caption_correct  whether the caption is the true one, up to white space; None where that is not known
    caption_f1       how many words caption and true caption share (`token_f1`); None likewise
    vote             which of the responses to its prompt, from 0, gave this answer first (`votes_of`); None without an answer
    """

    valid: bool
    answer: str | None
    correct: float | None
    reward: float | None
    caption_correct: bool | None
    caption_f1: float | None
    tokens: int
    truncated: bool
    vote: int | None

    @property
    def solved(self) -> bool:
        """Whether all of the verified answer was found."""
        return self.correct == 1.0

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Sample:
        """Of a line of samples.jsonl, where `answer` is the verified one and `extracted` the response's."""
        return cls(
            valid=bool(row["valid"]),
            answer=row["extracted"],
            correct=row["correct"],
            reward=row["reward"],
            caption_correct=row["caption_correct"],
            caption_f1=row["caption_f1"],
            tokens=row["tokens"],
            truncated=bool(row["truncated"]),
            vote=row["vote"],
        )


@dataclass(frozen=True)
class Answered:
    """A record with the responses to it, in the order in which they were sampled."""

    record: Record
    samples: Sequence[Sample]


def category_of(record: Record, key: str) -> str | None:
    """`metadata[key]` of a record where it is text or a number, otherwise the record's source, where known."""
    value = record.metadata.get(key)
    return str(value) if isinstance(value, str | int | float) and str(value) else record.source


def by_category(answered: Iterable[Answered], key: str) -> dict[str, list[Answered]]:
    """Records by category, the categories in alphabetical order; records without one are left out."""
    groups: dict[str, list[Answered]] = {}
    for one in answered:
        category = category_of(one.record, key)
        if category is not None:
            groups.setdefault(category, []).append(one)
    return dict(sorted(groups.items()))
