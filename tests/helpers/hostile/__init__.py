"""Inputs that mean harm, each through the door it would come in by. `tests/integration/test_hostile_inputs.py` runs them all."""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from prism_nemo.cli import main
from prism_nemo.errors import PrismError

MARKER = "it ran"  # the file that a bomb makes
_OF_LIBRARIES = re.compile(  # words that change with the library that they come from, up to our own in brackets behind them
    r"((?:read as YAML|decoded|too large|readable parquet|template cannot be used): )(?!it is ).*?( \((?:a whole|scale)[^)]*\))?$"
    r"|maximum recursion depth[^)]*"
)
LONGEST = 400  # characters of a message in the table


@dataclass(frozen=True)
class Case:
    """`attempt(folder)` brings the input in and returns what the user is told. It fails where the input is taken."""

    door: str
    given: str
    outcome: str
    attempt: Callable[[Path], str]

    @property
    def name(self) -> str:
        return f"{self.door}: {self.given}"


CASES: list[Case] = []


def case(door: str, given: str, *, outcome: str = "refused") -> Callable[[Callable[[Path], str]], Callable[[Path], str]]:
    """Adds a case. `given` is text of the table."""

    def add(attempt: Callable[[Path], str]) -> Callable[[Path], str]:
        CASES.append(Case(door, given, outcome, attempt))
        return attempt

    return add


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.marker = folder / MARKER

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def refusal(attempt: Callable[[], Any]) -> str:
    """The error of an attempt, which is one for users."""
    with pytest.raises(PrismError) as caught:
        attempt()
    return str(caught.value)


def command(*arguments: str) -> tuple[int, str]:
    """Exit status of the program in this process, and all that it printed."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            status = main(list(arguments))
        except SystemExit as ended:
            status = int(ended.code or 0)
    return status, out.getvalue()


def refused_command(*arguments: str) -> str:
    status, shown = command(*arguments)
    assert status == 2, f"status {status}: {shown}"
    assert shown.startswith("prism-nemo: ")
    return shown.removeprefix("prism-nemo: ")


def validated(folder: Path, file: Path, *arguments: str) -> str:
    """What `prism-nemo data validate` says of the only record of a data file."""
    status, shown = command("data", "validate", str(file), "--images", "--cache-dir", str(folder / "cache"), *arguments)
    assert status == 1, f"status {status}: {shown}"
    lines = [line for line in shown.splitlines() if " records are broken, " not in line]
    assert len(lines) == 1, shown
    return lines[0].partition("]: ")[2] or lines[0]


def told(text: str, folder: Path) -> str:
    """A message as the table shows it: what was said, on one line, without this run's folders."""
    assert all(line.isprintable() for line in text.split("\n")), "a terminal would obey it"
    lines = [line.strip() for line in text.strip().splitlines()]
    line = " ".join(line for line in lines if not line.startswith(("where: ", "remedy: ")))
    line = line.replace(str(folder), "…")
    line = _OF_LIBRARIES.sub(lambda found: f"{found[1] or ''}…{found[2] or ''}", line)
    line = re.sub(r"(.)\1{30,}", r"\1\1\1…", line)
    line = re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:…", line)
    assert len(line) <= LONGEST, f"too long for a person: {line}"
    return line
