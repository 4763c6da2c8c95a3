"""Runs a function on several ranks that talk over gloo, and gives back what each returned.

    def work(scale: float) -> float:            # at the top level of its module
        with session(ParallelConfig(tensor_model_parallel_size=2), RuntimeConfig()):
            ...
        return scale * dist.get_rank()

    assert run_ranks(work, 2, 10.0) == [0.0, 10.0]

A launch costs seconds, so let one launch do many checks. The function's file is loaded anew in every rank, outside pytest.
Arguments and results are pickled: tensors, numbers, paths and containers of these. When a rank fails or the time is up, every
rank is stopped, and the error shows what each was doing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import os
import pickle
import random
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from helpers.forks import environment_of_rank, forks

_LAST_WORDS_SECONDS = 2.0
_SHOWN_CHARACTERS = 6000  # of the end of each rank's output


class Rank(Protocol):
    """What can be done with a process, as `subprocess.Popen` does it."""

    def poll(self) -> int | None: ...

    def send_signal(self, number: int, /) -> None: ...


class RankError(AssertionError):
    """A rank failed, or did not finish in time; the message holds the end of every rank's output."""


def run_ranks(
    function: Callable[..., Any], world_size: int, *arguments: Any, timeout_seconds: float = 300.0, fresh: bool = False
) -> list[Any]:
    """`function(*arguments)` on every rank; what each returned, in rank order. The ranks see torchrun's environment variables.

    They are forked from a process that has torch and Megatron imported; `fresh` starts each anew, for what must come before.

    Raises RankError. A function that hangs in a collective because another rank failed is stopped as soon as that one is gone.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        work = Path(folder)
        job = {"file": function.__code__.co_filename, "function": function.__qualname__, "arguments": arguments}
        (work / "job.pickle").write_bytes(pickle.dumps(job))
        port = free_port()
        start = _start if fresh else _fork
        ranks = [start(work, rank, environment_of_rank(rank, world_size, port)) for rank in range(world_size)]
        try:
            problem = _wait(ranks, timeout_seconds)
        finally:
            _stop(ranks)
        if problem is None:
            return [pickle.loads((work / f"result{rank}.pickle").read_bytes()) for rank in range(world_size)]
        outputs = ((rank, (work / f"output{rank}.txt").read_text(errors="replace")) for rank in range(world_size))
        shown = "\n".join(f"--- rank {rank}\n{output[-_SHOWN_CHARACTERS:]}" for rank, output in outputs)
        raise RankError(f"{function.__qualname__} on {world_size} ranks: {problem}\n{shown}")


def free_port() -> int:
    """One that stays free until the ranks have it: below those that the system gives to whoever connects somewhere."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def _start(work: Path, rank: int, environment: dict[str, str]) -> Rank:
    with (work / f"output{rank}.txt").open("wb") as output:
        command = [sys.executable, "-u", str(Path(__file__).resolve()), str(work)]
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)


def _fork(work: Path, rank: int, environment: dict[str, str]) -> Rank:
    return _Forked(forks().start("helpers.ranks:be_a_rank", [str(work)], environment, work / f"output{rank}.txt"))


class _Forked:
    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._status: int | None = None

    def poll(self) -> int | None:
        if self._status is None:
            self._status = forks().status(self.pid)
        return self._status

    def send_signal(self, number: int, /) -> None:
        if self._status is None:  # until it is asked for, its number is nobody else's
            os.kill(self.pid, number)


def _wait(ranks: list[Rank], timeout_seconds: float) -> str | None:
    """None when all ended well, otherwise what went wrong."""
    deadline = time.monotonic() + timeout_seconds
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [f"rank {rank} ended with status {code}" for rank, code in enumerate(codes) if code]
        if failed:
            return ", ".join(failed)
        if all(code == 0 for code in codes):
            return None
        if time.monotonic() > deadline:
            return f"not finished after {timeout_seconds:g} s"
        time.sleep(0.05)


def _stop(ranks: list[Rank]) -> None:
    """Waits for the ranks that another's failure ends too; the rest must show their stacks and go."""
    _wait_for_end(ranks)
    for end in (signal.SIGABRT, signal.SIGKILL):  # faulthandler answers the first from within any collective
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(end)
        _wait_for_end(ranks)


def _wait_for_end(ranks: list[Rank]) -> None:
    deadline = time.monotonic() + _LAST_WORDS_SECONDS
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        time.sleep(0.05)


def be_a_rank(folder: str) -> None:
    """What a rank is for; the folder holds that, and gets what comes of it."""
    work = Path(folder)
    faulthandler.enable()
    try:
        job = pickle.loads((work / "job.pickle").read_bytes())
        path = Path(job["file"])
        spec = importlib.util.spec_from_file_location(f"rank_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        result = getattr(module, job["function"])(*job["arguments"])
        (work / f"result{os.environ['RANK']}.pickle").write_bytes(pickle.dumps(result))
    except Exception:
        traceback.print_exc()
        os._exit(1)  # without waiting for groups that other ranks are still in


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    be_a_rank(sys.argv[1])
