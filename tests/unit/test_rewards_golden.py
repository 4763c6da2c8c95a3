"""Pairs of answers as a careful person judges them. The rules were developed on one part; the other was written before them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prism_nemo.config.schema import RewardConfig
from prism_nemo.rewards.question import AnswerKind, Question
from prism_nemo.rewards.verifier import Verifier

GOLDEN = Path(__file__).parents[1] / "golden" / "answers.jsonl"


@pytest.fixture(scope="module")
def judged() -> dict[str, list[tuple[dict[str, Any], bool]]]:
    """Every pair of a part with the verdict that it gets."""
    rows = [json.loads(line) for line in GOLDEN.read_text().splitlines()]
    questions = [
        Question(
            given=row["given"],
            truth=row["truth"],
            equivalent_answers=tuple(row.get("equivalent_answers", ())),
            kind=AnswerKind(row["kind"]) if "kind" in row else None,
        )
        for row in rows
    ]
    with Verifier(RewardConfig(time_limit_seconds=20.0)) as verifier:
        verdicts = verifier.verdicts(questions)
        assert verifier.take_counts().timeouts == 0
    parts: dict[str, list[tuple[dict[str, Any], bool]]] = {}
    for row, verdict in zip(rows, verdicts, strict=True):
        parts.setdefault(row["part"], []).append((row, verdict))
    return parts


@pytest.mark.parametrize("part", ["developed_on", "held_out"])
def test_verdicts(judged: dict[str, list[tuple[dict[str, Any], bool]]], part: str) -> None:
    wrong = [(row, verdict) for row, verdict in judged[part] if verdict != row["equal"]]
    accepted = [row for row, verdict in wrong if verdict]
    assert len(judged[part]) > 300
    assert len(wrong) <= 0.05 * len(judged[part]), wrong
    assert len(accepted) <= 0.01 * len(judged[part]), accepted  # a wrong answer that is rewarded is what a policy learns


def test_known_errors_of_the_published_code(judged: dict[str, list[tuple[dict[str, Any], bool]]]) -> None:
    verdicts = {(row["given"], row["truth"]): verdict for row, verdict in judged["developed_on"]}
    verdicts |= {(row["given"], row["truth"]): verdict for row, verdict in judged["held_out"]}
    assert verdicts["1000", "1,000"] and verdicts["1,000", "1000"] and not verdicts["10,000", "1,000"]
    assert verdicts["(12,3)", "(12,3)"] and not verdicts["(1,23)", "(12,3)"] and not verdicts["(12,3)", "(1,23)"]
    assert verdicts["5 kg", "5 kg"] and not verdicts["5 kg", "5 cm"] and not verdicts["5 cm", "5 kg"]
