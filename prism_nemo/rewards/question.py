"""What is asked about an answer, and the kinds of answers."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class AnswerKind(str, Enum):
    """What a verified answer is, where its text should not tell."""

    CHOICE = "choice"  # one letter, or several
    NUMBER = "number"  # with or without a unit
    EXPRESSION = "expression"  # algebra, equations and inequalities
    INTERVAL = "interval"  # also unions of intervals, and inequalities that say one
    TUPLE = "tuple"  # in order: points, vectors
    SET = "set"  # in any order
    LIST = "list"  # in order, bare
    MULTI_PART = "multi_part"  # answers to several questions: named, numbered or in order
    BOOLEAN = "boolean"  # yes or no, true or false
    TEXT = "text"


class Question(NamedTuple):
    """Is `given`, a model's answer, the verified one, `truth`, or one of its equivalents?"""

    given: str
    truth: str
    equivalent_answers: tuple[str, ...] = ()
    kind: AnswerKind | None = None
