"""Runs a function on several ranks that talk over gloo, and gives back what each returned.

    def work(scale: float) -> float:            # at the top level of its module
        with session(ParallelConfig(tensor_model_parallel_size=2), RuntimeConfig()):
            ...
        return scale * dist.get_rank()

    assert run_ranks(work, 2, 10.0) == [0.0, 10.0]

A launch costs several seconds (every rank imports torch and Megatron anew), so let one launch do many checks. The function's file
is loaded anew in every rank, outside pytest. Arguments and results are pickled: tensors, numbers, paths and containers of these.
When a rank fails or the time is up, every rank is stopped, and the error shows what each was doing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
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
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
_LAST_WORDS_SECONDS = 2.0
_SHOWN_CHARACTERS = 6000  # of the end of each rank's output


class RankError(AssertionError):
    """A rank failed, or did not finish in time; the message holds the end of every rank's output."""


def run_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, timeout_seconds: float = 300.0) -> list[Any]:
    """`function(*arguments)` on every rank; what each returned, in rank order. The ranks see torchrun's environment variables.

    Raises RankError. A function that hangs in a collective because another rank failed is stopped as soon as that one is gone.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        work = Path(folder)
        job = {"file": function.__code__.co_filename, "function": function.__qualname__, "arguments": arguments}
        (work / "job.pickle").write_bytes(pickle.dumps(job))
        port = free_port()
        ranks = [_start(work, rank, world_size, port) for rank in range(world_size)]
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


def _start(work: Path, rank: int, world_size: int, port: int) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # gloo, and Megatron as it runs without CUDA, wherever the tests run
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONWARNINGS": "ignore",  # Megatron's deprecations would push the traceback out of sight
    }
    with (work / f"output{rank}.txt").open("wb") as output:
        command = [sys.executable, "-u", str(Path(__file__).resolve()), str(work)]
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)


def _wait(ranks: list[subprocess.Popen[bytes]], timeout_seconds: float) -> str | None:
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


def _stop(ranks: list[subprocess.Popen[bytes]]) -> None:
    """Waits for the ranks that another's failure ends too; the rest must show their stacks and go."""
    _wait_for_end(ranks)
    for end in (signal.SIGABRT, signal.SIGKILL):  # faulthandler answers the first from within any collective
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(end)
        _wait_for_end(ranks)


def _wait_for_end(ranks: list[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + _LAST_WORDS_SECONDS
    while time.monotonic() < deadline and any(rank.poll() is None for rank in ranks):
        time.sleep(0.05)


def _be_a_rank(work: Path) -> None:
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    job = pickle.loads((work / "job.pickle").read_bytes())
    path = Path(job["file"])
    spec = importlib.util.spec_from_file_location(f"rank_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    gc.disable()  # imports leave no garbage; going through them, now and at the end, would take a second of every rank
    spec.loader.exec_module(module)
    gc.freeze()
    gc.enable()
    result = getattr(module, job["function"])(*job["arguments"])
    (work / f"result{os.environ['RANK']}.pickle").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    try:
        _be_a_rank(Path(sys.argv[1]))
    except Exception:
        traceback.print_exc()
        os._exit(1)  # without waiting for groups that other ranks are still in
