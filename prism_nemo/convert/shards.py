"""Files that are planned byte by byte before the first is written: how they are written, checked, and found again after a kill.

A target directory is prepared in `.<name>.partial` beside it, which holds `content/` and a journal: what is being written
(`plan.json`), and for each finished file, once it is on disk, its size and time. The directory takes its name by one rename, when
everything is on disk. A rerun of the same conversion keeps the files that are as they were then; another conversion starts anew.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_nemo.convert.files import sync
from prism_nemo.convert.pieces import Files, Literal, Piece, copy_pieces, write_all
from prism_nemo.convert.ranks import Ranks
from prism_nemo.convert.torch_zip import TensorArchive
from prism_nemo.errors import CheckpointError
from prism_nemo.run_directory import write_atomically

THREADS = 2  # of each rank
FLUSH_BYTES = 1 << 27  # how much of a file may wait in memory before it is sent to disk, while the rest is written
Map = Callable[..., Iterator[Any]]  # `map`, or an executor's


@dataclass(frozen=True)
class Slot:
    """A part of a file: `nbytes` bytes made of pieces, at byte `offset`, within an archive where there is one."""

    offset: int
    nbytes: int
    pieces: Callable[[], Sequence[Piece | Literal]]
    archive: TensorArchive | None = None

    @property
    def data_offset(self) -> int:
        return self.offset + (self.archive.data_offset if self.archive is not None else 0)


@dataclass(frozen=True)
class TargetFile:
    """A file to be written: a header, and slots that do not overlap."""

    name: str
    size: int
    slots: tuple[Slot, ...]
    header: bytes = b""


def write_slot(target: int, slot: Slot, files: Files) -> None:
    """Writes a slot into an open file."""
    copy_pieces(slot.pieces(), files, target, slot.data_offset)
    if slot.archive is not None:
        before, after = slot.archive.render()
        write_all(target, before, slot.offset)
        write_all(target, after, slot.data_offset + slot.nbytes)


class _Growing:
    """An open file whose content goes to disk while more is written: at its end there is little left to wait for."""

    def __init__(self, descriptor: int, syncing: Executor) -> None:
        self.descriptor = descriptor
        self._syncing = syncing
        self._waiting = 0  # bytes
        self._flushes: list[Future[None]] = []

    def write(self, slot: Slot, source: Files) -> None:
        write_slot(self.descriptor, slot, source)
        self._waiting += slot.nbytes
        if self._waiting >= FLUSH_BYTES and (not self._flushes or self._flushes[-1].done()):
            self._waiting = 0
            self._flushes.append(self._syncing.submit(os.fdatasync, self.descriptor))

    def finish(self, size: int) -> os.stat_result:
        """Has all of it on disk, and closes it."""
        try:
            for flush in self._flushes:
                flush.result()  # the kernel tells an error once
            os.ftruncate(self.descriptor, size)
            os.fsync(self.descriptor)
            return os.fstat(self.descriptor)
        finally:
            os.close(self.descriptor)

    def discard(self) -> None:
        wait(self._flushes)
        os.close(self.descriptor)


class Staging:
    """The hidden directory beside a target in which it is made. One conversion at a time has it: the kernel holds its lock."""

    def __init__(self, target: Path, plan: dict[str, Any], ranks: Ranks, inside: Path = Path()) -> None:
        """`inside`: the folder of the target that the files go to."""
        self.target = target
        self._inside = inside
        self.folder = target.with_name(f".{target.name}.partial")
        self.content = self.folder / "content"
        self._journal = self.folder / "journal"
        self._plan = json.loads(json.dumps(plan))
        self._ranks = ranks

    @contextmanager
    def open(self) -> Iterator[bool]:
        """Takes the directory; yields False when an earlier run has finished all but the tidying up. A collective."""
        lock = -1
        try:
            needed = True
            with self._ranks.together():
                if self._ranks.rank == 0:
                    self.folder.mkdir(parents=True, exist_ok=True)
                    lock = self._lock()
                    needed = self._prepare()
            yield self._ranks.gather(needed)[0]
        finally:
            if lock >= 0:
                os.close(lock)

    def _lock(self) -> int:
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise CheckpointError(
                "another process is converting to this target", where=str(self.target), remedy="wait for it, or stop it"
            ) from None
        except OSError:
            pass  # a file system without locks
        return lock

    def _prepare(self) -> bool:
        """Keeps what belongs to this very conversion. False when the target is there, made by it."""
        file = self.folder / "plan.json"
        try:
            earlier = json.loads(file.read_text())
        except (OSError, ValueError):
            earlier = None
        if is_taken(self.target):
            finished = earlier == self._plan and not self.content.exists()
            if finished or earlier is None:
                shutil.rmtree(self.folder)
            if finished:
                return False
            refuse_existing(self.target)
        if earlier != self._plan:
            for old in (file, self._journal, self.content):
                shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
            write_atomically(file, json.dumps(self._plan))
        for folder in (self._journal, self.content / self._inside):
            folder.mkdir(parents=True, exist_ok=True)
        return True

    def write(self, files: Sequence[TargetFile], source: Files) -> int:
        """Writes this rank's share of the files; returns how many of all ranks' were there already. A collective.

        Each thread has a file of its own (writes to one file wait for each other); a file alone is shared out by its slots.
        """
        kept = 0
        with self._ranks.together(), ThreadPoolExecutor(THREADS) as pool, ThreadPoolExecutor(THREADS) as syncing:
            mine = files[self._ranks.rank :: self._ranks.size]
            over_slots: Map = pool.map if len(mine) == 1 else map
            over_files: Map = map if len(mine) == 1 else pool.map
            finishing: list[Future[None]] = []

            def write_file(file: TargetFile) -> bool:
                if self._is_whole(file):
                    return True
                (self._journal / file.name).unlink(missing_ok=True)
                descriptor = os.open(self.content / self._inside / file.name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
                growing = _Growing(descriptor, syncing)
                try:
                    write_all(descriptor, file.header, 0)
                    list(over_slots(lambda slot: growing.write(slot, source), file.slots))
                except BaseException:
                    growing.discard()
                    raise
                finishing.append(syncing.submit(self._finish, growing, file))
                return False

            kept = sum(over_files(write_file, mine))
            for future in finishing:
                future.result()
        return sum(self._ranks.gather(kept))

    def _finish(self, growing: _Growing, file: TargetFile) -> None:
        """Has the file on disk, and only then in the journal."""
        state = growing.finish(file.size)
        write_atomically(self._journal / file.name, json.dumps(_as_it_is(state)))

    def _is_whole(self, file: TargetFile) -> bool:
        """Whether an earlier run finished the file, and nobody has touched it since."""
        try:
            journal = json.loads((self._journal / file.name).read_text())
            state = (self.content / self._inside / file.name).stat()
        except (OSError, ValueError):
            return False
        return state.st_size == file.size and journal == _as_it_is(state)

    def publish(self) -> None:
        """Gives the directory its name. Only the first rank calls it, when all have written."""
        for path in [*self.content.rglob("*"), self.content]:
            sync(path)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.content.rename(self.target)
        sync(self.target.parent)
        shutil.rmtree(self.folder)


def _as_it_is(state: os.stat_result) -> list[int]:
    return [state.st_size, state.st_mtime_ns]


def is_taken(target: Path) -> bool:
    """Whether something is at the path that a conversion must not replace: anything but an empty directory."""
    return target.exists() and not (target.is_dir() and not any(target.iterdir()))


def refuse_existing(target: Path) -> None:
    if is_taken(target):
        raise CheckpointError("the target exists", where=str(target), remedy="choose another --out, or remove it")
