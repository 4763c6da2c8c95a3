"""Whether two answers say the same: quantities, expressions, intervals, tuples, sets, parts, text."""

from __future__ import annotations

import re
from collections.abc import Callable

from prism_nemo.rewards.names import is_asked_for, is_name
from prism_nemo.rewards.quantity import parse_quantity, same_quantity
from prism_nemo.rewards.question import AnswerKind
from prism_nemo.rewards.structure import (
    parse_intervals,
    parse_structure,
    same_intervals,
    same_structure,
    variable_of,
    without_parentheses,
)
from prism_nemo.rewards.text import compact, listed, same_words
from prism_nemo.rewards.units import Unit, conversion, known_unit

SameExpression = Callable[[str, str], bool]
"""(given, truth), in normal form and without units, to whether they are the same by algebra."""

_MAX_DEPTH = 8  # of structures in structures
_MAX_CHAIN = 12  # of equals signs
_MAX_EXPRESSION = 300  # characters; longer ones are no answers
_FUNCTIONS = listed(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp sqrt frac binom mod min max gcd lcm pi vec hat bar"
    " det overline begin end pmatrix bmatrix matrix array left right"
)
_WORD = re.compile(r"\\?[A-Za-z]+")
_OPERATOR = re.compile(r"[\\^_+*/=<>≤≥×·÷π√|!∞-]|\d")
_UNFINISHED = re.compile(r"[\d\s.,()+×·*-]*\d\s*[)\]]*\s*[+×·*-]\s*[(\[]*\s*[\d.][\d\s.,()+×·*-]*")
_RATIO = re.compile(r"(\d+(?:\.\d+)?)\s*(?::|\bto\b)\s*(\d+(?:\.\d+)?)")
_TIME = re.compile(r"0?(\d{1,2}):([0-5]\d)(?:\s*([ap])\.?\s*m\.?)?", re.IGNORECASE)
_RELATION = re.compile(r"[<>≤≥]")
_FORMULA = re.compile(r"(?=.*\d)(?:[A-Z][a-z]?\d*){2,}")  # H2O, no product
_EQUALS = re.compile(r"\s*(?<![<>=!])[=≈](?!=)\s*")
_TRAILING_UNIT = re.compile(r"(?P<body>.*[\dπ)}\]])(?P<unit>(?:\s+[^\d\s].*|[°Ω].*|(?<=[})])[A-Za-z]{2}.*))")
_TRIGONOMETRY = re.compile(r"(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_TWO_LETTER_WORDS = listed("no on am is it in of or at to do go we he me my by up us so as an if be")
_SUBSCRIPT = re.compile(r"(?<=[^\W\d_])_\{?(\w+)\}?")
_INFINITE = re.compile(r"\+\s*∞")


def no_algebra(given: str, truth: str) -> bool:
    return False


class Content:
    """Compares answers in normal form, the given with the true one; `kind` says what the truth is where that is known."""

    def __init__(self, kind: AnswerKind | None, same_expression: SameExpression) -> None:
        self._kind = kind
        self._same_expression = same_expression

    def same(self, given: str, truth: str, depth: int = 0) -> bool:
        given, truth = without_parentheses(given), without_parentheses(truth)
        if given == truth:
            return True
        if depth > _MAX_DEPTH or not given or not truth:
            return False
        written, wanted = parse_quantity(given), parse_quantity(truth)
        if written is not None and wanted is not None:
            return same_quantity(written, wanted)
        if _same_ratio(given, truth):
            return True
        verdict = self._same_intervals(given, truth, depth)
        if verdict is None:
            verdict = self._same_structure(given, truth, depth)
        if verdict is None:
            verdict = self._same_one(given, truth, depth)
        return verdict

    def _same_intervals(self, given: str, truth: str, depth: int) -> bool | None:
        """None where one of them is no interval, or both may be points."""
        wanted, written = parse_intervals(truth), parse_intervals(given)
        if wanted is not None and written is None and _is_solved(truth) and _RELATION.search(given):
            return False  # `2x > 6` is not solved
        if wanted is None or written is None:
            return None
        variables = {name for name in map(variable_of, (given, truth)) if name}
        return len(variables) < 2 and same_intervals(written, wanted, lambda a, b: self._same_end(a, b, depth))

    def _same_end(self, given: str, truth: str, depth: int) -> bool:
        return self.same(_INFINITE.sub("∞", given), _INFINITE.sub("∞", truth), depth + 1)

    def _same_structure(self, given: str, truth: str, depth: int) -> bool | None:
        """None where the truth is one thing, or the given is and may still say the same."""
        wanted, written = parse_structure(truth), parse_structure(given)
        if wanted is None and written is not None and len(written.elements) > 1:
            return False  # several for one
        if wanted is None or written is None:
            return None
        unordered = self._kind is AnswerKind.SET
        return same_structure(written, wanted, lambda a, b: self.same(a, b, depth + 1), unordered=unordered)

    def _same_one(self, given: str, truth: str, depth: int) -> bool:
        verdict = self._same_equation(given, truth, depth)
        if verdict is not None:
            return verdict
        given_body, given_unit = _split_unit(given)
        truth_body, truth_unit = _split_unit(truth)
        if (given_body, truth_body) != (given, truth):
            return conversion(given_unit, truth_unit) == 1 and self.same(given_body, truth_body, depth + 1)
        if _is_mathematical(given) and _is_mathematical(truth):
            return _bare(given) == _bare(truth) or (self._may_be_same(given, truth) and self._same_expression(given, truth))
        return parse_quantity(truth) is None and same_words(given, truth)

    def _same_equation(self, given: str, truth: str, depth: int) -> bool | None:
        """`x = 5` for `5`, `5` for `x = 5`, chains of equal values; None where both are equations or neither is."""
        written, wanted = (_name_first(_EQUALS.split(text)) for text in (given, truth))
        if len(written) == len(wanted) == 1 or not all((*written, *wanted)):
            return None
        if len(written) > _MAX_CHAIN:
            return False
        if len(wanted) == 1:
            return self._same_chain(written, truth, depth)
        named = len(wanted) == 2 and is_name(wanted[0])
        if len(written) == 1:
            return named and self.same(given, wanted[1], depth + 1)
        if named and compact(written[0]) == compact(wanted[0]):
            return self._same_chain(written, wanted[1], depth)
        return False if named and not _variables(wanted[1]) else None  # `3x = 12` is not solved

    def _same_chain(self, parts: list[str], truth: str, depth: int) -> bool:
        """One is the answer and all say the same: `x = 2 + 3 = 5`, `1/3 ≈ 0.33`. Behind a name, formulas may lead to it."""
        named = is_asked_for(parts[0]) and not any(parts[0] in _variables(part) for part in parts[1:])  # not x = 2x + 1
        values = parts[1:] if named else parts
        if not any(self.same(value, truth, depth + 1) for value in values):
            return False
        formulas = named and not _is_formula(truth)
        return all((formulas and _is_formula(value)) or self._agrees(value, truth, depth) for value in values)

    def _agrees(self, value: str, truth: str, depth: int) -> bool:
        """Whether it is the truth, its rounding, or work that comes to it."""
        if self.same(value, truth, depth + 1) or self.same(truth, value, depth + 1):
            return True
        (work, unit), (result, true_unit) = _split_unit(value), _split_unit(truth)
        if "°" in value + truth:  # algebra knows degrees
            work, result = value, truth
        elif conversion(unit, true_unit) != 1:
            return False
        short = max(len(work), len(result)) <= _MAX_EXPRESSION
        return short and _is_mathematical(work) and _is_mathematical(result) and self._same_expression(work, result)

    def _may_be_same(self, given: str, truth: str) -> bool:
        """Whether it is worth asking. An answer that leaves sums and products of numbers to the reader is none."""
        if max(len(given), len(truth)) > _MAX_EXPRESSION or _UNFINISHED.fullmatch(truth):  # a range, a date
            return False
        if _TIME.fullmatch(truth) or _FORMULA.fullmatch(_bare(truth)):
            return False
        if parse_quantity(truth) is not None:
            return not _UNFINISHED.fullmatch(given) and not (_variables(given) - {"e", "i"})
        if parse_quantity(given) is not None:
            return not (_variables(truth) - {"e", "i"})
        return True


def _same_ratio(given: str, truth: str) -> bool:
    """`3:4`, `3 to 4` and `6:8`; times of day only as they are, with or without am and pm."""
    wanted_time, written_time = _TIME.fullmatch(truth), _TIME.fullmatch(given)
    if wanted_time is not None and written_time is not None:
        halves = {half.casefold() for half in (wanted_time[3], written_time[3]) if half}
        if wanted_time.group(1, 2) == written_time.group(1, 2):
            return len(halves) < 2
        return False
    wanted, written = _RATIO.fullmatch(truth), _RATIO.fullmatch(given)
    if wanted is None or written is None or wanted_time is not None:
        return False
    return float(wanted[1]) * float(written[2]) == float(wanted[2]) * float(written[1])


def _name_first(parts: list[str]) -> list[str]:
    """`5 = x` as `x = 5`."""
    return parts[::-1] if len(parts) == 2 and is_name(parts[1]) and not is_name(parts[0]) else parts


def _is_solved(inequality: str) -> bool:
    """Whether it bounds one variable by numbers."""
    return variable_of(inequality) is not None and len(_variables(inequality)) == 1


def _is_formula(text: str) -> bool:
    return parse_quantity(text) is None and bool(_variables(_split_unit(text)[0]))


def _bare(text: str) -> str:
    """Without white space; `x_1` and `x1` are the same."""
    return _SUBSCRIPT.sub(r"\1", compact(text))


def _split_unit(text: str) -> tuple[str, Unit]:
    """An expression and the known unit behind it; no noun, which might belong to a text."""
    found = None if _TRIGONOMETRY.search(text) else _TRAILING_UNIT.fullmatch(text)  # of sin 30°, the degrees are a part
    unit = known_unit(found["unit"].strip()) if found else None
    return (text, Unit()) if found is None or unit is None else (found["body"].strip(), unit)


def _is_mathematical(text: str) -> bool:
    """An expression, and no text: operators or digits or a single letter or two, no words but names of functions."""
    words = [word.lstrip("\\") for word in _WORD.findall(text)]
    long_words = [word for word in words if len(word) > 2 and word not in _FUNCTIONS]
    return not long_words and text.casefold() not in _TWO_LETTER_WORDS and (bool(_OPERATOR.search(text)) or len(text) <= 2)


def _variables(text: str) -> set[str]:
    """Letters that stand for something that is not a number."""
    found: set[str] = set()
    for word in _WORD.findall(text):
        if not word.startswith("\\") and word not in _FUNCTIONS:
            found.update(word)
    return found
