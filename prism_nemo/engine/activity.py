"""Whether this process gets on: what its main thread is at, and whether anything is done meanwhile.

A main thread that stays where it is may compute for an hour. It is idle only when nothing happens anywhere in the process or in
those that it started: no time on a processor (nor a wait for one), no byte read or written, no page brought in, and no wait that
was declared (`prism_nemo.waiting`). One that waits in a collective is not idle either: that depends on others. What torch waits
for on a GPU takes processor time, since it asks again and again.

Linux alone tells all that (/proc); elsewhere nobody is ever found idle.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from prism_nemo.waiting import waited_for

WORKING_SHARE = 0.1  # of one processor: less is done by threads that look whether there is something to do
WORKING_BYTES = 4096  # in a second: likewise, such threads wake each other by a few bytes
SYNC_SECONDS = 300.0  # that the kernel may take to bring to the disk what was written, in which nothing else shows
# fsync, fdatasync, msync, sync_file_range, syncfs, sync, and close, which brings what was written to a network file system
_SYNC_CALLS = {"x86_64": {74, 75, 26, 277, 306, 162, 3}, "aarch64": {82, 83, 227, 84, 267, 81, 57}}.get(os.uname().machine, set())
_PROC = Path("/proc")
_STORES = "pt_tcpstore"  # the thread that answers the signs of life of all ranks
_TICKS = os.sysconf("SC_CLK_TCK")
_TORCH = str(Path(dist.__file__).parent)
_COLLECTIVES = tuple(f"{_TORCH}{os.sep}{name}" for name in ("distributed_c10d", "rendezvous", "_functional_collectives"))
_IN_MEGATRON = tuple(
    f"{os.sep}megatron{os.sep}core{os.sep}{name}" for name in ("pipeline_parallel", "tensor_parallel", "distributed")
)
_DEBUGGER = f"{os.sep}bdb.py"  # somebody looks at the process


@dataclass(frozen=True)
class Place:
    """Where the main thread is."""

    where: str  # the innermost file, line and function of this project, or of any; "" inside of a collective
    frames: tuple[tuple[int, int], ...]  # changes when anything but a call to C goes on
    debugged: bool


def place_of_main_thread() -> Place:
    frame: FrameType | None = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return Place("", (), False)
    # What waits for a collective that was begun before is a method in C, called by Megatron.
    collective = any(name in frame.f_code.co_filename for name in _IN_MEGATRON)
    innermost, own, debugged, frames = frame, None, False, []
    while frame is not None:
        file = frame.f_code.co_filename
        frames.append((id(frame.f_code), frame.f_lasti))
        collective = collective or file.startswith(_COLLECTIVES)
        debugged = debugged or file.endswith(_DEBUGGER)
        if own is None and f"{os.sep}prism_nemo{os.sep}" in file:
            own = frame
        frame = frame.f_back
    named = own or innermost
    where = f"{named.f_code.co_qualname}, {Path(named.f_code.co_filename).name}:{named.f_lineno}"
    return Place("" if collective else where, tuple(frames), debugged)


@dataclass
class Activity:
    """`look` is called once in a while, by one thread. Times are in seconds.

    idle      for which nothing has been done
    waiting   for which it can have been waiting for other ranks: in collectives, for a GPU that is, or idle
    """

    idle: float = 0.0
    waiting: float = 0.0
    place: Place = field(default_factory=lambda: Place("", (), False))
    in_kernel: bool = False  # the main thread, which no signal ends: as in a request to a file system that does not answer
    ignored: set[int] = field(default_factory=set)  # threads' native ids
    _spins: bool = False  # as what waits for a GPU does: the process itself, not one that it started
    _syncing: float = 0.0
    _process_seconds: float = 0.0
    _last: _Work | None = None

    def look(self, passed: float) -> None:
        """`passed`: since the last time."""
        before, self.place = self.place, place_of_main_thread()
        moved = self.place.frames != before.frames
        self.in_kernel = False
        if self.place.where == "":
            self._waits(0.0, self.waiting + passed)
        elif self.place.debugged or waited_for() is not None:
            self._waits(0.0, 0.0)
        elif moved or self._works(passed):
            on_gpu = not moved and self._spins and torch.cuda.is_initialized()  # it may be what waits for a collective there
            self.idle, self.waiting = 0.0, self.waiting + passed if on_gpu else 0.0
        else:
            self.idle, self.waiting = self.idle + passed, self.waiting + passed
        if moved:
            self._last = None

    def _waits(self, idle: float, waiting: float) -> None:
        self.idle, self.waiting, self._last, self._syncing = idle, waiting, None, 0.0

    def _works(self, passed: float) -> bool:
        used, self._process_seconds = time.process_time() - self._process_seconds, time.process_time()
        self._spins = used > 0.5 * passed
        if self._spins:  # no need to look closer
            self._last, self._syncing = None, 0.0
            return True
        last, self._last = self._last, _Work.of_this_process(self.ignored)
        if last is None or not self._last.readable:
            return True
        self.in_kernel = self._last.in_kernel
        if self._last.is_more_than(last, passed):
            self._syncing = 0.0
            return True
        self._syncing = self._syncing + passed if self._last.syncing else 0.0
        return 0.0 < self._syncing <= SYNC_SECONDS


@dataclass
class _Work:
    """What a process, its threads and its descendants have done so far."""

    seconds: float = 0.0  # on a processor; of the main thread also those in which it waited for one
    bytes: int = 0  # read or written
    faults: int = 0  # pages brought in from a disk
    children: dict[int, tuple[float, int]] = field(default_factory=dict)  # by process id: seconds, and bytes and faults
    syncing: bool = False  # a thread brings to the disk what was written
    in_kernel: bool = False
    readable: bool = True

    @classmethod
    def of_this_process(cls, ignored: Iterable[int]) -> _Work:
        work = cls()
        try:
            for task in (_PROC / "self" / "task").iterdir():
                if int(task.name) not in ignored:
                    with suppress(ProcessLookupError, FileNotFoundError):  # it has ended
                        work._add_thread(task)
        except (OSError, ValueError, IndexError):
            work.readable = False
            return work
        for pid, stat in _descendants(os.getpid()).items():
            process = _PROC / str(pid)
            seconds = (int(stat[11]) + int(stat[12])) / _TICKS + _schedule_of(process)[1]
            work.children[pid] = seconds, int(stat[9]) + _bytes_of(process)
            work.syncing = work.syncing or _is_syncing(process)
        return work

    def _add_thread(self, task: Path) -> None:
        stat = (task / "stat").read_text()
        name, fields = stat[stat.index("(") + 1 : stat.rindex(")")], stat[stat.rindex(")") + 2 :].split()
        if name.startswith(_STORES):
            return
        self.faults += int(fields[9])
        self.bytes += _bytes_of(task)
        self.syncing = self.syncing or _is_syncing(task)
        is_main = int(task.name) == os.getpid()
        if is_main:
            self.in_kernel = fields[0] == "D"
        running, queued = _schedule_of(task)
        self.seconds += running or (int(fields[11]) + int(fields[12])) / _TICKS
        if is_main:
            self.seconds += queued

    def is_more_than(self, earlier: _Work, passed: float) -> bool:
        seconds, others = self.seconds - earlier.seconds, self.bytes - earlier.bytes
        for pid, (used, moved) in self.children.items():
            if pid not in earlier.children:
                return True
            seconds += used - earlier.children[pid][0]
            others += moved - earlier.children[pid][1]
        return (
            seconds > WORKING_SHARE * passed
            or others > WORKING_BYTES * passed
            or self.faults > earlier.faults
            or not earlier.children.keys() <= self.children.keys()  # one has ended
        )


def _schedule_of(process: Path) -> tuple[float, float]:
    """Seconds on a processor, and waiting for one; 0 from a kernel that does not tell."""
    with suppress(OSError):
        running, queued, _ = (process / "schedstat").read_text().split()
        return int(running) * 1e-9, int(queued) * 1e-9
    return 0.0, 0.0


def _bytes_of(process: Path) -> int:
    """Read and written; 0 where another user's are not told."""
    with suppress(PermissionError, FileNotFoundError, ProcessLookupError):
        values = dict(line.split(": ") for line in (process / "io").read_text().splitlines())
        return sum(int(values[name]) for name in ("rchar", "wchar", "read_bytes", "write_bytes"))
    return 0


def _is_syncing(process: Path) -> bool:
    with suppress(OSError, ValueError):  # not told; or "running"
        return int((process / "syscall").read_text().split()[0]) in _SYNC_CALLS
    return False


def _descendants(ancestor: int) -> dict[int, list[str]]:
    """The fields of `/proc/PID/stat` behind the name, by process id."""
    found: dict[int, list[str]] = {}
    for process in _PROC.iterdir():
        if process.name.isdigit():
            with suppress(OSError, ValueError):
                found[int(process.name)] = (process / "stat").read_text().rpartition(")")[2].split()
    parents = {pid: int(stat[1]) for pid, stat in found.items()}
    kept: set[int] = set()
    new = {ancestor}
    while new:
        kept |= new
        new = {pid for pid, parent in parents.items() if parent in new} - kept
    return {pid: found[pid] for pid in kept - {ancestor}}
