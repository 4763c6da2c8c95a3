"""SIGTERM and SIGUSR1, by which a scheduler tells a run to save and go."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: saved on a signal; run the same command again


class StopSignals:
    """As a context manager it takes note of the signals, for the program to ask `received` where it can stop.

    Within another one (a stage within a pipeline) both take note, so that a signal which the inner one's program had no more use
    for is not lost.
    """

    def __init__(self) -> None:
        self.received = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._handlers = {number: signal.signal(number, self.note) for number in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        outer = getattr(self._handlers.get(signal.Signals(number)), "__self__", None)
        if isinstance(outer, StopSignals):
            outer.note(number, frame)
