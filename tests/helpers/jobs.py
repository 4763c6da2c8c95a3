"""Jobs of several ranks that are started, hurt and started again: each the real command, in processes of its own.

    with Launcher() as launcher:
        job = launcher.start(2, ["rlvr", *settings(...)], tmp_path / "logs")
        job.wait_for_step(run, 2)
        job.signal(1, signal.SIGKILL)
        assert job.wait(60) == [1, -9]

Ranks are forked from a process that has everything imported (helpers.forks), and have torchrun's environment variables.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from helpers.forks import Forks, environment_of_rank
from helpers.ranks import free_port

from prism_nemo.run_directory import read_json_lines


@dataclass
class Job:
    """The ranks of one start of a command."""

    pids: list[int]
    logs: list[Path]
    launcher: Launcher
    statuses: dict[int, int] = field(default_factory=dict)  # of ranks that have ended; minus the signal
    ended: dict[int, float] = field(default_factory=dict)  # when, by time.monotonic

    def poll(self) -> bool:
        """Whether all have ended."""
        for rank, pid in enumerate(self.pids):
            if rank not in self.statuses and (status := self.launcher.status(pid)) is not None:
                self.statuses[rank] = status
                self.ended[rank] = time.monotonic()
        return len(self.statuses) == len(self.pids)

    def wait(self, timeout_seconds: float) -> list[int]:
        """Every rank's status once all have ended; AssertionError, with what they wrote, when one has not in time."""
        deadline = time.monotonic() + timeout_seconds
        while not self.poll():
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"still running after {timeout_seconds:g} s: {self.output()}")
            time.sleep(0.02)
        return [self.statuses[rank] for rank in range(len(self.pids))]

    def wait_for_step(self, run: Path, step: int, timeout_seconds: float = 240) -> None:
        """Until metrics.jsonl has a line of the step."""
        deadline = time.monotonic() + timeout_seconds
        metrics = run / "metrics.jsonl"
        while not metrics.exists() or max((row["step"] for row in read_json_lines(metrics)), default=0) < step:
            assert not self.poll(), self.output()
            assert time.monotonic() < deadline, f"no step {step} in time: {self.output()}"
            time.sleep(0.01)

    def signal(self, rank: int, number: signal.Signals) -> None:
        if rank not in self.statuses:
            os.kill(self.pids[rank], number)

    def kill(self) -> None:
        for rank in range(len(self.pids)):
            self.signal(rank, signal.SIGKILL)

    def output(self, rank: int | None = None) -> str:
        logs = self.logs if rank is None else [self.logs[rank]]
        return "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-6000:]}" for log in logs)


class Launcher:
    """Starts jobs; when it is left, all their ranks are gone."""

    def __init__(self) -> None:
        self._forks = Forks()

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._forks.close()

    def start(self, world_size: int, arguments: Sequence[str], logs: Path, *, before: Path | None = None) -> Job:
        """`prism-nemo ARGUMENTS` on every rank; each runs the Python file `before` first."""
        logs.mkdir(parents=True, exist_ok=True)
        port = free_port()
        files = [logs / f"rank_{rank}.txt" for rank in range(world_size)]
        for file in files:
            file.write_text("")  # nothing of an earlier job is read in the meantime
        given = [str(before or ""), *arguments]
        pids = [
            self._forks.start("helpers.jobs:be_a_rank", given, environment_of_rank(rank, world_size, port), file)
            for rank, file in enumerate(files)
        ]
        return Job(pids, files, self)

    def status(self, pid: int) -> int | None:
        return self._forks.status(pid)


def be_a_rank(before: str, *arguments: str) -> None:
    if before:
        runpy.run_path(before)
    from prism_nemo.cli import main

    sys.exit(main(arguments))
