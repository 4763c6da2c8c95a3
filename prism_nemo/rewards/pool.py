"""Questions that need computer algebra, decided by processes that may fail without harm.

A pathological expression can neither stall nor crash the run: every worker (rewards/worker.py) holds itself to limits of
processor time and memory, and what dies is replaced. Limits count *processor* time, so that a busy machine changes no reward; the
limit of wall-clock time behind it only bounds the unforeseen (a stopped process), and its question is asked again.

Workers are fresh interpreters that talk over pipes, never forks: a fork of a process with threads (torch's, gloo's) may hang.
They start when first needed. `decide` may be called from any thread, and from several: one batch is worked on at a time.
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import prism_nemo
from prism_nemo.errors import PrismError
from prism_nemo.rewards.question import Question
from prism_nemo.rewards.worker import TIME
from prism_nemo.waiting import waiting

_MAX_ATTEMPTS = 3  # of a question whose worker dies without having reached a limit
_MAX_FAILED_STARTS = 10  # in a row
_WALL_SECONDS_PER_LIMIT, _LEAST_WALL_SECONDS = 30.0, 120.0  # far beyond what a busy machine makes of the limit
_CLOSING_SECONDS = 5.0


class Decision(enum.Enum):
    """How a question ended. Only EQUAL is worth anything."""

    EQUAL = "equal"
    DIFFERENT = "different"
    TIMEOUT = "timeout"  # out of processor time
    CRASH = "crash"  # out of memory, or the worker died with it again and again


class Pool:
    """Up to `num_workers` processes. A context manager; also closed when it is collected, and when the process ends in any way.

    time_limit_seconds   processor time per question
    memory_limit_mb      address space per worker
    """

    def __init__(self, *, num_workers: int, time_limit_seconds: float, memory_limit_mb: int) -> None:
        self._num_workers = num_workers
        self._options = ["--time-limit-seconds", str(time_limit_seconds), "--memory-limit-mb", str(memory_limit_mb)]
        self._wall_limit = max(_LEAST_WALL_SECONDS, _WALL_SECONDS_PER_LIMIT * time_limit_seconds)
        self._workers: list[_Worker] = []
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._finalizer = weakref.finalize(self, _close_all, self._workers)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the workers. A closed pool starts new ones when it is asked again."""
        with self._lock:
            _close_all(self._workers)

    @property
    def process_ids(self) -> list[int]:
        """Of the workers that are there now."""
        return [worker.process.pid for worker in list(self._workers)]

    def decide(self, questions: Sequence[Question]) -> list[Decision]:
        """One decision for each question, in order. Raises PrismError when no worker can be started."""
        if not questions:
            return []
        with self._lock:
            if self._owner != os.getpid():  # in a fork: these workers are the parent's
                self._workers[:], self._owner = [], os.getpid()
            batch = _Batch(questions)
            try:
                self._work_through(batch)
            except BaseException:  # an interrupt: no later batch may read this one's replies
                _close_all(self._workers, kill=True)
                raise
            return [batch.decisions[index] for index in range(len(questions))]

    @waiting("processes that verify expressions")
    def _work_through(self, batch: _Batch) -> None:
        failed_starts = 0
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
                batch.assign_to(worker)
            while not batch.done:
                while len(self._workers) < min(self._num_workers, batch.unfinished):
                    worker = _Worker(self._options)
                    self._workers.append(worker)
                    selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
                for key, _ in selector.select(timeout=1.0):
                    worker = key.data
                    replies = worker.read()
                    if replies is None:
                        failed_starts = 0 if worker.ready else failed_starts + 1
                        self._bury(worker, selector, batch, failed_starts)
                        continue
                    for reply in replies:
                        batch.take(worker, reply)
                        if reply.get("retire"):
                            self._remove(worker, selector)
                        else:
                            batch.assign_to(worker)
                overdue = [worker for worker in self._workers if worker.busy_for() > self._wall_limit]
                for worker in overdue:
                    worker.kill()  # its end is read in the next round

    def _bury(self, worker: _Worker, selector: selectors.BaseSelector, batch: _Batch, failed_starts: int) -> None:
        self._remove(worker, selector)
        code = worker.process.returncode
        if not worker.ready and (code > 0 or failed_starts >= _MAX_FAILED_STARTS):
            raise PrismError(
                f"the process that verifies expressions does not start (exit status {code}): {worker.complaint}",
                remedy="install the requirements again (it needs math-verify), or raise reward.memory_limit_mb",
            )
        batch.lose(worker, out_of_time=code == -signal.SIGXCPU)

    def _remove(self, worker: _Worker, selector: selectors.BaseSelector) -> None:
        selector.unregister(worker.process.stdout)  # type: ignore[arg-type]
        self._workers.remove(worker)
        worker.close()


class _Batch:
    """Which questions wait, which are with a worker, and how the others ended."""

    def __init__(self, questions: Sequence[Question]) -> None:
        self.questions = questions
        self.decisions: dict[int, Decision] = {}
        self._waiting = deque(range(len(questions)))
        self._attempts = [0] * len(questions)

    @property
    def unfinished(self) -> int:
        return len(self.questions) - len(self.decisions)

    @property
    def done(self) -> bool:
        return not self.unfinished

    def assign_to(self, worker: _Worker) -> None:
        if worker.ready and worker.task is None and self._waiting:
            index = self._waiting.popleft()
            self._attempts[index] += 1
            worker.ask(index, self.questions[index])

    def take(self, worker: _Worker, reply: dict[str, Any]) -> None:
        if "id" not in reply:
            return
        assert reply["id"] == worker.task
        worker.task = None
        if "limit" in reply:
            decision = Decision.TIMEOUT if reply["limit"] == TIME else Decision.CRASH
        else:
            decision = Decision.EQUAL if reply["equal"] else Decision.DIFFERENT
        self.decisions[reply["id"]] = decision

    def lose(self, worker: _Worker, *, out_of_time: bool) -> None:
        """The worker died: its question is asked again, unless that is what it died of."""
        index, worker.task = worker.task, None
        if index is None:
            return
        if out_of_time:
            self.decisions[index] = Decision.TIMEOUT
        elif self._attempts[index] >= _MAX_ATTEMPTS:
            self.decisions[index] = Decision.CRASH
        else:
            self._waiting.appendleft(index)


class _Worker:
    """One process, starting, idle or busy with one question."""

    def __init__(self, options: Sequence[str]) -> None:
        root = str(Path(prism_nemo.__file__).parents[1])
        known = os.environ.get("PYTHONPATH")
        environment = {
            **os.environ,
            "PYTHONPATH": root if not known else os.pathsep.join((root, known)),
            "PYTHONHASHSEED": "0",  # the order of sets, and with it the path that simplification takes
        }
        self.complaint = ""  # the last of what it wrote to standard error before it was ready, once it is closed
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the worker)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "prism_nemo.rewards.worker", *options],  # -P: no module of the working directory
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            bufsize=0,
        )
        self.ready = False
        self.task: int | None = None
        self._since = time.monotonic()
        self._read = b""

    def busy_for(self) -> float:
        """Seconds since it was started or asked and has not replied."""
        return time.monotonic() - self._since if self.task is not None or not self.ready else 0.0

    def ask(self, index: int, question: Question) -> None:
        self.task, self._since = index, time.monotonic()
        request = memoryview((json.dumps({"id": index, **question._asdict()}) + "\n").encode())
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died: that is seen where its replies are read
            while request:  # a signal may cut a write short
                request = request[self.process.stdin.write(request) :]

    def read(self) -> list[dict[str, Any]] | None:
        """The replies that have come; None at the end of them."""
        assert self.process.stdout is not None
        read = self.process.stdout.read(65536)
        if not read:
            self.process.wait()
            return None
        *lines, self._read = (self._read + read).split(b"\n")
        replies = [json.loads(line) for line in lines]
        self.ready = self.ready or any("ready" in reply for reply in replies)
        return replies

    def kill(self) -> None:
        self.process.kill()

    def tell_to_end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        if self.task is not None or not self.ready:
            self.process.kill()

    def close(self) -> None:
        """Ends it: by itself when it is idle, by force when it is busy or does not."""
        assert self.process.stdout is not None
        self.tell_to_end()
        self.process.stdout.close()
        try:
            self.process.wait(_CLOSING_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if not self.ready and not self._errors.closed:
            self._errors.seek(0)
            self.complaint = self._errors.read()[-500:].decode(errors="replace").strip()
        self._errors.close()


def _close_all(workers: list[_Worker], *, kill: bool = False) -> None:
    for worker in workers:
        if kill:
            worker.kill()
        worker.tell_to_end()
    for worker in workers:
        worker.close()
    workers.clear()
