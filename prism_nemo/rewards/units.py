"""Units: which are the same, which can be converted, and which plain nouns may stand behind a number."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from prism_nemo.rewards.text import listed, singular

Dimensions = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Unit:
    """What stands behind a number: a unit that is known (`dimensions` and the `factor` to their base), or a noun."""

    dimensions: Dimensions = ()
    factor: Fraction = Fraction(1)
    noun: str = ""
    doubtful: bool = False  # a letter right behind a number, which may be a variable


_SI = {"k": 3, "M": 6, "G": 9, "d": -1, "c": -2, "m": -3, "μ": -6, "u": -6, "n": -9}
_SI_WORDS = {"kilo": 3, "mega": 6, "giga": 9, "deci": -1, "centi": -2, "milli": -3, "micro": -6, "nano": -9}
_NEWTON = {"kg": 1, "m": 1, "s": -2}
_JOULE = {"kg": 1, "m": 2, "s": -2}
_PREFIXED: tuple[tuple[str, str, str, dict[str, int], str], ...] = (  # symbol, words, factor, dimensions, prefixes
    ("m", "meter metre", "1", {"m": 1}, "kdcmμun"),
    ("g", "gram", "1/1000", {"kg": 1}, "kmμu"),
    ("s", "second sec", "1", {"s": 1}, "mμun"),
    ("L", "liter litre", "1/1000", {"m": 3}, "dcm"),
    ("N", "newton", "1", _NEWTON, "kmM"),
    ("J", "joule", "1", _JOULE, "kmM"),
    ("W", "watt", "1", {"kg": 1, "m": 2, "s": -3}, "kmMG"),
    ("V", "volt", "1", {"kg": 1, "m": 2, "s": -3, "A": -1}, "km"),
    ("A", "ampere amp", "1", {"A": 1}, "mμu"),
    ("Ω", "ohm", "1", {"kg": 1, "m": 2, "s": -3, "A": -2}, "kM"),
    ("Hz", "hertz", "1", {"s": -1}, "kMG"),
    ("Pa", "pascal", "1", {"kg": 1, "m": -1, "s": -2}, "kM"),
    ("C", "coulomb", "1", {"A": 1, "s": 1}, "mμun"),
    ("F", "farad", "1", {"A": 2, "s": 4, "kg": -1, "m": -2}, "mμun"),
    ("T", "tesla", "1", {"kg": 1, "s": -2, "A": -1}, "m"),
    ("mol", "mole", "1", {"mol": 1}, "mk"),
    ("eV", "electronvolt", "1", {"eV": 1}, "kMG"),
    ("cal", "calorie", "1", {"cal": 1}, "k"),
)
_PLAIN: tuple[tuple[str, str, dict[str, int]], ...] = (  # names, factor, dimensions
    ('inch inches in ″ "', "127/5000", {"m": 1}),
    ("foot feet ft ′ '", "381/1250", {"m": 1}),
    ("yard yd", "1143/1250", {"m": 1}),
    ("mile mi", "201168/125", {"m": 1}),
    ("minute min", "60", {"s": 1}),
    ("hour h hr", "3600", {"s": 1}),
    ("day", "86400", {"s": 1}),
    ("week", "604800", {"s": 1}),
    ("month", "1", {"month": 1}),
    ("year yr", "12", {"month": 1}),
    ("pound lb", "45359237/100000000", {"kg": 1}),
    ("ounce oz", "45359237/1600000000", {"kg": 1}),
    ("tonne", "1000", {"kg": 1}),
    ("ton", "1", {"ton": 1}),
    ("l", "1/1000", {"m": 3}),
    ("ml", "1/1000000", {"m": 3}),
    ("gallon gal", "1", {"gallon": 1}),
    ("hectare ha", "10000", {"m": 2}),
    ("acre", "1", {"acre": 1}),
    ("degree deg °", "1", {"°": 1}),
    ("radian rad", "1", {"rad": 1}),
    ("°C celsius ℃", "1", {"°C": 1}),
    ("°F fahrenheit ℉", "1", {"°F": 1}),
    ("K kelvin", "1", {"K": 1}),
    ("$ dollar usd buck", "1", {"$": 1}),
    ("cent ¢", "1/100", {"$": 1}),
    ("€ euro eur", "1", {"€": 1}),
    ("£ gbp", "1", {"£": 1}),
    ("¥ yen yuan rmb cny", "1", {"¥": 1}),
    ("₹ rupee inr", "1", {"₹": 1}),
    ("atm atmosphere", "1", {"atm": 1}),
    ("bit", "1", {"bit": 1}),
    ("byte", "8", {"bit": 1}),
    ("kb Kb", "1000", {"bit": 1}),
    ("Mb", "1000000", {"bit": 1}),
    ("Gb", "1000000000", {"bit": 1}),
    ("kB KB", "8000", {"bit": 1}),
    ("MB", "8000000", {"bit": 1}),
    ("GB", "8000000000", {"bit": 1}),
    ("TB", "8000000000000", {"bit": 1}),
    ("Mhz MHZ", "1000000", {"s": -1}),
    ("Nm", "1", {"Nm": 1}),  # a torque is no energy
    ("mph", "1397/3125", {"m": 1, "s": -1}),
    ("kph kmh kmph", "5/18", {"m": 1, "s": -1}),
    ("rpm", "1", {"rpm": 1}),
)


def _table() -> dict[str, tuple[Fraction, dict[str, int]]]:
    table: dict[str, tuple[Fraction, dict[str, int]]] = {}
    for symbol, words, factor, dimensions, prefixes in _PREFIXED:
        for prefix, power in (("", 0), *((p, _SI[p]) for p in prefixes)):
            table[prefix + symbol] = (Fraction(factor) * Fraction(10) ** power, dimensions)
        for prefix, power in (("", 0), *_SI_WORDS.items()):
            for word in words.split():
                table[prefix + word] = (Fraction(factor) * Fraction(10) ** power, dimensions)
    for names, factor, dimensions in _PLAIN:
        table.update({name: (Fraction(factor), dimensions) for name in names.split()})
    return table


_TABLE = _table()
_CASELESS = {name.casefold(): entry for name, entry in _TABLE.items() if len(name) > 2 and name.islower()}
_CASELESS |= {name.casefold(): _TABLE[name] for name in listed("kg km kW kJ kV Hz kHz GHz kPa cm dL cL ft lb oz yd hr ha")}
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?i)\bdegrees?\s+(celsius|fahrenheit|c|f)\b", r"°\1"),
        (r"(?i)°\s*(c|f)(?:elsius|ahrenheit)?\b", lambda found: "°" + found[1].upper()),
        (r"(?i)\b(?:square|sq\.?)\s+([a-z]+)", r"\1^2"),
        (r"(?i)\bcubic\s+([a-z]+)", r"\1^3"),
        (r"(?i)\b([a-z]+)\s+squared\b", r"\1^2"),
        (r"(?i)\b([a-z]+)\s+cubed\b", r"\1^3"),
        (r"(?i)\s+per\s+", "/"),
        (r"(?i)\s+(?:long|high|tall|wide|deep|old|each|away|in total|total|in length|in area)$", ""),
    )
)
_FACTOR = re.compile(r"([^\W\d_]+|°[CF]?|[$€£¥₹¢℃℉″′\"'])(?:\^?\{?(-?\d)\}?)?")
_UNITLESS = frozenset(("unit", "square unit", "sq unit", "sq. unit", "cubic unit", "unit^2", "unit^3"))
_NOUN = re.compile(r"[^\W\d_]{2,}(?:[ -][^\W\d_]{2,}){0,3}")
_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"
    " nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand million billion trillion bn mn mln tn lakh"
    " crore dozen half halve third fourth quarter fifth sixth seventh eighth ninth tenth eleventh twelfth hundredth thousandth"
    " millionth billionth squared cubed factorial power negative positive percent"
    " grand doubled tripled quadrupled halved reversed inverted backwards gross milli micro nano centi kilo mega giga th bc bce"
)
_OTHER_WORDS = (
    "or and to plus minus no than more less fewer if not but is are at least most between through per of by over under"
    " beyond pi ln log sin cos tan mod sqrt am pm maybe perhaps nope wait actually wrong incorrect false unlike unless except"
    " without ish too guess odd some something below above ago"
)
_MONTHS = (
    "january february march april may june july august september october november december jan feb mar apr jun jul aug sep sept"
    " oct nov dec"
)
_NO_NOUNS = frozenset(listed(f"{_NUMBER_WORDS} {_OTHER_WORDS} {_MONTHS}"))
_ADVERB = re.compile(r"(?!(?:family|daily|weekly|monthly|yearly|fly|lily|jelly|bully|ally|assembly|anomaly)$)\w+ly")


def parse_unit(text: str, *, attached: bool = False) -> Unit | None:
    """What stands behind a number; None when it is neither a unit nor a noun. `attached`: without a space between."""
    text = text.strip()
    if not text or singular(text.casefold()) in _UNITLESS:
        return Unit()
    known = known_unit(text)
    if known is not None:
        return Unit(known.dimensions, known.factor, doubtful=attached and len(text) == 1 and text.isascii() and text.isalpha())
    if attached and text.isascii():  # "7th", "7x"
        return None
    words = [_folded(word) for word in text.replace("-", " ").split()]
    nouns = [singular(word) for word in words]
    if (
        not _NOUN.fullmatch(text)
        or not _NO_NOUNS.isdisjoint(word.casefold() for word in words + nouns)
        or any(map(_ADVERB.fullmatch, words))
    ):
        return None
    return Unit(noun=" ".join(nouns))


def known_unit(text: str) -> Unit | None:
    """A unit of the table, or a product or quotient of some."""
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    factor, exponents = Fraction(1), dict[str, int]()
    for position, part in enumerate(text.strip().split("/")):
        names = re.split(r"\s*[·*×]\s*|\s+|(?<=\w)-(?=[A-Za-z])", part.strip().strip("()"))
        for name in names:
            found = _FACTOR.fullmatch(name.rstrip("."))
            entry = _entry(found[1]) if found else None
            if found is None or entry is None:
                return None
            power = int(found[2] or 1) * (-1 if position else 1)
            factor *= entry[0] ** power
            for dimension, exponent in entry[1].items():
                exponents[dimension] = exponents.get(dimension, 0) + exponent * power
    return Unit(tuple(sorted((name, exponent) for name, exponent in exponents.items() if exponent)), factor)


def conversion(given: Unit, truth: Unit) -> Fraction | None:
    """What a number in the given unit is multiplied by to be in the true one; None when they do not go together.

    A side without a unit goes with any: questions often name the unit. Two that are both there must be the same, or convert.
    """
    if given == truth:
        return Fraction(1)
    bare = [unit for unit in (given, truth) if not unit.dimensions and not unit.noun]
    if bare:
        return None if given.doubtful or truth.doubtful else Fraction(1)
    if given.noun or truth.noun:
        shorter, longer = sorted((given.noun, truth.noun), key=len)
        return Fraction(1) if shorter and (longer == shorter or longer.endswith(" " + shorter)) else None
    if given.dimensions == truth.dimensions:
        return given.factor / truth.factor
    temperatures = {(("°", 1),), (("°C", 1),), (("°F", 1),)}
    if {given.dimensions, truth.dimensions} < temperatures and (("°", 1),) in (given.dimensions, truth.dimensions):
        return Fraction(1)  # "25 degrees"
    return None


def _entry(name: str) -> tuple[Fraction, dict[str, int]] | None:
    """Symbols keep their case, but for the few whose case says nothing; words do not, and may be in the plural."""
    folded = name.casefold()
    return _TABLE.get(name) or _CASELESS.get(folded) or (_CASELESS.get(folded[:-1]) if folded[-1] == "s" else None)


def _folded(word: str) -> str:
    """Without case, but for what may be a symbol that is not known here: `Mx`, `MBps`."""
    return word if len(word) <= 2 or not (word.islower() or word.isupper() or word.istitle()) else word.casefold()
