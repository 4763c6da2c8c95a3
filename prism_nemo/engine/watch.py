"""A watch over the ranks of a run: one that dies, freezes or fails ends all others soon, and each says which it was, and why.

Every rank has a thread that writes a sign of life into the store by which the ranks have met, over a connection of its own. The
main rank's looks at all of them and writes down who is lost; the others look at that and at the main rank. What a step does has
no part in it: a thread goes on while its process compiles, samples for an hour or saves, so only a process that is dead or
stopped (or a machine that is) falls silent.

A process that lives and does nothing, in a deadlock or before a file system that does not answer, is found by what it tells of
its own activity (`engine/activity.py`), once all the others can only be waiting for it. One that computes without end cannot be
told from one that has much to compute: there the time limit of collectives (`runtime.distributed_timeout_minutes`) ends the run,
and here the one that did not come is named.
"""

from __future__ import annotations

import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch.distributed as dist

from prism_nemo.engine.activity import Activity

BEAT_SECONDS = 1.0
SOONER_SECONDS = 8.0  # silence of a rank that is lost for certain: another's connection to it has broken
OTHERS_SECONDS = 10.0  # for which all others must have been waiting before an idle rank ends the run
LAST_WORDS_SECONDS = 3.0  # how long the others get to read why
CLEAN_UP_SECONDS = 10.0  # between the end's cause and the end: to write may be just what hangs
STACKS = "stacks"  # in a run's directory
_BACKENDS_ERROR = re.compile(r"gloo|nccl|connection (closed|reset)|timed out waiting", re.IGNORECASE)  # also out of `wait()`
_TORCH = str(Path(dist.__file__).parent)


class State(StrEnum):
    running = "running"
    cut_off = "cut off"  # a collective failed here, for a reason that lies elsewhere
    failed = "failed"
    done = "done"


class RankLost(RuntimeError):
    """The run cannot go on because of another rank. Not a user's mistake: the process ends with status 1."""


@dataclass
class Sign:
    """What a rank tells of itself."""

    host: str
    beats: int = 0
    state: State = State.running
    doing: str = "starting"
    where: str = ""  # the code that its main thread is in; "" inside of a collective
    cause: str = ""  # of its failure
    idle: float = 0.0  # seconds for which it has done nothing
    waiting: float = 0.0  # seconds for which it can have been waiting for others

    def describe(self, rank: int) -> str:
        where = f" (in {self.where})" if self.where else ""
        return f"rank {rank} on {self.host}, which was at: {self.doing}{where}"


class Watch:
    """This rank's part. `on_end` is called, with the reason, before the watch ends the process by itself."""

    def __init__(
        self, store: dist.Store, rank: int, world_size: int, silence_seconds: float, stuck_seconds: float | None = None
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.silence_seconds = silence_seconds
        self.stuck_seconds = stuck_seconds
        self.directory: Path | None = None
        self.on_end: Callable[[str], None] = lambda reason: None
        self.sign = Sign(socket.gethostname())
        self.verdict: str | None = None
        self._store = dist.PrefixStore("prism_nemo/watch", store)
        self._explained: tuple[BaseException, BaseException] | None = None
        self._signs: list[Sign] = [Sign("?") for _ in range(world_size)]
        self._silent = [0.0] * world_size  # seconds for which a rank's beats have not gone on
        self._cut_off_for = 0.0  # seconds since somebody was
        self._unanswered = 0.0  # seconds for which the store has not answered
        self._main_takes_over = False
        self._activity = Activity()
        self._stop = threading.Event()
        self._decided = threading.Event()
        self._told = threading.Event()  # the last that there is to tell
        self._lock = threading.Lock()
        self._beat()

    def start(self) -> None:
        """Once every rank has been constructed."""
        for work in (self._talk, self._guard):
            threading.Thread(target=work, name=f"watch {work.__name__}", daemon=True).start()

    # What this rank tells

    def _beat(self, passed: float = 0.0) -> None:
        self.sign.beats += 1
        activity = self._activity
        activity.look(passed)
        hint = ", in the kernel: does a file system or a device not answer?" if activity.in_kernel and activity.idle else ""
        self.sign.where = activity.place.where + hint
        self.sign.idle, self.sign.waiting = activity.idle, activity.waiting
        self._store.set(f"rank{self.rank}", json.dumps(asdict(self.sign)))

    def _talk(self) -> None:
        self._activity.ignored.add(threading.get_native_id())
        last = time.monotonic()
        while not self._stop.wait(BEAT_SECONDS if self.sign.state is State.running else BEAT_SECONDS / 4):
            now = time.monotonic()
            # At most two beats: a job that was suspended as a whole wakes up, and finds nobody silent for hours.
            passed, last = min(now - last, 2 * BEAT_SECONDS), now
            state = self.sign.state
            try:
                self._beat(passed)
                if self.rank and state in (State.failed, State.done):
                    break
                reason = self._judge(passed) if self.rank == 0 else self._listen(passed)
            except (RuntimeError, ValueError) as error:  # what a store has when its connection breaks
                reason = f"the store of {self._signs[0].describe(0)}, is gone ({_first_line(error)})"
            self._unanswered = 0.0
            if reason is not None:
                self._end(reason)
                break
        self._told.set()

    def _guard(self) -> None:
        """Finds that the store, and with it the main rank, has frozen: requests to it never come back."""
        self._activity.ignored.add(threading.get_native_id())
        while not self._stop.wait(BEAT_SECONDS) and not self._told.is_set():
            self._unanswered += BEAT_SECONDS
            if self._unanswered > self.silence_seconds + BEAT_SECONDS:
                self._end(f"no answer for {self._unanswered:.0f} s from the store of {self._signs[0].describe(0)}")
                return

    # What it makes of the others

    def _listen(self, passed: float) -> str | None:
        self._note(0, self._store.get("rank0"), passed)
        if self._store.check(["verdict"]):
            return str(self._store.get("verdict").decode())
        reason = self._silence(0, self.silence_seconds)
        if reason is not None:
            self._store.set("verdict", reason)
        return reason

    def _judge(self, passed: float) -> str | None:
        """On the main rank: why the run cannot go on."""
        texts = self._store.multi_get([f"rank{rank}" for rank in range(self.world_size)])
        for rank, text in enumerate(texts):
            self._note(rank, text, passed)
        reason = self._reason(passed)
        if reason is not None:
            self._store.set("verdict", reason)
        return reason

    def _reason(self, passed: float) -> str | None:
        for rank, sign in enumerate(self._signs):
            if sign.state is State.failed:
                return f"{sign.describe(rank)}, has failed: {sign.cause}"
        cut_off = [(rank, sign) for rank, sign in enumerate(self._signs) if sign.state is State.cut_off]
        limit = min(SOONER_SECONDS, self.silence_seconds) if cut_off else self.silence_seconds
        for rank in range(self.world_size):
            reason = self._silence(rank, limit)
            if reason is not None:
                return reason
        reason = self._stuck()
        if reason is not None or not cut_off:
            return reason
        self._cut_off_for += passed
        if self._cut_off_for < limit + 2 * BEAT_SECONDS:
            return None
        stuck = [sign.describe(rank) for rank, sign in enumerate(self._signs) if sign.state is State.running and sign.where]
        rank, sign = cut_off[0]
        if stuck:
            return f"the others have waited in vain for {'; '.join(stuck)} (rank {rank} saw: {sign.cause})"
        return f"a collective failed and all ranks live; {sign.describe(rank)}, saw: {sign.cause}"

    def _stuck(self) -> str | None:
        live = [(rank, sign) for rank, sign in enumerate(self._signs) if sign.state is State.running]
        if self.stuck_seconds is None or any(sign.waiting < min(OTHERS_SECONDS, self.stuck_seconds) for _, sign in live):
            return None
        idle = [(rank, sign) for rank, sign in live if sign.idle > self.stuck_seconds]
        stuck = [f"{sign.describe(rank)}, has done nothing for {sign.idle:.0f} s" for rank, sign in idle]
        if not stuck:
            return None
        return f"{'; '.join(stuck)}: no processor time, no byte read or written. All the others wait"

    def _note(self, rank: int, text: bytes, passed: float) -> None:
        sign = Sign(**json.loads(text))
        sign.state = State(sign.state)
        self._silent[rank] = 0.0 if sign.beats != self._signs[rank].beats else self._silent[rank] + passed
        self._signs[rank] = sign

    def _silence(self, rank: int, limit: float) -> str | None:
        sign = self._signs[rank]
        if sign.state in (State.done, State.failed) or self._silent[rank] <= limit:
            return None
        return f"no sign of life for {self._silent[rank]:.0f} s from {sign.describe(rank)}: its process is dead or stopped"

    # The end

    def _end(self, reason: str) -> None:
        with self._lock:
            if self._decided.is_set():
                return
            self.verdict = reason
            self._decided.set()
            exit_within(CLEAN_UP_SECONDS)
            if self._main_takes_over:
                return
        self._say(reason)
        with suppress(Exception):
            self.on_end(reason)
        self._linger()
        os._exit(1)

    def _say(self, reason: str) -> None:
        doing = self.sign.doing
        print(f"[rank {self.rank} on {self.sign.host}, at: {doing}] the run ends: {reason}", file=sys.stderr, flush=True)
        if self.directory is not None:
            with suppress(OSError):
                folder = self.directory / STACKS
                folder.mkdir(exist_ok=True)
                with (folder / f"rank_{self.rank}.txt").open("w", encoding="utf-8") as file:
                    file.write(f"rank {self.rank} on {self.sign.host}, at: {doing}\nthe run ended: {reason}\n\n")
                    file.flush()
                    faulthandler.dump_traceback(file)

    def _linger(self) -> None:
        """The main rank's process may hold the store: it stays until the others have read the verdict, or could have."""
        if self.rank != 0:
            return
        deadline = time.monotonic() + LAST_WORDS_SECONDS
        while time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS / 4)

    def explain(self, error: BaseException) -> BaseException:
        """What to raise in place of an error that ends this rank's part: for a broken collective, RankLost that names the cause.

        Tells the other ranks, and waits until it is known. Idempotent.
        """
        if self._explained is not None and error in self._explained:
            return self._explained[1]
        if isinstance(error, SystemExit):
            return error
        with self._lock:
            self._main_takes_over = True
        self.sign.cause = f"{type(error).__name__}: {_first_line(error)}"
        if not _is_from_a_collective(error):
            self.sign.state = State.failed
            self._explained = (error, error)
            self._told.wait(LAST_WORDS_SECONDS)
            return error
        self.sign.state = State.cut_off
        known = self._decided.wait(self.silence_seconds + 4 * LAST_WORDS_SECONDS)
        reason = self.verdict if known and self.verdict else f"a collective failed: {self.sign.cause}"
        exit_within(CLEAN_UP_SECONDS)
        self._say(reason)
        lost = RankLost(reason)
        self._explained = (error, lost)
        return lost

    def stop(self) -> None:
        """At the end of this rank's part. The main rank's returns when no other needs the store any more."""
        if self.sign.state is State.running:
            self.sign.state = State.done
        if self.rank:
            self._told.wait(LAST_WORDS_SECONDS)
        elif self.sign.state is State.done:
            # Its thread goes on meanwhile, and ends the wait when one of them is lost.
            while any(sign.state is State.running for sign in self._signs[1:]) and not self._decided.is_set():
                time.sleep(BEAT_SECONDS / 20)
        else:
            self._linger()
        self._stop.set()


def exit_within(seconds: float) -> None:
    """Ends the process, whatever it is doing: closing may wait for ranks that are gone."""
    timer = threading.Timer(seconds, os._exit, (1,))
    timer.daemon = True
    timer.start()


def is_of_another_rank(error: BaseException) -> bool:
    """Whether the reason for an error lies with another rank."""
    return isinstance(error, RankLost) or _is_from_a_collective(error)


def _is_from_a_collective(error: BaseException) -> bool:
    """Whether torch.distributed raised it, in which case the reason lies with another rank."""
    if isinstance(error, dist.DistError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    within = bool(frames) and frames[-1].filename.startswith(_TORCH)
    return within or _BACKENDS_ERROR.search(str(error)) is not None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")


_watch: Watch | None = None


def begin(silence_seconds: float | None, stuck_seconds: float | None) -> None:
    """Starts the watch of the default group's ranks, if there are several. A collective."""
    global _watch
    if silence_seconds is None or dist.get_world_size() == 1:
        return
    store: Any = dist.distributed_c10d._get_default_store()
    _watch = Watch(store.clone(), dist.get_rank(), dist.get_world_size(), silence_seconds, stuck_seconds)
    dist.barrier()
    _watch.start()
    if _watch.rank == 0:
        print(f"{_watch.world_size} ranks have met", file=sys.stderr, flush=True)


def end() -> None:
    global _watch
    if _watch is not None:
        _watch.stop()
        _watch = None


def doing(what: str) -> None:
    """What this rank is at, for the others to say should it be lost."""
    if _watch is not None:
        _watch.sign.doing = what


def explain(error: BaseException) -> BaseException:
    """`Watch.explain`; the error itself when nobody watches."""
    return error if _watch is None else _watch.explain(error)


def report_to(directory: Path, on_end: Callable[[str], None]) -> None:
    """Stacks go into the run's directory when the watch ends it; `on_end(reason)` is called before."""
    if _watch is not None:
        _watch.directory, _watch.on_end = directory, on_end
