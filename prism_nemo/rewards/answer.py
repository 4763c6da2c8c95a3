"""Whether a given answer is the verified one, up to the ways of writing it.

Exact: two numbers match when they are the same rational number and carry the same unit, never because they are close; what
the rules below cannot show to be the same does not match. The comparison is a pure function of the two texts, in bounded time.

* Form: white space, LaTeX spacing, `$`, `\\(…\\)`, `\\text{…}`, `\\left` and `\\right`, a surrounding `\\boxed{…}` or `**…**`,
  and periods at the end do not matter. `$` never matters, so it says no currency.
* Numbers: `1000` = `1,000` (a comma between digits groups thousands only where it stands right), `1 1/2` = `1.5`,
  `0.5` = `.5` = `1/2` = `\\frac{1}{2}`, `1e3` = `1 \\times 10^3` = `1000`. `0.333` is not `1/3`.
* A percentage is its value: `50%` = `0.5`, and neither is `50`.
* Units: both sides carry the same unit, or none. `5 kg` is neither `5 cm` nor `5`. Symbols keep their case (`mW`, `MW`), words
  do not.
* Tuples, intervals and lists match element by element, in order, in the same brackets. Inside brackets a comma always separates:
  `(1,23)` is not `(12,3)`, and `(1,234)` is a pair.
* Choices A to J: `B` = `(b)` = `B.` = `B) text` = `option B`. Where the truth is `B. text`, `text` alone matches too, and another
  text does not. `(A) or (B)` chooses nothing.
* Other text matches without regard to case; text with LaTeX or operators matches with regard to case and without spaces.

Expressions are not simplified (`2\\sqrt{3}` is not `\\sqrt{12}`): a computer algebra system may take seconds on a short hostile
answer, and a time limit would make the reward depend on the machine's load.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from prism_nemo.errors import DataError
from prism_nemo.rewards.question import AnswerKind, Question

__all__ = ["MAX_ANSWER_CHARACTERS", "AnswerKind", "Question", "answers_match", "check_truth", "decide", "decide_by_rules"]

SameExpression = Callable[[str, str], bool]

MAX_ANSWER_CHARACTERS = 1000
"""Longer answers match nothing; a longer truth is an error."""

_MAX_PARENTHESES = 8  # around one thing, taken off

_CHARACTERS = str.maketrans({"\u2212": "-", "\u2013": "-", "\u00b2": "^2", "\u00b3": "^3", "~": " "})
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\?\$|\\[()\[\]!]|\\(?:left|right)(?![A-Za-z])", ""),
        (r"\\[,;: ]|\\q?quad(?![A-Za-z])", " "),
        (r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1"),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![A-Za-z])", "\u00b0"),
        (r"\^\{(\w)\}", r"^\1"),
        (r"\{,\}", ","),
        (r"\\([%{}])", r"\1"),
    )
)

_DECIMAL = r"(?:(?:[1-9][0-9]{0,2}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
_TEN_TO = r"\s*(?:\\times|\\cdot|[×·*x])\s*10\^(?:\{(?P<braced>-?[0-9]{1,3})\}|(?P<plain>-?[0-9]{1,3}))"
_FRACTION_COMMAND = re.compile(rf"\\frac\{{\s*(-?{_DECIMAL})\s*\}}\s*\{{\s*({_DECIMAL})\s*\}}|\\frac\s*([0-9])([0-9])")
_QUANTITY = re.compile(
    rf"""
    (?P<sign>[+-]?)\s*
    (?: (?P<whole>[0-9]+)\s+(?P<top>[0-9]+)\s*/\s*(?P<bottom>[0-9]+)
      | (?P<numerator>-?{_DECIMAL})\s*/\s*(?P<denominator>{_DECIMAL})
      | (?P<decimal>{_DECIMAL})(?:[eE](?P<e>[+-]?[0-9]{{1,3}})|{_TEN_TO})?
    )
    \s*(?P<unit>(?:[^\W\d_]|[%°'"′″€£¥])[^,]*)?
    """,
    re.VERBOSE,
)
_CHOICE = re.compile(
    r"(?:(?i:option|choice)\s+)?(?:\((?P<inside>[A-Ja-j])\)[.:]?|(?P<bare>[A-Ja-j])(?P<delimiter>[.:)])?)"
    r"(?:\s+(?!(?i:and|or)\b)(?P<text>[^&/|,].*))?"
)
_EXPRESSION = re.compile(r"[\\^_=+*<>]")


def answers_match(given: str, truth: str) -> bool:
    """Whether `given`, a model's answer, is `truth`, the verified one. An empty or overlong `given` never is.

    Raises DataError where `check_truth` does.
    """
    wanted = check_truth(truth)
    written = _normalize(given) if len(given) <= MAX_ANSWER_CHARACTERS else ""
    return bool(written) and _match(written, wanted)


def check_truth(truth: str) -> str:
    """The verified answer in the form in which answers are compared.

    Raises DataError when nothing is left of it in that form (it is empty, or `.` or `$` alone), or when it is longer than
    MAX_ANSWER_CHARACTERS: stages ask when they read a record, so that a run does not find out by its first valid response.
    """
    fits = len(truth) <= MAX_ANSWER_CHARACTERS
    wanted = _normalize(truth) if fits else ""
    if not wanted:
        problem = "empty" if fits else "too long to be compared"
        raise DataError(
            f"the verified answer is {problem}: {truth[:100]!r}",
            remedy=f"give every record an answer of 1 to {MAX_ANSWER_CHARACTERS} characters",
        )
    return wanted


def decide(question: Question, same_expression: SameExpression) -> bool:
    """Whether the answer is right, asking `same_expression` where algebra must tell. Raises DataError as `check_truth` does."""
    truths = (question.truth, *question.equivalent_answers)
    return any(answers_match(question.given, truth) or same_expression(question.given, truth) for truth in truths)


def decide_by_rules(question: Question) -> bool | None:
    """The same without algebra: None where it must tell."""
    if any(answers_match(question.given, truth) for truth in (question.truth, *question.equivalent_answers)):
        return True
    return None if _EXPRESSION.search(question.truth) else False


@dataclass(frozen=True)
class _Choice:
    letter: str  # upper case
    text: str  # what stands behind the letter, or nothing


@dataclass(frozen=True)
class _Quantity:
    value: Fraction
    unit: str


def _match(given: str, truth: str) -> bool:
    wanted, written = _choice(truth), _choice(given)
    if wanted is None:
        return _match_content(given, truth)
    if written is None:
        return bool(wanted.text) and _match_content(given, wanted.text)
    same_text = not (wanted.text and written.text) or _match_content(written.text, wanted.text)
    return written.letter == wanted.letter and same_text


def _match_content(given: str, truth: str) -> bool:
    given, truth = _without_parentheses(given), _without_parentheses(truth)
    written, wanted = _quantity(given), _quantity(truth)
    if written is not None and wanted is not None:
        return written == wanted
    given_elements, truth_elements = _elements(given), _elements(truth)
    if given_elements is None or truth_elements is None:
        return _folded(given) == _folded(truth)
    if given_elements[0] != truth_elements[0] or len(given_elements[1]) != len(truth_elements[1]):
        return False
    return all(_match_content(one, other) for one, other in zip(given_elements[1], truth_elements[1], strict=True))


def _normalize(text: str) -> str:
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = " ".join(text.split())
    while True:
        bare = text.rstrip(". ")
        if bare.startswith(r"\boxed{") and _closing(bare, len(r"\boxed")) == len(bare) - 1:
            bare = bare[len(r"\boxed{") : -1].strip()
        if len(bare) > 4 and bare.startswith("**") and bare.endswith("**") and bare.count("**") == 2:
            bare = bare[2:-2].strip()
        if bare == text:
            return text
        text = bare


def _choice(text: str) -> _Choice | None:
    found = _CHOICE.fullmatch(text)
    if found is None or (found["text"] and found["bare"] and not found["delimiter"]):  # "a dog" is no choice
        return None
    return _Choice(letter=(found["inside"] or found["bare"]).upper(), text=found["text"] or "")


def _quantity(text: str) -> _Quantity | None:
    """A number with its unit, or None."""
    spelled = _FRACTION_COMMAND.sub(lambda found: f" {found[1] or found[3]}/{found[2] or found[4]}", text).strip()
    found = _QUANTITY.fullmatch(spelled)
    if found is None:
        return None
    if found["decimal"]:
        exponent = int(found["e"] or found["braced"] or found["plain"] or 0)
        value = _fraction(found["decimal"]) * Fraction(10) ** exponent
    else:
        top, bottom = _fraction(found["top"] or found["numerator"]), _fraction(found["bottom"] or found["denominator"])
        if bottom == 0:
            return None
        value = _fraction(found["whole"] or "0") + top / bottom
    unit = "".join((found["unit"] or "").split())
    if unit.isalpha() and len(unit) > 3:
        unit = unit.casefold()
    if unit in ("%", "percent"):
        value, unit = value / 100, ""
    elif unit in ("degree", "degrees"):
        unit = "\u00b0"
    return _Quantity(value=-value if found["sign"] == "-" else value, unit=unit)


def _fraction(decimal: str) -> Fraction:
    return Fraction(decimal.replace(",", ""))


def _elements(text: str) -> tuple[str, list[str]] | None:
    """Brackets and elements of a tuple, interval or set; no brackets and the elements of a bare list; None for anything else."""
    if text and text[0] in "([{" and _closing(text, 0) == len(text) - 1:
        return text[0] + text[-1], _split(text[1:-1])
    parts = []
    for part in _split(text, ", "):
        parts.extend([part] if _quantity(part) else _split(part))  # "x, 1,000" has two elements, "1, 2,3" has three
    return ("", parts) if len(parts) > 1 else None


def _without_parentheses(text: str) -> str:
    for _ in range(_MAX_PARENTHESES):
        wrapped = len(text) > 2 and text[0] == "(" and text[-1] == ")" and _closing(text, 0) == len(text) - 1
        if not wrapped or len(_split(text[1:-1])) > 1:
            break
        text = text[1:-1].strip()
    return text


def _closing(text: str, opening: int) -> int:
    """The index of the bracket, of any kind, that closes the one at `opening`; -1 when none does."""
    depth = 0
    for index in range(opening, len(text)):
        depth += (text[index] in "([{") - (text[index] in ")]}")
        if depth == 0:
            return index
    return -1


def _split(text: str, separator: str = ",") -> list[str]:
    """The parts between separators that stand in no bracket, stripped."""
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if depth == 0 and text.startswith(separator, index):
            parts.append(text[start:index].strip())
            start = index + len(separator)
    parts.append(text[start:].strip())
    return parts


def _folded(text: str) -> str:
    return "".join(text.split()) if _EXPRESSION.search(text) else text.casefold()
