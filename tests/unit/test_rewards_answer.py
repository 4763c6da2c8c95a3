"""The exact answer, both ways: what is the same answer, and what only looks like it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from prism_nemo.errors import DataError
from prism_nemo.rewards.answer import MAX_ANSWER_CHARACTERS, answers_match, check_truth
from prism_nemo.rewards.names import is_asked_for

GOLDEN = Path(__file__).parents[1] / "golden" / "answers.jsonl"

SAME = [
    # form
    ("42", "42"),
    (" 42 \n", "42"),
    ("42.", "42"),
    ("$42$", "42"),
    ("$$42$$", "42"),
    (r"\(42\)", "42"),
    (r"\[ 42 \]", "42"),
    (r"\boxed{42}", "42"),
    (r"$\boxed{42}$.", "42"),
    (r"\boxed{\text{Yes}}", "yes"),
    (r"\boxed{\frac{1}{2}}", "0.5"),
    ("**42**", "42"),
    ("$5", "5"),
    (r"\$5", "5"),
    ("(5)", "5"),
    # numbers
    ("1000", "1,000"),
    ("1,234,567.5", "1234567.50"),
    (r"1{,}000", "1000"),
    ("007", "7"),
    ("+3", "3"),
    ("-5", "\u22125"),
    ("- 5", "-5"),
    ("0", "-0"),
    (".5", "0.5"),
    ("1/2", "0.5"),
    ("0.33333333333333333333", "1/3"),
    ("1/3", "0.33"),
    ("3.1416", "3.14"),
    ("2/4", "1 / 2"),
    (r"\frac{1}{2}", "0.50"),
    (r"\dfrac12", "0.5"),
    (r"-\frac{3}{4}", "-0.75"),
    (r"\frac{-3}{4}", "-0.75"),
    ("1 1/2", "1.5"),
    (r"1\frac{1}{2}", "3/2"),
    ("1e3", "1000"),
    ("1E-3", "0.001"),
    (r"1.5 \times 10^{-3}", "0.0015"),
    ("1.5\u00d710^3", "1500"),
    # a percentage is its value
    ("50%", "50 %"),
    ("50%", "0.5"),
    (r"50\%", "1/2"),
    ("50 percent", "50%"),
    ("50%", "50"),
    # units; they may be missing on one side
    ("5 kg", "5kg"),
    ("5 kg", "5"),
    ("90 degrees", "90"),
    ("5 kg", "5000 g"),
    ("5.0 kg", "5 kg"),
    (r"5\text{ kg}", "5 kg"),
    (r"$5\,\mathrm{kg}$", "5 kg"),
    ("5 Apples", "5 apples"),
    ("5 m\u00b2", "5 m^{2}"),
    ("60 km / h", "60 km/h"),
    ("1,000 kg", "1000 kg"),
    ("90\u00b0", r"90^\circ"),
    ("90 degrees", r"90^{\circ}"),
    # tuples, intervals, lists
    ("(1,23)", "(1, 23)"),
    ("(1,234)", "(1, 234)"),
    (r"\left(1, \frac{1}{2}\right)", "(1, 0.5)"),
    ("[1,2)", "[1, 2.0)"),
    ("1, 2,3", "1,2,3"),
    ("x, 1,000", "x, 1000"),
    ("(1,2)", "1,2"),
    ("((1,2),3)", "( (1, 2), 3 )"),
    (r"\{1,2\}", "{1, 2}"),
    ("Paris,  France", "paris, france"),
    # choices
    ("B", "(B)"),
    ("b", "B"),
    ("B.", "B"),
    ("B)", "B"),
    ("(b).", "B"),
    (r"\text{B}", "B"),
    ("B. Paris", "B"),
    ("B: Paris", "B"),
    ("(B) Paris", "B"),
    ("Option B", "B"),
    ("choice (B)", "B"),
    ("B", "B. Paris"),
    ("Paris", "B. Paris"),
    ("B) paris", "B. Paris"),
    ("B. 1,000", "B. 1000"),
    ("A, C", "a, c"),
    # text
    ("Yes", "yes"),
    ("the  red\ncar.", "The red car"),
    ("x^2 + 1", "x^2+1"),
    (r"2\sqrt{3}", r"2 \sqrt{3}"),
    ("2x + 1", "2x+1"),
    ("x = 5", "x=5"),
]

DIFFERENT = [
    ("12", "21"),
    ("5", "-5"),
    ("1", "1.0001"),
    ("0.333", "1/3"),
    ("10000000000000000000000", "10000000000000000000001"),
    ("5", "55"),
    ("5 5", "55"),
    ("5 or 6", "5"),
    ("5, 6", "5"),
    ("5 or 6", "6"),
    # a comma in the wrong place groups nothing
    ("(1,23)", "(12,3)"),
    ("1,23", "12,3"),
    ("1,23", "123"),
    ("10,00", "1000"),
    ("100,0000", "1000000"),
    ("0,123", "123"),
    ("1,2345", "12345"),
    ("(1,234)", "(1234)"),
    ("1.2.3", "1.23"),
    ("5\u00b2", "52"),
    ("1/0", "2/0"),
    ("0/0", "0"),
    # percentages and units
    ("50%", "5%"),
    ("5 kg", "5 cm"),
    ("5 kg", "6 kg"),
    ("5 mW", "5 MW"),
    ("5 m", "5 m^2"),
    # tuples
    ("(1,2)", "[1,2]"),
    ("(1,2)", "(2,1)"),
    ("1,2", "(1,2)"),
    ("(1,2)", "(1,2,3)"),
    ("[1,2)", "[1,2]"),
    ("((1,2),3)", "(1,(2,3))"),
    # choices
    ("A", "B"),
    ("B. London", "B. Paris"),
    ("A. Paris", "B. Paris"),
    ("London", "B. Paris"),
    ("Paris", "B"),
    ("A or B", "A"),
    ("(A) or (B)", "A"),
    ("(A), (B)", "A"),
    ("A, B", "A"),
    ("A B C D", "A"),
    ("a dog", "A"),
    ("AB", "A"),
    # text
    ("yes", "no"),
    ("yes", "yes and no"),
    (r"\Delta", r"\delta"),
    ("x^2", "X^2"),
    (r"2\sqrt{3}", r"3\sqrt{2}"),
]


@pytest.mark.parametrize(("given", "truth"), SAME)
def test_same(given: str, truth: str) -> None:
    assert answers_match(given, truth)
    assert answers_match(truth, truth)


@pytest.mark.parametrize(("given", "truth"), DIFFERENT)
def test_different(given: str, truth: str) -> None:
    assert not answers_match(given, truth)


def test_what_is_not_symmetric() -> None:
    """A tuple's brackets are asked for only where the truth has them; a truth may be rounded, an answer must not be."""
    asymmetric = [("1/3", "0.33"), ("3.1416", "3.14"), ("(1,2)", "1,2")]
    assert [(given, truth) for given, truth in SAME if not answers_match(truth, given)] == asymmetric


@pytest.mark.parametrize("given", ["", " ", ".", "$$", r"\boxed{}", "x" * (MAX_ANSWER_CHARACTERS + 1)])
def test_empty_and_overlong_answers_match_nothing(given: str) -> None:
    assert not answers_match(given, "5")
    assert not answers_match(given, "x" * MAX_ANSWER_CHARACTERS)


@pytest.mark.parametrize(("truth", "what"), [("", "empty"), (" .", "empty"), ("$$", "empty"), ("x" * 1001, "too long")])
def test_a_truth_that_cannot_be_compared_is_an_error(truth: str, what: str) -> None:
    for compare in (check_truth, lambda text: answers_match("5", text)):
        with pytest.raises(DataError, match=what):
            compare(truth)


HOSTILE = [
    "(" * 1000,
    "(" * 500 + ")" * 500,
    "(" * 499 + "1,2" + ")" * 498,
    "(" * 331 + "1" + ",1)" * 222,
    "[1," * 333,
    "9" * 1000,
    "1," * 500,
    "1" * 500 + "/" + "1" * 499,
    "1e999",
    "9^" * 500,
    r"9^{9^{9^{9}}}",
    r"\frac{1}{" * 110,
    r"\text{" * 160,
    r"\boxed{" * 140,
    "A. " * 333,
    "1 " * 500,
    "**" * 500,
    "$" * 1000,
    "-" * 1000,
    " ," * 500,
    "x = " * 250,
    "=\u2248" * 500,
    r"\boxed{=" * 125,
    r"\boxed{1}" * 110,
    "the answer =" * 80,
    "A. and " * 140,
    "yes, wait, " * 90,
    "~~" * 500,
    "\u0661\u0662",  # digits of another script
    "\x00\ud800",
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_answers_are_compared_in_no_time(hostile: str) -> None:
    start = time.perf_counter()
    for truth in ("5", "B", "(1,2)", "x^2", "Paris"):
        assert not answers_match(hostile, truth)
    assert time.perf_counter() - start < 0.5  # milliseconds


def test_an_answer_is_itself() -> None:
    """Whatever a data set's answer looks like, a model that writes just that is right, boxed or not."""
    truths = {json.loads(line)["truth"] for line in GOLDEN.read_text().splitlines()}
    assert [truth for truth in truths if not answers_match(truth, truth)] == []
    assert [truth for truth in truths if not answers_match(rf"\boxed{{{truth}}}", truth)] == []


def test_what_has_a_value_that_questions_ask_for() -> None:
    asked = [
        "x",
        "AB",
        "\u2220A",
        r"\overline{AB}",
        "f(3)",
        "f^{-1}(2)",
        "P(A)",
        r"\sin A",
        "x + y",
        "m+n",
        r"\frac{a}{b}",
        "Area of ABC",
        "|AB|",
    ]
    unsolved = [
        "3x",
        "x^2",
        "-x",
        "1/x",
        r"\sqrt{x}",
        "ln x",
        "x + x",
        "x/2",
        "|x|",
        "2",
        "not x",
        "twice x",
        "\u03c0",
        "",
        "x +",
    ]
    assert [text for text in asked if not is_asked_for(text)] == []
    assert [text for text in unsolved if is_asked_for(text)] == []
