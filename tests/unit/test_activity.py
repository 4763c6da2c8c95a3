"""Whether a process is found idle or at work, by what really goes on in its threads and in the processes that it starts."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import prism_nemo.engine.activity as module
from prism_nemo.engine.activity import Activity
from prism_nemo.waiting import waited_for, waiting

pytestmark = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="Linux tells what threads do")
SECONDS = 60.0  # for what takes one


class Looks:
    """A watch that looks ten times a second, and keeps what it saw, while the main thread does something."""

    def __init__(self, passed: float = 0.1) -> None:
        self.activity = Activity()
        self.idle: list[float] = []
        self.waiting: list[float] = []
        self.over = threading.Event()
        self._passed = passed
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        self.activity.ignored.add(threading.get_native_id())
        while not self.over.wait(self._passed):
            self.activity.look(self._passed)
            self.idle.append(self.activity.idle)
            self.waiting.append(self.activity.waiting)

    def __enter__(self) -> Looks:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.over.set()
        self._thread.join()


def main_waits_in(block: Callable[[threading.Event], None], until: Callable[[Looks], bool]) -> Looks:
    """The main thread is in `block(over)`, and `over` is set once `until(looks)`, or after a time in which it should be."""
    over = threading.Event()

    def end() -> None:
        deadline = time.monotonic() + SECONDS
        while not until(looks) and time.monotonic() < deadline:
            time.sleep(0.05)
        over.set()

    with Looks() as looks:
        ending = threading.Thread(target=end, daemon=True)
        ending.start()
        block(over)
        ending.join()
    return looks


def found_idle(looks: Looks) -> bool:
    return max(looks.idle, default=0.0) > 1.0


def looked(count: int) -> Callable[[Looks], bool]:
    return lambda looks: len(looks.idle) >= count


def test_a_lock_that_nobody_opens_is_idle() -> None:
    looks = main_waits_in(lambda over: over.wait() and None, found_idle)
    assert found_idle(looks)
    assert max(looks.waiting) >= max(looks.idle), "who is idle may be waiting for others"


def test_a_read_that_never_comes_back_is_idle(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    def block(over: threading.Event) -> None:
        threading.Thread(target=lambda: over.wait() and (tmp_path / "pipe").open("wb").close(), daemon=True).start()
        (tmp_path / "pipe").read_bytes()

    assert found_idle(main_waits_in(block, found_idle))


def test_a_wait_that_is_declared_is_not() -> None:
    def block(over: threading.Event) -> None:
        with waiting("a server"):
            assert waited_for() == "a server"
            over.wait()

    assert not any(main_waits_in(block, looked(20)).idle)
    assert waited_for() is None


def test_declared_in_any_thread() -> None:
    """As where the main thread waits for one that waits for a server."""

    def block(over: threading.Event) -> None:
        def other() -> None:
            with waiting("a server"):
                over.wait()

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    assert not any(main_waits_in(block, looked(20)).idle[5:])


def test_work_of_another_thread_or_process_is_work(tmp_path: Path) -> None:
    def thread(over: threading.Event) -> None:
        def count() -> None:
            while not over.is_set():
                sum(range(10_000))

        worker = threading.Thread(target=count)
        worker.start()
        worker.join()

    assert not found_idle(main_waits_in(thread, looked(20)))

    def process(over: threading.Event) -> None:
        child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        threading.Thread(target=lambda: over.wait() and child.kill(), daemon=True).start()
        child.wait()

    assert not found_idle(main_waits_in(process, looked(20)))


def test_a_process_that_only_reads_is_at_work(tmp_path: Path) -> None:
    """From a slow disk: hardly any processor time, some bytes now and then."""
    child = "import os, time\nwhile True: os.read(os.open('/dev/zero', 0), 100_000); time.sleep(0.02)"

    def process(over: threading.Event) -> None:
        reader = subprocess.Popen([sys.executable, "-S", "-c", child])
        threading.Thread(target=lambda: over.wait() and reader.kill(), daemon=True).start()
        reader.wait()

    assert not found_idle(main_waits_in(process, looked(20)))


def test_what_is_brought_to_the_disk_has_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_is_syncing", lambda process: True)
    monkeypatch.setattr(module, "SYNC_SECONDS", 2.0)
    looks = main_waits_in(lambda over: over.wait() and None, found_idle)
    first = next(number for number, idle in enumerate(looks.idle) if idle > 0)
    assert first >= 20, "two seconds, and then as any other"


def test_a_thread_that_syncs_is_seen(tmp_path: Path) -> None:
    """By the kernel's word, of a call that takes long enough to be met."""
    over, seen = threading.Event(), []

    def sync() -> None:
        with (tmp_path / "file").open("wb") as file:
            while not over.is_set():
                file.write(bytes(1 << 20))
                file.flush()
                file.seek(0)
                os.fsync(file.fileno())

    thread = threading.Thread(target=sync)
    thread.start()
    task = Path("/proc/self/task") / str(thread.native_id)
    deadline = time.monotonic() + SECONDS
    while not seen and time.monotonic() < deadline:
        if module._is_syncing(task):
            seen.append(True)
    over.set()
    thread.join()
    assert seen or os.uname().machine not in ("x86_64", "aarch64")


def test_in_a_debugger_nobody_is_idle() -> None:
    code = compile("def wait(over):\n    over.wait()\n", "/usr/lib/python3/bdb.py", "exec")
    names: dict[str, Callable[[threading.Event], None]] = {}
    exec(code, names)
    assert not any(main_waits_in(names["wait"], looked(20)).idle)


def test_one_that_waits_in_a_collective_is_not_idle_and_waits() -> None:
    code = compile("def wait(over):\n    over.wait()\n", f"{module._COLLECTIVES[0]}.py", "exec")
    names: dict[str, Callable[[threading.Event], None]] = {}
    exec(code, names)
    looks = main_waits_in(names["wait"], looked(20))
    assert not any(looks.idle)
    assert looks.waiting[-1] > 1.0


def test_where_nothing_is_told_nobody_is_idle(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "_PROC", tmp_path)
    assert not any(main_waits_in(lambda over: over.wait() and None, looked(20)).idle)
