"""The examples of docs/rewards.md, executed."""

from __future__ import annotations

import doctest
from pathlib import Path

from prism_nemo.rewards.question import AnswerKind

PAGE = Path(__file__).parents[2] / "docs" / "rewards.md"


def test_the_examples_run() -> None:
    outcome = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert outcome.failed == 0
    assert outcome.attempted > 20


def test_every_kind_is_on_the_page() -> None:
    text = PAGE.read_text()
    assert [kind.value for kind in AnswerKind if f"`{kind.value}`" not in text] == []
