"""The keys of a schema, looked up by their dotted names: types, comments, and what a wrong name was probably meant to be."""

from __future__ import annotations

import ast
import difflib
import inspect
import io
import math
import sys
import tokenize
import types
from collections.abc import Iterable
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

MISSING = "???"


@dataclass(frozen=True)
class Key:
    """One configuration key: dotted name, declared type, and the comment behind it in its dataclass."""

    name: str
    annotation: Any
    comment: str

    @property
    def type_text(self) -> str:
        return type_text(self.annotation)


@dataclass(frozen=True)
class Section:
    """Keys that belong together; `name` is "" for the keys at the top."""

    name: str
    schema: type
    keys: tuple[Key, ...]

    @property
    def title(self) -> str:
        return (self.schema.__doc__ or "") if self.name else ""


@cache
def sections(schema: type) -> tuple[Section, ...]:
    """All sections of a stage's schema, those without keys of their own too, in the order of the schema; the top one first."""
    return tuple(_walk(schema, ""))


@cache
def keys(schema: type) -> dict[str, Key]:
    """Every key of a stage's schema by its dotted name."""
    return {key.name: key for section in sections(schema) for key in section.keys}


@cache
def section_names(schema: type) -> frozenset[str]:
    return frozenset(section.name for section in sections(schema) if section.name)


def closest(name: str, names: Iterable[str], *, limit: int = 3) -> list[str]:
    """The names that `name` may have been meant for, likeliest first: alike in the last part above all, then in the whole."""

    def likeness(candidate: str) -> float:
        last = difflib.SequenceMatcher(None, name.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return 0.7 * last + 0.3 * difflib.SequenceMatcher(None, name, candidate).ratio()

    scores = {candidate: likeness(candidate) for candidate in names}
    floor = max(0.6, max(scores.values(), default=0.0) - 0.15)  # what is far behind the best is noise
    return [candidate for candidate, score in sorted(scores.items(), key=lambda item: -item[1]) if score >= floor][:limit]


def did_you_mean(name: str, names: Iterable[str]) -> str | None:
    """ "did you mean a or b?", or None when nothing is close."""
    found = closest(name, names)
    return f"did you mean {' or '.join(found)}?" if found else None


def type_text(annotation: Any) -> str:
    """A type as a user reads it: `int`, `bf16 | fp32`, `str or null`, `list of str`."""
    base, optional = unwrap_optional(annotation)
    if get_origin(base) is list:
        text = f"list of {type_text(get_args(base)[0])}"
    elif get_origin(base) is dict:
        text = "mapping"
    elif is_dataclass(base):
        text = "{" + ", ".join(field.name for field in fields(base)) + "}"
    elif base is bool:
        text = "true | false"
    elif issubclass(base, Enum):
        text = " | ".join(member.name for member in base)
    else:
        text = base.__name__
    return f"{text} or null" if optional else text


def unwrap_optional(annotation: Any) -> tuple[Any, bool]:
    """(T, True) for `T | None`, (T, False) for any other T."""
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        assert len(members) == 1, f"the schema has a union other than `T | None`: {annotation}"
        return members[0], True
    return annotation, False


def accepts(annotation: Any, value: Any) -> bool:
    """Whether a YAML value has the declared type. Nothing is coerced, but an int may stand for a float.

    Interpolations (`${...}`) and `???` pass here; their values are checked when they are resolved.
    """
    base, optional = unwrap_optional(annotation)
    if value is None:
        return optional
    if isinstance(value, str) and ("${" in value or value == MISSING):
        return True
    if get_origin(base) is list:
        return isinstance(value, list) and all(accepts(get_args(base)[0], element) for element in value)
    if get_origin(base) is dict:
        return isinstance(value, dict) and all(isinstance(name, str) for name in value)
    if is_dataclass(base):
        hints = get_type_hints(base)
        return isinstance(value, dict) and all(name in hints and accepts(hints[name], entry) for name, entry in value.items())
    if base is bool:
        return isinstance(value, bool)
    if base is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if base is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if issubclass(base, Enum):
        return isinstance(value, str) and value in base.__members__
    return isinstance(value, str)


def _walk(schema: type, name: str) -> Iterable[Section]:
    hints = get_type_hints(schema)
    bases = [base for base in reversed(schema.__mro__) if is_dataclass(base)]
    comments = {key: text for base in bases for key, text in _comments(base.__module__).get(base.__name__, {}).items()}
    own: list[Key] = []
    below: list[Section] = []
    for field in fields(schema):
        full = f"{name}.{field.name}" if name else field.name
        if is_dataclass(hints[field.name]):
            below += _walk(hints[field.name], full)
        else:
            own.append(Key(full, hints[field.name], comments.get(field.name, "")))
    yield Section(name, schema, tuple(own))
    yield from below


@cache
def _comments(module: str) -> dict[str, dict[str, str]]:
    """Class name -> field name -> the comment at the end of the field's line in the module's source."""
    source = inspect.getsource(sys.modules[module])
    by_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    return {
        node.name: {
            statement.target.id: by_line.get(statement.end_lineno or statement.lineno, "")
            for statement in node.body
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name)
        }
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }
