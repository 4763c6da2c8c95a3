"""The rollout servers of a run, as its main rank sees them: started or named, watched, started again.

What lives is up to take weights. Whether it has any is not known here but to the one who sends them (`rollout/remote.py`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from prism_nemo.rollout.base import RolloutError
from prism_nemo.rollout.exchange import Address, ExchangeError
from prism_nemo.rollout.processes import ServerProcess
from prism_nemo.rollout.weight_link import HEALTH, Receiver
from prism_nemo.waiting import waiting

MAX_DEATHS = 3  # in a row, without an answer in between
_WRONG_INPUT = 2  # the exit status of a PrismError: the next start would end the same way
_WATCH_SECONDS = 0.1
_PROBE_SECONDS = (0.5, 30.0)  # between probes, twice as long each time
_PROBE_TIMEOUT_SECONDS = 5.0  # also what closing may wait for
_log = logging.getLogger(__name__)


class Member(Protocol):
    """One server. Its methods are called by one thread at a time."""

    name: str
    problem: str  # what happened to it last; "" while all is well
    hopeless: bool  # it does not come back
    receiver: Receiver | None  # None while it is not up

    def watch(self) -> bool:
        """Looks after it; whether something changed."""
        ...

    def broken(self, what: str) -> None:
        """It failed at its work."""
        ...

    def answered(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Launch:
    """How servers of this machine are started."""

    config_file: Path
    log_directory: Path
    token: str
    startup_timeout_seconds: float


class LocalMember:
    """A server that this run starts, and starts again when it dies, freezes or answers nonsense."""

    def __init__(self, index: int, launch: Launch) -> None:
        self.name = f"replica {index}"
        self.problem = ""
        self.hopeless = False
        self.receiver: Receiver | None = None
        self.starts = 0
        self._index, self._launch = index, launch
        self._deaths = 0
        self._process = self._start()

    def _start(self) -> ServerProcess:
        self.starts += 1
        self._deadline = time.monotonic() + self._launch.startup_timeout_seconds
        log = self._launch.log_directory / f"replica-{self._index}.log"
        return ServerProcess(self._launch.config_file, log, index=self._index, token=self._launch.token)

    def watch(self) -> bool:
        if self.hopeless:
            return False
        status = self._process.exit_status
        if status is not None:
            self._died(f"ended with status {status}", final=status == _WRONG_INPUT)
            return True
        if self.receiver is not None:
            return False
        told = self._process.address()
        if told is not None:
            self.receiver = Receiver(self.name, told[1], Address(told[0], self._launch.token))
            _log.info("%s is up at %s", self.name, told[0])
            return True
        if time.monotonic() > self._deadline:
            self._died(f"was not up after {self._launch.startup_timeout_seconds:g} s")
            return True
        return False

    def broken(self, what: str) -> None:
        self._died(what)

    def answered(self) -> None:
        self._deaths, self.problem = 0, ""

    def close(self) -> None:
        self.receiver, self.hopeless = None, True
        self._process.end(at_once=False)

    def _died(self, what: str, *, final: bool = False) -> None:
        self._process.end(at_once=True)
        self.receiver = None
        self._deaths += 1
        self.hopeless = final or self._deaths >= MAX_DEATHS
        self.problem = f"{what}; the last lines of its log:\n{self._process.last_lines()}"
        if self.hopeless:
            _log.error("%s %s, %d times without an answer: it is given up", self.name, what, self._deaths)
        else:
            _log.warning("%s %s: it is started again", self.name, what)
            self._process = self._start()


class ForeignMember:
    """A server that others start: it is asked whether it is there, ever more rarely while it is not."""

    def __init__(self, url: str, token: str | None) -> None:
        self.name = url
        self.problem = "was not asked yet"
        self.hopeless = False
        self.receiver: Receiver | None = None
        self._address = Address(url, token)
        self._next, self._pause = 0.0, _PROBE_SECONDS[0]

    def watch(self) -> bool:
        if self.receiver is not None or self.hopeless or time.monotonic() < self._next:
            return False
        before = self.problem
        try:
            reply = self._address.get(HEALTH, timeout_seconds=_PROBE_TIMEOUT_SECONDS)
            if not reply.ok:
                raise ExchangeError(reply.problem)
            instance = reply.json().get("instance")
            if not isinstance(instance, str):
                raise ExchangeError("it is no rollout server")
            self.receiver = Receiver(self.name, instance, self._address)
            self.problem, self._pause = "", _PROBE_SECONDS[0]
            _log.info("%s is up", self.name)
            return True
        except ExchangeError as error:
            self.problem = str(error)
        if self.problem != before:
            _log.warning("%s is not up: %s", self.name, self.problem)
        self._next, self._pause = time.monotonic() + self._pause, min(2 * self._pause, _PROBE_SECONDS[1])
        return True

    def broken(self, what: str) -> None:
        self.receiver, self.problem = None, what
        self._next = time.monotonic() + self._pause

    def answered(self) -> None:
        self.problem = ""

    def close(self) -> None:
        self.hopeless = True


class Fleet:
    """All servers, each watched by a thread of its own."""

    def __init__(self, members: Sequence[Member], startup_timeout_seconds: float) -> None:
        self._members = {member.name: member for member in members}
        self._startup_timeout = startup_timeout_seconds
        self._changed = threading.Condition()
        self._locks = {name: threading.Lock() for name in self._members}
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=self._watch, args=(member,), daemon=True) for member in members]
        for thread in self._threads:
            thread.start()

    def up(self) -> list[Receiver]:
        """The servers that can be given weights now."""
        return [member.receiver for member in self._members.values() if member.receiver is not None]

    @waiting("rollout servers that start")
    def wait(self, seconds: float, *, for_all: bool, since: float) -> bool:
        """Whether servers are up: any, or `for_all` as many as can be expected. Waits `seconds` at most.

        Raises RolloutError, with what happened to each, when there are none, and none comes back or the time for that is over;
        it began at `since` (time.monotonic()).
        """

        def enough() -> bool:
            waited_for = [m for m in self._members.values() if not m.hopeless]
            up = len(self.up())
            return not waited_for or (up > 0 and (not for_all or up >= len(waited_for)))

        with self._changed:
            left = since + self._startup_timeout - time.monotonic()
            self._changed.wait_for(enough, timeout=max(0.0, min(seconds, left)))
            if enough() and self.up():
                return True
            over = time.monotonic() >= since + self._startup_timeout
            if over and self.up():
                _log.warning("not all rollout servers are up:\n%s", self.describe())
                return True
            if over or all(member.hopeless for member in self._members.values()):
                raise RolloutError(
                    f"no rollout server is up\n{self.describe()}",
                    where="rollout.servers",
                    remedy="see what each of them says; rollout.servers.startup_timeout_seconds is how long they are waited for",
                )
        return False

    def report(self, name: str, instance: str, what: str) -> None:
        """A server failed; nothing, if another instance has taken its place by now."""
        self._tell(name, instance, lambda member: member.broken(what))

    def answered(self, name: str, instance: str) -> None:
        self._tell(name, instance, lambda member: member.answered())

    def restarts(self) -> int:
        """Of all servers, so far."""
        return sum(member.starts - 1 for member in self._members.values() if isinstance(member, LocalMember))

    def describe(self) -> str:
        lines = (f"  {m.name}: {m.problem or ('is starting' if m.receiver is None else 'is up')}" for m in self._members.values())
        return "\n".join(lines)

    def close(self) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join()
        closing = [threading.Thread(target=member.close) for member in self._members.values()]
        for thread in closing:
            thread.start()
        for thread in closing:
            thread.join()

    def _tell(self, name: str, instance: str, message: Callable[[Member], None]) -> None:
        member = self._members[name]
        with self._locks[name]:
            if member.receiver is not None and member.receiver.instance == instance and not self._closed.is_set():
                _safely(member, message)
        with self._changed:
            self._changed.notify_all()

    def _watch(self, member: Member) -> None:
        while not self._closed.wait(_WATCH_SECONDS):
            with self._locks[member.name]:
                changed = _safely(member, lambda member: member.watch())
            if changed is not False:
                with self._changed:
                    self._changed.notify_all()


def _safely(member: Member, action: Callable[[Member], bool | None]) -> bool | None:
    """Where a process cannot be started, for want of memory say, this is what happened to the server; it is looked at again."""
    try:
        return action(member)
    except Exception as error:
        _log.exception("%s", member.name)
        member.problem = f"{type(error).__name__}: {error}"
        return True
