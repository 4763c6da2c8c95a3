"""Jobs of several ranks that are started, hurt and started again: each the real command, in processes of its own.

    with Launcher() as launcher:
        job = launcher.start(2, ["rlvr", *settings(...)], tmp_path / "logs")
        job.wait_for_step(run, 2)
        job.signal(1, signal.SIGKILL)
        assert job.wait(60) == [1, -9]

A launcher imports once and forks: a rank then costs no start of Python. Ranks have torchrun's environment variables.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from prism_nemo.run_directory import read_json_lines

TESTS = Path(__file__).resolve().parents[1]


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
    """A process that has everything imported, and forks ranks."""

    def __init__(self) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONWARNINGS": "ignore",
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "helpers.jobs"], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)

    def start(self, world_size: int, arguments: Sequence[str], logs: Path, *, before: Path | None = None) -> Job:
        """`prism-nemo ARGUMENTS` on every rank; each runs the Python file `before` first."""
        logs.mkdir(parents=True, exist_ok=True)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = int(listener.getsockname()[1])
        files = [logs / f"rank_{rank}.txt" for rank in range(world_size)]
        pids = self._ask(
            {"start": list(arguments), "logs": [str(file) for file in files], "port": port, "before": str(before or "")}
        )
        return Job(pids, files, self)

    def status(self, pid: int) -> int | None:
        return self._ask({"status": pid})

    def _ask(self, question: dict[str, object]) -> object:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


def _serve() -> None:
    import prism_nemo.stages.align
    import prism_nemo.stages.rlvr
    import prism_nemo.stages.sft  # noqa: F401  (so that no rank has to)

    children: list[int] = []
    for line in sys.stdin:
        question = json.loads(line)
        if "start" in question:
            answer: object = [_fork(rank, question) for rank in range(len(question["logs"]))]
            children += answer  # type: ignore[operator]
        else:
            pid, status = os.waitpid(question["status"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            if pid:
                children.remove(pid)
        print(json.dumps(answer), flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _fork(rank: int, question: dict[str, object]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        logs: list[str] = question["logs"]  # type: ignore[assignment]
        output = os.open(logs[rank], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(output, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(len(logs)),
            "LOCAL_WORLD_SIZE": str(len(logs)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(question["port"]),
        }
        if question["before"]:
            runpy.run_path(str(question["before"]))
        from prism_nemo.cli import main

        status = main(question["start"])  # type: ignore[arg-type]
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()
