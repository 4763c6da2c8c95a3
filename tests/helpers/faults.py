"""Faults to put into runs, and the table of docs/reliability.md of what became of them."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from helpers.jobs import Job

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
SECONDS = 200.0  # for what takes a few
HEADER = ["fault", "times", "what happened", "lost runs", "silently wrong resumes", "seconds to notice"]
STUCK = {
    "sleep": "time.sleep(1e6)",
    "lock": "lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "file": "open(pipe, 'rb').read()",  # nobody writes into it: a file system that does not answer
}


@dataclass(frozen=True)
class Row:
    """What the table has of a fault. `seconds`: the longest between the fault and the end of every rank that could end."""

    times: int
    happened: str
    lost: int = 0  # runs that did not end as an unbroken one
    wrong: int = 0  # resumes whose metrics, samples or steps were others, with nothing said
    seconds: float | None = None

    def cells(self, fault: str) -> list[str]:
        noticed = "" if self.seconds is None else f"{self.seconds:.0f}"
        return [fault, str(self.times), self.happened, str(self.lost), str(self.wrong), noticed]


def at_step(step: int, rank: int, code: str) -> str:
    """What a rank runs first so that RLVR comes by `code` once, in the step behind so many."""
    return (
        "import os, threading, time\n"
        "from prism_nemo.stages.rlvr import RLVRTrainer\n"
        "scores = RLVRTrainer.scores\n"
        "def stuck(self, rollouts):\n"
        f"    if os.environ['RANK'] == '{rank}' and self.loop.done == {step}:\n"
        f"        {code}\n"
        "    return scores(self, rollouts)\n"
        "RLVRTrainer.scores = stuck\n"
    )


class Slow(BaseHTTPRequestHandler):
    """Answers, in `seconds`."""

    seconds = 8.0

    def do_GET(self) -> None:
        time.sleep(self.seconds)
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None: ...


def seconds_to_end(job: Job, hurt: int, number: signal.Signals) -> float:
    """Hurts a rank; how long the other lives on."""
    began = time.monotonic()
    job.signal(hurt, number)
    other = 1 - hurt
    while not job.poll() and other not in job.statuses:
        assert time.monotonic() < began + SECONDS, job.output()
        time.sleep(0.02)
    return max(job.ended[other] - began, 0.0)


def wait_until_met(job: Job) -> None:
    """Before that no rank knows of another: whoever started them must see to it that all come."""
    deadline = time.monotonic() + SECONDS
    while "ranks have met" not in job.output(0):
        assert not job.poll(), job.output()
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.01)


def children_of(pid: int) -> list[int]:
    """Their process ids."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            found.append(int(process.name))
    return found


def _table() -> re.Match[str]:
    found = re.search(r"<!-- faults -->\n(.*?)<!-- end -->", PAGE.read_text(), re.DOTALL)
    assert found is not None
    return found


def page_rows() -> list[list[str]]:
    """The cells of every row of the page."""
    return [[cell.strip() for cell in line.removeprefix("|").split("|")[:-1]] for line in _table()[1].splitlines()[2:]]


def write_table(rows: Mapping[str, Row]) -> None:
    """Puts rows in the place of those that the page has of the same fault, or behind all."""
    table = {cells[0]: cells for cells in page_rows()} | {fault: row.cells(fault) for fault, row in rows.items()}
    lines = [HEADER, ["---"] * len(HEADER), *table.values()]
    text, span = PAGE.read_text(), _table().span(1)
    PAGE.write_text(text[: span[0]] + "".join(f"| {' | '.join(cells)} |\n" for cells in lines) + text[span[1] :])
