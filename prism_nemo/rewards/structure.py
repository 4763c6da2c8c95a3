"""Answers that are made of others: intervals, sets, tuples, lists, and answers in named or numbered parts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeVar

from prism_nemo.rewards.quantity import parse_quantity
from prism_nemo.rewards.text import closing, compact, split

Same = Callable[[str, str], bool]
T = TypeVar("T")

MAX_ELEMENTS = 64

_OR = re.compile(r",?\s*\bor\b\s*", re.IGNORECASE)
_AND = re.compile(r",?\s*(?:\band\b|&)\s*", re.IGNORECASE)
_SEPARATORS = re.compile(r"\s*;\s*|,?\s+and\s+|,(?!(?<=\d,)\d{3}(?!\d))\s*")  # x = 1,000 is one
_COMMA = re.compile(r",")
_COMMA_OR_SEMICOLON = re.compile(r"[,;]")
_COMMA_AND_SPACE = re.compile(r",?\s+and\s+|,\s+|\s*;\s*", re.IGNORECASE)
_NAMED = re.compile(r"((?:[^\W\d]|\\[A-Za-z]|[∠△])[\w'{}\\∠△ ]{0,30}(?:\([\w,]{1,10}\))?)\s*=\s*([^=<>≤≥]+)")
_NUMBERED = re.compile(
    r"(?:^|(?<=[\s;,.]))(?:\(\s*([1-9a-h]|i{1,3}|iv|v)\s*\)|([1-9])\)|(?:part\s+)([1-9a-h])[:.)])\s*", re.IGNORECASE
)
_RELATION = re.compile(r"\s*([<>≤≥])\s*")
_UNION = re.compile(r"\s*∪\s*|\s+U\s+")
_BUILDER = re.compile(r"\{\s*[A-Za-z]\s*(?:∈\s*ℝ?\s*)?[|:]\s*(.+)\}|[A-Za-z]\s*∈\s*(.+)")
_BEFORE_BRACKETS = re.compile(r"(?:\\?vec\{\w+\}|\((?P<names>[a-z](?:,\s*[a-z])+)\))\s*=\s*(?=[(<])|(?:[A-Z]'?\s*)?(?=\()")
_COORDINATE = re.compile(r"[a-z]|[A-Z]")
_VARIABLE = re.compile(r"[^\W\d]\w?(?:_\w)?")


class Order(Enum):
    """Of a structure's elements."""

    ORDERED = "ordered"  # a tuple: brackets, and an order
    BARE = "bare"  # a list without brackets, in order
    ANY = "any"  # a set, or solutions


@dataclass(frozen=True)
class Interval:
    low: str
    high: str
    low_closed: bool
    high_closed: bool


@dataclass(frozen=True)
class Structure:
    """Elements, and the names of all of them where they have names; `brackets` for tuples."""

    elements: tuple[str, ...]
    order: Order
    brackets: str = ""
    names: tuple[str, ...] = field(default=())


def parse_structure(text: str) -> Structure | None:
    """What an answer in normal form is made of; None when it is one thing."""
    if "±" in text:
        return _plus_minus(text)
    structure = _bracketed(text) or _numbered(text) or _named(text) or _solutions(text) or _listed(text)
    return None if structure is None or not 1 <= len(structure.elements) <= MAX_ELEMENTS else structure


def same_structure(given: Structure, truth: Structure, same: Same, *, unordered: bool = False) -> bool:
    """Whether the elements are the same, in order where the order says something."""
    if len(given.elements) != len(truth.elements):
        return False
    if given.names and truth.names:
        if len(set(truth.names)) == len(truth.names):
            by_name = dict(zip(given.names, given.elements, strict=True))
            return set(given.names) == set(truth.names) and all(
                same(by_name[name], element) for name, element in zip(truth.names, truth.elements, strict=True)
            )
        if set(given.names) != set(truth.names):
            return False
    if len(set(truth.names)) > 1 and not given.names and (given.order is Order.ANY or given.brackets not in ("", "()")):
        return False
    given, truth = _by_name(given, truth), _by_name(truth, given)
    if unordered or Order.ANY in (given.order, truth.order):
        tuples = Order.ORDERED in (given.order, truth.order)
        return (unordered or not tuples) and _same_in_any_order(given.elements, truth.elements, same)
    if (
        truth.order is Order.ORDERED
        and not truth.names
        and (given.brackets or not given.names)
        and given.brackets != truth.brackets
    ):
        return False
    return all(same(one, other) for one, other in zip(given.elements, truth.elements, strict=True))


def parse_intervals(text: str) -> list[Interval] | None:
    """A union of intervals, from brackets or inequalities in one variable; None for anything else. A pair in brackets is one."""
    builder = _BUILDER.fullmatch(text)
    if builder is not None:
        text = (builder[1] or builder[2]).strip()
    pieces = split(text, _UNION)
    if len(pieces) == 1:
        pieces = split(text, _OR)
    intervals = [_interval(piece) for piece in pieces[:MAX_ELEMENTS]]
    return [found for found in intervals if found is not None] if None not in intervals else None


def variable_of(text: str) -> str | None:
    """The variable of an inequality; None where there is none."""
    names = {part for part in _RELATION.split(text)[::2] if _VARIABLE.fullmatch(part)} if _RELATION.search(text) else set()
    return names.pop() if len(names) == 1 else None


def same_intervals(given: Sequence[Interval], truth: Sequence[Interval], same: Same) -> bool:
    """The same intervals in any order, open and closed at the same ends."""

    def same_interval(one: Interval, other: Interval) -> bool:
        closed = (one.low_closed, one.high_closed) == (other.low_closed, other.high_closed)
        return closed and same(one.low, other.low) and same(one.high, other.high)

    return len(given) == len(truth) and _same_in_any_order(given, truth, same_interval)


def without_parentheses(text: str) -> str:
    """Round brackets around one thing, taken off."""
    for _ in range(8):
        wrapped = len(text) > 2 and text[0] == "(" and text[-1] == ")" and closing(text, 0) == len(text) - 1
        if not wrapped or len(split(text[1:-1], _COMMA)) > 1:
            break
        text = text[1:-1].strip()
    return text


def alternatives(text: str) -> list[str]:
    """What `A or B` offers; the text alone when it offers nothing."""
    return [part.removeprefix("either ") for part in split(text, _OR) if part]


def _by_name(one: Structure, other: Structure) -> Structure:
    """Coordinates by their letters where the other side names none: `y = 6, x = 5` is (5, 6)."""
    if other.names or not one.names or not all(_COORDINATE.fullmatch(name) for name in one.names):
        return one
    pairs = sorted(zip(one.names, one.elements, strict=True))
    return Structure(tuple(element for _, element in pairs), one.order, one.brackets, names=tuple(name for name, _ in pairs))


def _same_in_any_order(given: Sequence[T], truth: Sequence[T], same: Callable[[T, T], bool]) -> bool:
    left = list(truth)
    for one in given:
        match = next((index for index, other in enumerate(left) if same(one, other)), None)
        if match is None:
            return False
        del left[match]
    return not left


def _bracketed(text: str) -> Structure | None:
    start = _BEFORE_BRACKETS.match(text)
    body = text[start.end() :] if start else text
    if len(body) > 2 and body[0] == "<" and body[-1] == ">":
        body = "(" + body[1:-1] + ")"
    if not body or body[0] not in "([{" or closing(body, 0) != len(body) - 1:
        return None
    parts = split(body[1:-1], _COMMA_OR_SEMICOLON)
    brackets = body[0] + body[-1]
    if brackets == "{}":
        return _named(body[1:-1]) or Structure(tuple(parts), Order.ANY)
    names = compact(start["names"]).split(",") if start and start["names"] else []
    named = len(set(names)) == len(parts)
    return Structure(tuple(parts), Order.ORDERED, brackets, tuple(names) if named else ()) if len(parts) > 1 else None


def _numbered(text: str) -> Structure | None:
    """`(1) 12 (2) 5`: what stands behind labels that count from the first."""
    labels = [next(filter(None, groups)).lower() for groups in _NUMBERED.findall(text)]
    counts = ("123456789", "abcdefgh", ("i", "ii", "iii", "iv", "v"))
    if len(labels) < 2 or not any(labels == list(count[: len(labels)]) for count in counts):
        return None
    pieces = _NUMBERED.split(text)
    if pieces[0].strip():
        return None
    return Structure(tuple(piece.strip(" ;,.") for piece in pieces[4::4]), Order.BARE)


def _named(text: str) -> Structure | None:
    """`x = 1, y = 2`: named parts; `x = 1 or x = 2` and `x = 1, 2`: solutions."""
    pieces = [part for piece in split(text, _OR) for part in split(piece, _SEPARATORS)]
    if len(pieces) < 2 or "=" not in pieces[0]:
        return None
    found = [_NAMED.fullmatch(piece) for piece in pieces]
    first = found[0]
    if first is None:
        return None
    if not any(found[1:]) and not any("=" in piece for piece in pieces):
        return None
    names = [compact(one[1]) if one else compact(first[1]) for one in found]
    values = tuple(one[2].strip() if one else piece for one, piece in zip(found, pieces, strict=True))
    if any(one is None and "=" in piece for one, piece in zip(found, pieces, strict=True)):
        return None
    stems = {re.sub(r"_?\{?\d\}?$", "", name) for name in names}
    if len(set(names)) == len(names) and len(stems) > 1:
        both = len(split(text, _OR)) == 1
        return Structure(values, Order.BARE, names=tuple(names if both else (f"or {name}" for name in names)))
    if len(stems) == 1:  # x = 1 or x = 2, x_1 = 1, x_2 = 2
        return Structure(values, Order.ANY, names=tuple(stems) * len(values))
    return None


def _solutions(text: str) -> Structure | None:
    parts = split(text, _OR)
    return Structure(tuple(parts), Order.ANY) if len(parts) > 1 else None


def _listed(text: str) -> Structure | None:
    parts = []
    for part in split(text, _COMMA_AND_SPACE):
        parts.extend(
            [part] if parse_quantity(part.rpartition("=")[2].strip()) else split(part, _COMMA)
        )  # "x, 1,000" has two elements, "1, 2,3" has three
    if len(parts) < 2:
        return None
    words = len(split(text, _AND)) > 1 and not any(parse_quantity(part) for part in parts)
    return Structure(tuple(parts), Order.ANY if words else Order.BARE)


def _plus_minus(text: str) -> Structure | None:
    """`± 4` and `1 ± \\sqrt{5}`: both."""
    if text.count("±") != 1 or len(split(text, _COMMA)) > 1 or len(split(text, _OR)) > 1:
        return None
    value = text.rpartition("=")[2].strip()
    positive = value.replace("±", "+").removeprefix("+").strip()
    return Structure((positive, value.replace("±", "-")), Order.ANY)


def _interval(text: str) -> Interval | None:
    text = text.strip()
    if text and text[0] in "([" and text[-1] in ")]":
        ends = split(text[1:-1], _COMMA)
        whole = closing(text, 0) == len(text) - 1
        return Interval(ends[0], ends[1], text[0] == "[", text[-1] == "]") if whole and len(ends) == 2 else None
    parts = _RELATION.split(text)
    terms = parts[::2]
    signs = parts[1::2]
    if len(terms) == 3 and _VARIABLE.fullmatch(terms[1]) and ({*signs} <= {"<", "≤"} or {*signs} <= {">", "≥"}):
        if signs[0] in ">≥":
            terms, signs = terms[::-1], signs[::-1]
        return Interval(terms[0], terms[2], low_closed=signs[0] in "≤≥", high_closed=signs[1] in "≤≥")
    if len(terms) != 2 or not all(terms):
        return None
    if _VARIABLE.fullmatch(terms[1]) and not _VARIABLE.fullmatch(terms[0]):
        terms, signs = terms[::-1], [{"<": ">", ">": "<", "≤": "≥", "≥": "≤"}[signs[0]]]
    if not _VARIABLE.fullmatch(terms[0]):
        return None
    if signs[0] in ">≥":
        return Interval(terms[1], "∞", low_closed=signs[0] == "≥", high_closed=False)
    return Interval("-∞", terms[1], low_closed=False, high_closed=signs[0] == "≤")
