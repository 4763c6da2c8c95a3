"""Two runs in one directory: on one machine, on two that do not see each other's locks, after a kill; and who only asks."""

from __future__ import annotations

import errno
import fcntl
import json
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import prism_nemo.run_lock as module
from prism_nemo.errors import PrismError
from prism_nemo.experiment import state_of
from prism_nemo.report.command import run as report
from prism_nemo.run_lock import LOCK, RunLock, is_being_written

QUICK = {"_TOUCH_SECONDS": 0.2, "_LOOK_SECONDS": 4.0, "_LOCK_SECONDS": 0.2}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in QUICK.items():
        monkeypatch.setattr(module, name, seconds)


@contextmanager
def holder(directory: Path, *, host: str | None = None) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock; with `host` one there, whose locks nobody here sees."""
    program = textwrap.dedent(
        """
        import json, socket, sys
        from pathlib import Path
        import prism_nemo.run_lock as module
        directory, host, quick = sys.argv[1:]
        vars(module).update(json.loads(quick))
        if host:
            socket.gethostname = lambda: host
            module.fcntl.flock = lambda *arguments: None
        lock = module.RunLock(Path(directory))
        print("ready", flush=True)
        sys.stdin.read()
        lock.release()
        """
    )
    command = [sys.executable, "-c", program, str(directory), host or "", json.dumps(QUICK)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
        if process.poll() is None:
            process.kill()


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.parametrize("host", [None, "node7"])
def test_one_that_lives_is_named_and_one_that_was_killed_is_not_in_the_way(host: str | None, tmp_path: Path) -> None:
    with holder(tmp_path, host=host) as other:
        with pytest.raises(PrismError, match=rf"another process is writing this run: pid {other.pid} on {host or ''}"):
            RunLock(tmp_path)
        assert is_being_written(tmp_path)
        kill(other)
        lock = RunLock(tmp_path)
        assert is_being_written(tmp_path)
        lock.release()
        assert not is_being_written(tmp_path)


def test_one_that_released_it_elsewhere_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with holder(tmp_path, host="node7") as other:
        other.communicate()
    monkeypatch.setattr(module, "_is_touched", lambda lock: pytest.fail("there is nobody"))
    RunLock(tmp_path).release()


def test_without_locks_the_signs_of_life_keep_a_second_one_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    with holder(tmp_path) as other:
        monkeypatch.setattr(fcntl, "flock", none)
        with pytest.raises(PrismError, match=f"pid {other.pid} on"):
            RunLock(tmp_path)
        kill(other)
        RunLock(tmp_path).release()


def test_who_asks_keeps_nobody_out(tmp_path: Path) -> None:
    (tmp_path / LOCK).touch()
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            is_being_written(tmp_path)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for _ in range(50):
            RunLock(tmp_path).release()
    finally:
        over.set()
        asking.join()


def test_the_state_of_a_run_that_was_killed(tmp_path: Path) -> None:
    status = {"state": "running", "step": 7, "updated": "2026-01-01T00:00:00+00:00", "process": "pid 1 on node7"}
    (tmp_path / "status.json").write_text(json.dumps(status))
    assert state_of(tmp_path) == "died at step 7, last heard of 2026-01-01T00:00:00+00:00 from pid 1 on node7"
    with holder(tmp_path) as other:
        assert state_of(tmp_path) == "running"
        kill(other)
    assert state_of(tmp_path).startswith("died at step 7")
    (tmp_path / "status.json").write_text(json.dumps(status | {"state": "interrupted"}))
    assert state_of(tmp_path) == "interrupted"


def test_a_report_says_that_a_run_died(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"state": "running", "step": 7, "stage": "sft"}))
    (tmp_path / "metrics.jsonl").write_text('{"step": 7, "prefix": "train", "loss": 1.0}\n')
    report(tmp_path)
    assert "the run is not finished: died at step 7" in capsys.readouterr().out
