"""Pickles that name classes and functions of packages which are not imported: torch's own files, written without torch.

Python's pickler looks up what it names, and so would import it. Of the format (protocol 2, which torch's restricted unpickler
reads too) only what such files hold is here.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Global:
    """A class or function of a module."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """What `function(*arguments)` returns."""

    function: Global
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Instance:
    """An object of a class, made without its constructor; `state` is its attributes, or what its `__setstate__` takes."""

    of: Global
    state: Any


@dataclass(frozen=True)
class Pairs:
    """A dict whose keys are of the above."""

    items: Sequence[tuple[Any, Any]]


@dataclass(frozen=True)
class Persistent:
    """What the reader knows under this id."""

    id: Any


def dumps(value: Any) -> bytes:
    """The pickle of None, booleans, integers, strings, tuples, lists, dicts and the above; TypeError for anything else."""
    writer = _Writer()
    writer.save(value)
    return b"\x80\x02" + bytes(writer.out) + b"."


class _Writer:
    def __init__(self) -> None:
        self.out = bytearray()
        self._memo: dict[str | Global, int] = {}  # what has a number already, to be written once

    def save(self, value: Any) -> None:
        if isinstance(value, str | Global):
            self._once(value)
        elif value is None or isinstance(value, bool):
            self.out += {None: b"N", True: b"\x88", False: b"\x89"}[value]
        elif isinstance(value, int):
            self.out += _integer(value)
        elif isinstance(value, tuple):
            self._tuple(value)
        elif isinstance(value, list):
            self.out += b"]("
            self._all(value)
            self.out += b"e"
        elif isinstance(value, dict | Pairs):
            self.out += b"}("
            for pair in value.items() if isinstance(value, dict) else value.items:
                self._all(pair)
            self.out += b"u"
        elif isinstance(value, Call):
            self._all((value.function, value.arguments))
            self.out += b"R"
        elif isinstance(value, Instance):
            self.save(value.of)
            self.out += b")\x81"
            self.save(value.state)
            self.out += b"b"
        elif isinstance(value, Persistent):
            self.save(value.id)
            self.out += b"Q"
        else:
            raise TypeError(f"{type(value)} has no place in such a pickle")

    def _all(self, values: Sequence[Any]) -> None:
        for value in values:
            self.save(value)

    def _tuple(self, values: tuple[Any, ...]) -> None:
        if len(values) <= 3:
            self._all(values)
            self.out += (b")", b"\x85", b"\x86", b"\x87")[len(values)]
        else:
            self.out += b"("
            self._all(values)
            self.out += b"t"

    def _once(self, value: str | Global) -> None:
        number = self._memo.get(value)
        if number is not None:
            self.out += b"h" + bytes([number]) if number < 256 else b"j" + struct.pack("<I", number)
            return
        if isinstance(value, Global):
            self.out += f"c{value.module}\n{value.name}\n".encode("ascii")
        else:
            text = value.encode()
            self.out += b"X" + struct.pack("<I", len(text)) + text
        number = self._memo[value] = len(self._memo)
        self.out += b"q" + bytes([number]) if number < 256 else b"r" + struct.pack("<I", number)


def _integer(value: int) -> bytes:
    if 0 <= value < 1 << 8:
        return b"K" + bytes([value])
    if 0 <= value < 1 << 16:
        return b"M" + struct.pack("<H", value)
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content
