"""Numbers in the ways they are written, with their units, and when two of them are the same."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from prism_nemo.rewards.text import listed
from prism_nemo.rewards.units import Unit, conversion, parse_unit

LEAST_DIGITS = 4
"""Significant digits that a decimal must have to stand for an exact number that has no finite decimal (1/3, a root)."""

LARGEST_ROUNDING = Fraction(1, 100)
"""Relative. A truth that was rounded more than this is not taken for rounded."""

_DECIMAL = r"(?:(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?:[ ]\d{3})+(?![ ]?/)|\d+)(?:\.\d+)?|\.\d+)"
_TEN_TO = r"\s*[×·*xX]\s*10\s*\^\s*(?:\{(?P<braced>[+-]?\d{1,3})\}|(?P<plain>[+-]?\d{1,3}))"
_FRACTION_COMMAND = re.compile(rf"\\frac\{{\s*(-?{_DECIMAL})\s*\}}\s*\{{\s*(-?{_DECIMAL})\s*\}}|\\frac\s*(\d)\s*(\d)", re.ASCII)
_REPEATING = re.compile(r"(\d*)\.(\d*?)(?:\\(?:overline|bar|dot)\s*\{(\d+)\}|(\d)\4+…)", re.ASCII)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12, "lakh": 5, "crore": 7}
_SHORT_SCALES = {"mn": 6, "mln": 6, "bn": 9, "tn": 12}  # MN are meganewtons
_QUANTITY = re.compile(
    rf"""
    (?P<sign>[+-]?)\s*(?P<currency>[$€£¥₹]?)\s*(?P<inner_sign>[+-]?)
    (?: (?P<whole>\d+)\s+(?P<top>\d+)\s*/\s*(?P<bottom>\d+)
      | (?P<numerator>-?{_DECIMAL})\s*/\s*(?P<denominator>-?{_DECIMAL})
      | (?P<decimal>{_DECIMAL})(?:[eE](?P<e>[+-]?\d{{1,3}})|{_TEN_TO})?
    )
    (?P<scale>\s*(?:(?i:{"|".join(_SCALES)}|dozen)s?|{"|".join(_SHORT_SCALES)})(?![a-zA-Z]))?
    (?P<space>\s*)(?P<rest>[^\d\s].*)?
    """,
    re.VERBOSE | re.ASCII,
)
_TO_NINE = "zero one two three four five six seven eight nine"
_TEENS = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_WORDS = {
    **{word: number for number, word in enumerate(f"{_TO_NINE} {_TEENS}".split())},
    **{word: 20 + 10 * index for index, word in enumerate(_TENS.split())},
}
_NUMBER_WORDS = re.compile(
    r"(?:(?P<minus>minus|negative)\s+)?"
    rf"(?:(?:(?P<tens>{_TENS.replace(' ', '|')})[- ])?(?P<word>{'|'.join(_WORDS)})\b|(?=[\d.\\]))",
    re.IGNORECASE,
)
_PARTS = {word: 3 + index for index, word in enumerate(listed("third fourth fifth sixth seventh eighth ninth tenth"))}
_PARTS |= {"half": 2, "halve": 2, "quarter": 4, "hundredth": 100}
_PART = re.compile(rf"(-?\d+)[- ]({'|'.join(_PARTS)})s?", re.IGNORECASE)
_PERCENT = re.compile(r"(?i:%|per ?cent(?:age points?)?)(?P<noun>\s.*)?")


@dataclass(frozen=True)
class Quantity:
    """A rational number as it was written.

    decimals   places behind the point, for a plain decimal; None for a fraction, whose value is exact
    digits     significant ones of a plain decimal
    percent    it was followed by a percent sign; `value` is the number before it
    """

    value: Fraction
    decimals: int | None
    digits: int
    unit: Unit
    percent: bool = False


def parse_quantity(text: str) -> Quantity | None:
    """A number with its unit, in normal form; None for anything else."""
    spelled = _FRACTION_COMMAND.sub(lambda found: f" {found[1] or found[3]}/{found[2] or found[4]}", _digits(text)).strip()
    repeated = _REPEATING.match(spelled.lstrip("+-"))
    if repeated:
        sign = spelled[: len(spelled) - len(spelled.lstrip("+-"))]
        spelled = sign + _repeating_fraction(repeated) + spelled.lstrip("+-")[repeated.end() :]
    found = _QUANTITY.fullmatch(spelled)
    if found is None:
        return None
    read = _value(found)
    if read is None:
        return None
    value, decimals, digits = read
    if (found["sign"] == "-") != (found["inner_sign"] == "-"):
        value = -value
    rest = found["rest"] or ""
    percent = _PERCENT.fullmatch(rest)
    if percent:
        unit = parse_unit(percent["noun"] or "")
        return None if unit is None or found["currency"] else Quantity(value, decimals, digits, unit, percent=True)
    unit = parse_unit(found["currency"]) if found["currency"] else Unit()
    if rest:
        behind = parse_unit(rest, attached=not found["space"])
        if behind is None or (found["currency"] and conversion(unit or Unit(), behind) is None):
            return None
        unit = unit if found["currency"] else behind
    return None if unit is None else Quantity(value, decimals, digits, unit)


def same_quantity(given: Quantity, truth: Quantity) -> bool:
    """The same number in the same unit, up to conversion, percent signs and rounding (`same_number`)."""
    factor = conversion(given.unit, truth.unit)
    if factor is None:
        return False
    if given.percent != truth.percent:
        if given.unit.dimensions or truth.unit.dimensions:
            return False
        # "50%" is 0.5, and it is what "how many percent?" asks for
        return same_number(_as_share(given), _as_share(truth)) or (given.value == truth.value and given.value > 1)
    if factor != 1:
        given = Quantity(given.value * factor, None, given.digits, truth.unit)
        return given.value == truth.value
    return same_number(given, truth)


def same_number(given: Quantity, truth: Quantity) -> bool:
    """The same rational number; or the truth is the answer's rounding; or the answer is the decimal of an exact truth."""
    if given.value == truth.value:
        return True
    if truth.decimals is None:
        return given.decimals is not None and stands_for(given, truth.value)
    if given.decimals is None:
        return is_rounded_from(truth, given.value)
    finer = given.decimals > truth.decimals and (truth.decimals >= 2 or truth.digits >= 3)
    return finer and is_rounded_from(truth, given.value)


def is_rounded_from(truth: Quantity, exact: Fraction) -> bool:
    """Whether a decimal truth is the rounding of `exact`."""
    if not truth.decimals or abs(truth.value - exact) > LARGEST_ROUNDING * abs(exact):
        return False
    return rounded(exact, truth.decimals) == truth.value


def stands_for(decimal: Quantity, exact: Fraction) -> bool:
    """Whether a decimal is the rounding of an exact number, to digits enough to tell it from others."""
    return bool(decimal.decimals) and decimal.digits >= LEAST_DIGITS and rounded(exact, decimal.decimals or 0) == decimal.value


def rounded(value: Fraction, decimals: int) -> Fraction:
    """To so many places, halves away from zero."""
    scale = 10**decimals
    magnitude = int(abs(value) * scale + Fraction(1, 2))
    return Fraction(magnitude if value >= 0 else -magnitude, scale)


def _value(found: re.Match[str]) -> tuple[Fraction, int | None, int] | None:
    """The value without its sign, its decimals and its significant digits."""
    if found["decimal"]:
        written = _plain(found["decimal"])
        power = int(found["e"] or found["braced"] or found["plain"] or 0)
        value, decimals = Fraction(written) * Fraction(10) ** power, max(0, len(written.partition(".")[2]) - power)
        exact = decimals
    else:
        top, bottom = (found["top"], found["bottom"]) if found["whole"] else (found["numerator"], found["denominator"])
        if Fraction(_plain(bottom)) == 0:
            return None
        value = Fraction(_plain(found["whole"] or "0")) + Fraction(_plain(top)) / Fraction(_plain(bottom))
        written, exact = "", None
    scale = (found["scale"] or "").strip().casefold().rstrip("s")
    if scale:
        value *= 12 if scale == "dozen" else 10 ** (_SCALES | _SHORT_SCALES)[scale]
        exact = 0 if value.denominator == 1 else None
    return value, exact, len(written.replace(".", "").lstrip("0"))


def _plain(decimal: str) -> str:
    return decimal.replace(",", "").replace(" ", "")


def _as_share(quantity: Quantity) -> Quantity:
    if not quantity.percent:
        return quantity
    decimals = None if quantity.decimals is None else quantity.decimals + 2
    return Quantity(quantity.value / 100, decimals, quantity.digits, quantity.unit)


def _repeating_fraction(found: re.Match[str]) -> str:
    period = found[3] or found[4]
    whole, fixed = found[1] or "0", found[2]
    scale = 10 ** len(fixed)
    value = Fraction(int(whole + fixed), scale) + Fraction(int(period), (10 ** len(period) - 1) * scale)
    return f"{value.numerator}/{value.denominator}"


def _digits(text: str) -> str:
    """Number words at the beginning in digits, `two thirds` as a fraction."""
    text = _first_digits(text)
    part = _PART.fullmatch(text)
    return f"{part[1]}/{_PARTS[part[2].casefold()]}" if part else text


def _first_digits(text: str) -> str:
    """A number word at the beginning in digits."""
    found = _NUMBER_WORDS.match(text)
    if found is None or not found[0]:
        return text
    sign = "-" if found["minus"] else ""
    if not found["word"]:
        return sign + text[found.end() :]
    value = _WORDS[found["word"].casefold()]
    if found["tens"]:
        if not 0 < value < 10:
            return text
        value += _WORDS[found["tens"].casefold()]
    return f"{sign}{value}{text[found.end() :]}"
