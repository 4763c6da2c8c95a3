"""The lock of a run directory: two runs never write into one, and whoever looks knows whether one does."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from prism_nemo.errors import PrismError

LOCK = ".lock"  # in a run's directory
_LOCK_SECONDS = 1.0  # for which it is tried to get it
_TOUCH_SECONDS = 5.0  # between two signs that the holder lives
_LOOK_SECONDS = 12.0  # for which another waits for one
_SILENT_SECONDS = 60.0  # after which a holder elsewhere, whose lock cannot be seen, is taken for dead


class RunLock:
    """Keeps a second process out of a run directory while this one lives. Raises PrismError when another has it.

    The kernel holds it and lets go when the process ends, however it ends, so a lock cannot be stale; on network file systems
    it may reach other nodes, or not. So the holder also touches the file every few seconds: where another node's process has not
    released it, or the file system has no locks, this one looks for a while whether that goes on. Text: the holder's pid and
    host; empty once released.
    """

    def __init__(self, directory: Path) -> None:
        self._path = directory / LOCK
        self._file = self._path.open("a+", encoding="utf-8")
        self._released = threading.Event()
        try:
            locked = self._lock(time.monotonic() + _LOCK_SECONDS)
            holder = _holder(self._path)
            elsewhere = holder != "" and not holder.endswith(f" on {socket.gethostname()}")
            if locked is False or ((elsewhere or (locked is None and holder)) and _is_touched(self._path)):
                raise PrismError(
                    f"another process is writing this run: {holder or 'it has not said which'}",
                    where=str(directory),
                    remedy="wait for it, stop it, or set another experiment.dir",
                )
            if locked is None:
                print(
                    f"{directory} is on a file system without locks: two runs that start at once are not kept apart",
                    file=sys.stderr,
                )
            self._file.truncate(0)
            self._file.write(f"{holder_here()}\n")
            self._file.flush()
        except BaseException:
            self._file.close()
            raise
        threading.Thread(target=self._touch, name="run lock", daemon=True).start()

    def _lock(self, deadline: float) -> bool | None:
        """None: there are no locks here. Tries for a moment: who only asks whether a run lives has it that long."""
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                time.sleep(_LOCK_SECONDS / 20)
            except OSError as error:
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                return None

    def _touch(self) -> None:
        while not self._released.wait(_TOUCH_SECONDS):
            with suppress(OSError, ValueError):  # closed meanwhile
                os.utime(self._file.fileno())

    def release(self) -> None:
        self._released.set()
        with suppress(OSError):
            self._file.truncate(0)
        self._file.close()


def holder_here() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}"


def _holder(lock: Path) -> str:
    return lock.read_text(encoding="utf-8", errors="replace").strip()


def _is_touched(lock: Path) -> bool:
    """Whether somebody goes on touching it; clocks of two machines need not agree. Opened each time: so NFS asks its server."""

    def touched() -> int:
        with lock.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns

    first, deadline = touched(), time.monotonic() + _LOOK_SECONDS
    while time.monotonic() < deadline:
        time.sleep(_TOUCH_SECONDS / 5)
        if touched() != first:
            return True
    return False


def is_being_written(directory: Path) -> bool:
    """Whether a process has the run directory open for writing now, as far as can be told from here: by its lock on this machine
    or across the network, otherwise by whether it was touched within the last minute.
    """
    lock = directory / LOCK
    try:
        with lock.open("rb") as file:
            holder = _holder(lock)
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            except OSError:
                pass
            else:
                if holder.endswith(f" on {socket.gethostname()}"):
                    return False
            return holder != "" and time.time() - os.fstat(file.fileno()).st_mtime < _SILENT_SECONDS
    except FileNotFoundError:
        return False
    except PermissionError:  # another user's: what its status says stands
        return True
