"""Two evaluations compared: hand-worked numbers, what is refused, what is printed and written."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.evaluations import sample

from prism_nemo import cli
from prism_nemo.errors import PrismError
from prism_nemo.evaluation.compare import EvaluatedRecord, compare, read_run, sign_test


def records(*correct: float | None, answer: str = "1") -> dict[str, EvaluatedRecord]:
    """r0, r1, …: one response each."""
    return {f"r{n}": EvaluatedRecord(answer, (sample(correct=value),)) for n, value in enumerate(correct)}


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (5, 1), (3, 3), (2, 7)])
def test_the_sign_test_is_the_share_of_splits_at_least_as_uneven(better: int, worse: int) -> None:
    total = better + worse
    splits = [sum(signs) for signs in itertools.product((0, 1), repeat=total)]
    uneven = sum(abs(2 * split - total) >= abs(better - worse) for split in splits)
    assert sign_test(better, worse) == pytest.approx(uneven / len(splits))


def test_the_sign_test_of_many_records() -> None:
    assert sign_test(5, 1) == 14 / 64
    assert 0 < sign_test(600, 400) < 1e-9
    assert sign_test(5000, 0) == 0.0  # below what a float can hold


def test_differences_and_flips_by_hand() -> None:
    found = compare(records(0, 0, 1, 1, 1), records(1, 1, 0, 1, 1))
    accuracy = found.figures["accuracy"]
    assert (accuracy.a, accuracy.b, accuracy.difference) == pytest.approx((0.6, 0.8, 0.2))
    assert accuracy.low < 0.2 < accuracy.high
    assert (found.better, found.worse) == (["r0", "r1"], ["r2"])
    assert found.p_value == 1.0
    assert (found.records, found.only_in_a, found.only_in_b) == (5, 0, 0)


def test_the_interval_is_of_pairs() -> None:
    """B is better on every tenth record and the same on the others: the records' own spread does not widen it."""
    a = [float(n % 2) for n in range(200)]
    b = [1.0 if n % 10 == 0 else value for n, value in enumerate(a)]
    found = compare(records(*a), records(*b)).figures["accuracy"]
    assert found.difference == pytest.approx(0.1)
    assert found.low > 0.05  # unpaired, 0.1 +- 0.14
    assert compare(records(*a), records(*b)).figures["accuracy"] == found


def test_a_run_against_itself() -> None:
    found = compare(records(0, 1), records(0, 1))
    assert found.better == found.worse == []
    assert (found.figures["accuracy"].difference, found.figures["accuracy"].low, found.figures["accuracy"].high) == (0, 0, 0)
    assert found.p_value == 1.0


def test_several_responses_count_by_their_share() -> None:
    a = {"r": EvaluatedRecord("1", (sample(correct=1), sample(correct=0)))}
    b = {"r": EvaluatedRecord("1", (sample(correct=1), sample(correct=1), sample(correct=1), sample(correct=0)))}
    found = compare(a, b)
    assert found.better == ["r"] and found.figures["accuracy"].difference == 0.25


def test_what_is_not_graded_in_both_is_left_out_of_accuracy() -> None:
    found = compare(records(None, 1, 0), records(1, None, 1))
    assert found.figures["accuracy"].records == 1 and found.better == ["r2"]
    assert found.figures["format_rate"].records == 3
    nothing = compare(records(None), records(None))
    assert nothing.p_value is None and "accuracy" not in nothing.figures


def test_different_records_are_refused_unless_told() -> None:
    a, b = records(1, 0), records(0, 0, 1)
    with pytest.raises(PrismError, match=r"2 in common, 0 only in A, 1 only in B \(r2\)") as caught:
        compare(a, b)
    assert "--common" in str(caught.value)
    found = compare(a, b, common=True)
    assert (found.records, found.only_in_b, found.worse) == (2, 1, ["r0"])
    with pytest.raises(PrismError, match="0 in common"):
        compare(a, {"x": a["r0"]}, common=True)


def test_other_truths_are_refused() -> None:
    with pytest.raises(PrismError, match="1 records have another verified answer in B: r0"):
        compare(records(1), records(1, answer="2"))


# The command


def write_run(folder: Path, *correct: int, decodings: tuple[str, ...] = ("sampled",), **fields: Any) -> Path:
    folder.mkdir()
    rows = [
        {
            "step": 1,
            "decoding": decoding,
            "id": f"record [{n}]",
            "response": "…",
            "answer": "1",
            "extracted": "1" if value else None,
            "correct": float(value),
            "reward": float(value),
            "caption_correct": None,
            "caption_f1": None,
            "valid": bool(value),
            "tokens": 7,
            "truncated": False,
            "vote": 0,
            **fields,
        }
        for decoding in decodings
        for n, value in enumerate(correct)
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "evaluation.json").write_text(json.dumps({"num_prompts": len(correct)}))
    return folder


def test_the_command_prints_a_table_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = write_run(tmp_path / "a", 0, 1, 0), write_run(tmp_path / "b", 1, 0, 1)
    assert cli.main(["compare", str(a), str(b), "--json", str(tmp_path / "found.json")]) == 0
    shown = capsys.readouterr().out
    assert "accuracy" in shown and "+0.3333" in shown
    assert "better 2, worse 1; exact sign test p = 1" in shown
    assert "better: record [0], record [2]" in shown
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["better"] == ["record [0]", "record [2]"] and found["worse"] == ["record [1]"]
    assert found["figures"]["accuracy"]["difference"] == pytest.approx(1 / 3)
    assert found["runs"] == {"A": str(a), "B": str(b)}
    assert cli.main(["compare", str(a), str(b), "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out) == found


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: (run / "evaluation.json").unlink(), "no finished evaluation is here"),
        (lambda run: (run / "samples.jsonl").write_text(""), "there are no sampled responses"),
        (lambda run: (run / "evaluation.json").write_text('{"num_prompts": 3}'), "3 records have 2 different ids"),
        (lambda run: (run / "samples.jsonl").write_text('{"decoding": "sampled", "id": "a"}\n'), "by an earlier release"),
    ],
)
def test_what_cannot_be_compared_is_said(break_it: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a", 0, 1)
    break_it(run)
    assert cli.main(["compare", str(run), str(run)]) == 2
    assert message in capsys.readouterr().err


def test_the_other_way_of_decoding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a", 0, 1, decodings=("sampled", "greedy"))
    assert len(read_run(run, "greedy")) == 2
    assert cli.main(["compare", str(run), str(run), "--decoding", "beam"]) == 2
    assert "invalid choice" in capsys.readouterr().err
    (run / "samples.jsonl").write_text((run / "samples.jsonl").read_text().replace('"greedy"', '"other"'))
    with pytest.raises(PrismError, match="there are no greedy responses") as caught:
        read_run(run, "greedy")
    assert "other, sampled" in str(caught.value)


def test_comparing_needs_no_torch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a", 0, 1)
    code = f"import sys; from prism_nemo import cli; assert cli.main(['compare', {str(run)!r}, {str(run)!r}]) == 0"
    code += "; sys.exit(any(name in sys.modules for name in ('torch', 'megatron', 'transformers')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert cli.main(["compare", "--help"]) == 0
    assert "RUN_A RUN_B" in capsys.readouterr().out
