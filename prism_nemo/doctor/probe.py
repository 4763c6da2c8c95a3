"""Checks that may hang, each in a child process that is killed when its time is up.

`python -m prism_nemo.doctor.probe NAME` reads its arguments as JSON from standard input, writes {"at": ...} to standard output
whenever it gets somewhere, and {"value": ...} at its end.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

_LAST_BYTES = 2000
_DEATH_SECONDS = 0.5
_ASK_SECONDS = 1.0


class ProbeFailed(Exception):
    """A child hung or died; the message says how far it had come."""


class Probe:
    """A child that runs `probes.NAME(**arguments)`; limit: seconds from its start."""

    def __init__(
        self, name: str, arguments: Mapping[str, Any], *, limit: float, environment: Mapping[str, str] | None = None
    ) -> None:
        self._deadline = time.monotonic() + limit
        self._limit = limit
        self._at = "starting"
        self._value: tuple[Any] | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "prism_nemo.doctor.probe", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,
            env={**os.environ, **(environment or {})},
        )
        assert self._process.stdin is not None
        self._input = self._process.stdin
        with contextlib.suppress(OSError):
            self._input.write(json.dumps(arguments).encode() + b"\n")
            self._input.flush()
        self._changed = threading.Condition()
        self._over = False
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with contextlib.suppress(ValueError), self._changed:
                told = json.loads(line)
                if isinstance(told, dict):
                    self._at = told.get("at", self._at)
                    self._value = (told["value"],) if "value" in told else self._value
                    self._changed.notify_all()
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def wait_until(self, at: str) -> None:
        """Until the child says that it is there. Raises ProbeFailed."""
        self._wait(lambda: self._at == at)

    def result(self, in_vain: Callable[[], str | None] = lambda: None) -> Any:
        """What the child found; kills it when its time is up. Raises ProbeFailed.

        in_vain   asked every second: why there is no point in waiting any longer, if there is none
        """
        while True:
            try:
                self._wait(lambda: self._value is not None, at_most=_ASK_SECONDS)
                break
            except TimeoutError:
                why = in_vain()
            if why:
                self.kill()
                raise ProbeFailed(f"was left {self._at}, because {why}")
        self.kill()
        assert self._value is not None
        return self._value[0]

    def _wait(self, happened: Callable[[], bool], at_most: float = math.inf) -> None:
        """Raises ProbeFailed, or TimeoutError after `at_most` seconds."""
        end = time.monotonic() + at_most
        with self._changed:
            while not happened():
                now = time.monotonic()
                if self._over or now >= self._deadline:
                    break
                if now >= end:
                    raise TimeoutError
                self._changed.wait(min(self._deadline, end) - now)
            done, over = happened(), self._over
        if not done:
            self.kill()
            ended = f"ended with status {self._process.poll()}" if over else f"did not answer within {self._limit:g} s"
            raise ProbeFailed(f"{ended}, {self._at}{self._last_words()}")

    def _last_words(self) -> str:
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - _LAST_BYTES))
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        return f" ({lines[-1].strip()})" if lines else ""

    def kill(self) -> None:
        """Does not wait for a child that the kernel cannot end, as on a dead network file system."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_DEATH_SECONDS)


def say_at(where: str) -> None:
    """In a child: how far it has come."""
    print(json.dumps({"at": where}), flush=True)


def _end_with_parent() -> None:
    """However that ends: its end of the pipe closes."""
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    from prism_nemo.doctor import probes

    arguments = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    value = probes.PROBES[sys.argv[1]](**arguments)
    print(json.dumps({"value": value}), flush=True)
    os._exit(0)  # without waiting for threads of libraries


if __name__ == "__main__":
    main()
