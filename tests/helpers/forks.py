"""A process that has everything imported, and forks others: such a one costs no start of Python and no import of Megatron.

    pid = forks().start("helpers.ranks:be_a_rank", [str(folder)], environment, output)
    while (status := forks().status(pid)) is None:
        ...

What is forked has an environment, an output and a state of its own, as if it had been started; only what is read when Python
starts, or when torch, Megatron and transformers are imported, is as it was then. It ends with the process that asked for it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
# The last ones are what stages import while they run.
IMPORTED = (
    "pytest",
    *(f"prism_nemo.stages.{stage}" for stage in ("sft", "pairs", "warmup", "align", "rlvr", "evaluate", "generate", "curate")),
    "torch._dynamo",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen2_vl.image_processing_pil_qwen2_vl",
)


class Forks:
    def __init__(self) -> None:
        command = [sys.executable, "-m", "helpers.forks"]
        self._process = subprocess.Popen(
            command, env=os.environ | _on_cpu(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, call: str, arguments: Sequence[Any], environment: Mapping[str, str], output: Path) -> int:
        """Forks a process that calls `module:function` with `arguments`, which JSON can hold; its number.

        `environment` is the whole of it; `output` gets what it writes. It ends as any process does: with status 0 when the
        function returns, 1 when that raises, and the one of `sys.exit`.
        """
        question = {"call": call, "arguments": list(arguments), "environment": dict(environment), "output": str(output)}
        return int(self._ask(question))

    def status(self, pid: int) -> int | None:
        """None while it runs; then its exit status, or minus the signal that ended it. Until then its number is nobody else's."""
        return self._ask({"status": pid})

    def close(self) -> None:
        """Ends this process and all that it forked."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(60)

    def _ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"the process that forks others ended with status {self._process.wait(10)}"
        return json.loads(answer)


@cache
def forks() -> Forks:
    """The one of this process."""
    found = Forks()
    atexit.register(found.close)
    return found


def environment_of_rank(rank: int, world_size: int, port: int) -> dict[str, str]:
    """As torchrun gives it to ranks of one node."""
    return {
        **os.environ,
        **_on_cpu(),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _on_cpu() -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",  # gloo, and Megatron as it runs without CUDA, wherever the tests run
        "PYTHONWARNINGS": "ignore",  # Megatron's deprecations would push a traceback out of sight
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }


def _serve() -> dict[str, Any] | None:
    """Answers until nobody asks any more; in a forked process, what that is for."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who asks decides when it is over
    for module in IMPORTED:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # no forked process looks for garbage there
    running: set[int] = set()
    for line in sys.stdin:
        question: dict[str, Any] = json.loads(line)
        answer: int | None
        if "call" in question:
            answer = os.fork()
            if answer == 0:
                return question
            running.add(answer)
        else:
            pid, status = os.waitpid(question["status"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            running.discard(pid)
        print(json.dumps(answer), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    return None


def _become(job: dict[str, Any]) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(job["environment"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for number, opened in ((0, os.open(os.devnull, os.O_RDONLY)), (1, output), (2, output)):
        os.dup2(opened, number)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    module, _, function = job["call"].partition(":")
    getattr(importlib.import_module(module), function)(*job["arguments"])


if __name__ == "__main__":
    if (given := _serve()) is not None:
        _become(given)
