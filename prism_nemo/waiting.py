"""Waits that may be long and that end by themselves, declared where they are: who watches this process leaves it alone then.

    with waiting("a rollout server"):
        reply = connection.getresponse()  # has a time limit of its own

A process that does nothing for long, and has not said so here, is taken for stuck (`engine/watch.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

_waits: dict[int, str] = {}
_numbers = itertools.count()


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """In any thread: the block waits for something outside of this process, and has a limit to its time."""
    number = next(_numbers)
    _waits[number] = what
    try:
        yield
    finally:
        del _waits[number]


def waited_for() -> str | None:
    """What is waited for now, the oldest of several; None: nothing."""
    return next(iter(_waits.copy().values()), None)
