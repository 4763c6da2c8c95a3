"""Inputs that mean harm are refused with a clear error, run nothing, and take neither the machine's memory nor its time.

The table in docs/security.md is what these tests see: each row is held to it. PRISM_NEMO_WRITE_TABLES=1 writes it anew.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.hostile import CASES, MARKER, Case, told
from helpers.hostile import configurations as _configurations  # noqa: F401 - each adds its cases
from helpers.hostile import data as _data  # noqa: F401
from helpers.hostile import models as _models  # noqa: F401
from helpers.hostile import network as _network  # noqa: F401

PAGE = Path(__file__).parents[2] / "docs" / "security.md"
BEGIN, END = "<!-- written by tests/integration/test_hostile_inputs.py -->", "<!-- end -->"
MAX_MORE_MEMORY = 700 << 20  # bytes that one input may cost at its worst; each bomb would take several gigabytes
SEEN: dict[str, str] = {}


def row(case: Case, text: str) -> str:
    cells = (case.door, case.given, case.outcome, f"`{text.replace('`', chr(39))}`")
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Only this machine may be reached: anything else fails, and is seen to have been tried."""
    import socket

    tried: list[object] = []
    connect = socket.socket.connect

    def checked(self: socket.socket, address: object) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            tried.append(address)
            raise OSError("no network here")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", checked)
    yield
    assert not tried


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name[:80])
@pytest.mark.usefixtures("no_network")
def test_refused(case: Case, tmp_path: Path) -> None:
    before = peak_bytes()
    text = told(case.attempt(tmp_path), tmp_path)
    assert not (tmp_path / MARKER).exists(), "it ran"
    assert peak_bytes() - before < MAX_MORE_MEMORY
    SEEN[case.name] = row(case, text)
    if not os.environ.get("PRISM_NEMO_WRITE_TABLES"):
        assert row(case, text) in PAGE.read_text(encoding="utf-8").splitlines(), (
            f"docs/security.md has no line\n{row(case, text)}"
        )


def test_the_table_has_every_case_and_no_other() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    page = PAGE.read_text(encoding="utf-8")
    before, begin, rest = page.partition(BEGIN)
    table, end, after = rest.partition(END)
    assert begin and end
    if os.environ.get("PRISM_NEMO_WRITE_TABLES"):
        assert len(SEEN) == len(CASES), "run all of them"
        lines = ["| where | what | outcome | the user sees |", "|---|---|---|---|", *(SEEN[case.name] for case in CASES)]
        table = "\n" + "\n".join(lines) + "\n"
        PAGE.write_text(before + begin + table + end + after, encoding="utf-8")
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert [line.startswith(row(case, "").rstrip("`| ")) for line, case in zip(rows, CASES, strict=True)] == [True] * len(CASES)
