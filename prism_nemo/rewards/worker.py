"""`python -m prism_nemo.rewards.worker`: decides questions that need computer algebra, one JSON line in, one out.

It holds itself to its limits, so that nothing has to watch it: processor time per question by a timer that raises and, where
code in C does not come back to the interpreter, by RLIMIT_CPU, which kills; memory by RLIMIT_AS. It ends with its parent: when
standard input closes, and when it finds itself with another parent. Signals that are meant for the run (interrupts, SLURM's) do
nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import select
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO, Any

from prism_nemo.rewards.answer import decide
from prism_nemo.rewards.question import AnswerKind, Question

TIME, MEMORY = "time", "memory"
"""The limits that a reply may name."""

_PARENT_CHECK_SECONDS = 5.0
_TIMER_REPEATS_SECONDS = 0.05  # processor time: an exception that a destructor swallowed comes again

_WARM_UP = ((r"\frac{\sqrt{8}}{2}", r"\sqrt{2}"), ("x^2+x", "x(x+1)"))
"""What the first expressions cost beyond the others is no question's."""


class _OutOfTime(BaseException):
    """Not an Exception: computer algebra catches those."""


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--time-limit-seconds", type=float, required=True)
    arguments.add_argument("--memory-limit-mb", type=int, required=True)
    options = arguments.parse_args()
    for meant_for_the_run in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(meant_for_the_run, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, _raise_out_of_time)
    replies = _own_standard_output()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    memory_limit = options.memory_limit_mb * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))

    from prism_nemo.rewards.symbolic import forget, same_expression  # the heavy import

    for given, truth in _WARM_UP:
        same_expression(given, truth)
    _reply(replies, {"ready": True})
    _silence_standard_error()
    for request in _requests():
        reply = _answer(request, options.time_limit_seconds)
        forget()
        tired = "limit" in reply or _peak_memory() > memory_limit / 2
        _reply(replies, {"id": request["id"], "retire": tired, **reply})
        if tired:
            break
    os._exit(0)  # nothing is open that an orderly end would save


def _answer(request: dict[str, Any], limit_seconds: float) -> dict[str, Any]:
    from prism_nemo.rewards.symbolic import same_expression

    kind = request["kind"]
    question = Question(
        given=request["given"],
        truth=request["truth"],
        equivalent_answers=tuple(request["equivalent_answers"]),
        kind=None if kind is None else AnswerKind(kind),
    )
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = math.ceil(used.ru_utime + used.ru_stime + limit_seconds)  # the kernel counts whole seconds
    resource.setrlimit(resource.RLIMIT_CPU, (hard, resource.RLIM_INFINITY))
    try:
        signal.setitimer(signal.ITIMER_PROF, limit_seconds, _TIMER_REPEATS_SECONDS)
        try:
            equal = decide(question, same_expression)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0.0)
    except _OutOfTime:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        return {"limit": TIME}
    except MemoryError:
        return {"limit": MEMORY}
    return {"equal": equal}


def _requests() -> Iterator[dict[str, Any]]:
    parent, waiting = os.getppid(), b""
    while True:
        while b"\n" not in waiting:
            readable, _, _ = select.select([0], [], [], _PARENT_CHECK_SECONDS)
            if os.getppid() != parent:
                return
            if readable:
                read = os.read(0, 65536)
                if not read:
                    return
                waiting += read
        line, waiting = waiting.split(b"\n", 1)
        yield json.loads(line)


def _raise_out_of_time(signal_number: int, frame: FrameType | None) -> None:
    raise _OutOfTime


def _own_standard_output() -> IO[str]:
    """Standard output, out of reach of libraries that print: what they print goes nowhere."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 1)
    return replies


def _silence_standard_error() -> None:
    """Up to here it says why a worker cannot start; from here on, parsers complain on it of what models write."""
    sys.stderr.flush()
    os.dup2(1, 2)


def _peak_memory() -> int:
    """Bytes, of this program alone: the kernel's `ru_maxrss` would begin with that of the (large) process that started it."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _reply(replies: IO[str], message: dict[str, Any]) -> None:
    try:
        replies.write(json.dumps(message) + "\n")
        replies.flush()
    except BrokenPipeError:
        os._exit(0)  # the parent is gone


if __name__ == "__main__":
    main()
