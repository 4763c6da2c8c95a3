"""A checkpoint written while training goes on: every rank's thread writes its part, the main rank's then puts all in place.

The threads meet in a group of their own, so that a checkpoint is complete as soon as its files are, whatever the ranks' main
threads are doing by then: a step may take minutes.
"""

from __future__ import annotations

import datetime
import json
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from prism_nemo.convert.files import sync
from prism_nemo.convert.manifest import STEP_MANIFEST, hash_files, seal
from prism_nemo.engine.runtime import Runtime
from prism_nemo.engine.wholeness import TRAINER
from prism_nemo.engine.writing import ModelFiles, SaveError, SaveHangs, Written
from prism_nemo.waiting import waiting

_LOOK_SECONDS = 0.5  # between two looks at whether a save is through
_LONGEST = datetime.timedelta(days=1)  # that one rank's thread waits for another's; a rank that is lost ends the run sooner

_group: tuple[Any, dist.ProcessGroup] | None = None  # of the writing threads, and the group of all ranks that it was made beside


@dataclass(frozen=True)
class _Part:
    """What one rank's thread has done."""

    models: dict[str, Written] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)  # of the step's own files
    problem: str | None = None


@dataclass(frozen=True)
class _Outcome:
    rank: int = 0  # that failed
    problem: str | None = None
    hangs: bool = False


class Saving:
    """One step's checkpoint on its way to the disk."""

    def __init__(
        self,
        step: int,
        directory: Path,
        models: Mapping[str, ModelFiles],
        *,
        generators: bytes,
        trainer: Mapping[str, Any],
        put_in_place: Callable[[], None],
        runtime: Runtime,
    ) -> None:
        """Starts to write into `directory`. A collective; the memory behind the arguments must stay as it is until it has ended.

        generators     the content of this rank's rng file
        trainer        that of the main rank's trainer.json
        put_in_place   is called on the main rank, in its thread, when everything is written
        """
        self.step = step
        self.directory = directory
        self._models = dict(models)
        self._generators = generators
        self._trainer = trainer
        self._put_in_place = put_in_place
        self._runtime = runtime
        self._group = _group_of_threads(runtime)
        self._outcome = _Outcome(problem="its thread ended")
        self._given_up = threading.Event()
        self._seconds, self._looked = 0.0, time.monotonic()  # that it takes so far, as far as somebody has looked
        self._thread = threading.Thread(target=self._run, name=f"save {step}", daemon=True)
        self._thread.start()

    def settled(self, *, wait: bool, longest_seconds: float) -> bool:
        """Whether it is complete and in place. A collective.

        Raises SaveError, the same on every rank, when something could not be written, and SaveHangs when it has not come through
        `longest_seconds` after its start.
        """
        while True:
            outcome = self._runtime.broadcast_from_main(self._look(_LOOK_SECONDS if wait else 0.0, longest_seconds))
            if outcome is not None:
                break
            if not wait:
                return False
        if outcome.hangs:
            self.give_up()
        if outcome.problem is not None:
            raise (SaveHangs if outcome.hangs else SaveError)(outcome.rank, outcome.problem, self.directory)
        return True

    def wait(self, seconds: float) -> bool:
        """Gives it so much time; whether it has ended. Not a collective."""
        with waiting("a checkpoint's files"):
            self._thread.join(seconds)
        return not self._thread.is_alive()

    def give_up(self) -> None:
        """Whatever it still writes, it takes no place any more: another run may have begun here."""
        self._given_up.set()

    def _look(self, seconds: float, longest_seconds: float) -> _Outcome | None:
        """On the main rank, its end; None while it has not come."""
        if not self._runtime.is_main:
            return None
        if self.wait(seconds):
            return self._outcome
        now = time.monotonic()
        # One pause counts for half the limit at most: a job that was suspended for hours does not lose its save for that.
        self._seconds, self._looked = self._seconds + min(now - self._looked, longest_seconds / 2), now
        if self._seconds > longest_seconds:
            return _Outcome(
                problem=f"it took longer than {longest_seconds / 60:g} minutes, as on a file system that hangs", hangs=True
            )
        return None

    # In the thread

    def _run(self) -> None:
        parts = self._gather(self._write())
        if self._runtime.is_main:
            self._outcome = self._complete(parts)
        self._models.clear()

    def _write(self) -> _Part:
        try:
            models = {name: files.write() for name, files in self._models.items()}
            rng = self.directory / f"rng_{self._runtime.rank}.pt"
            rng.write_bytes(self._generators)
            sync(rng)
            return _Part(models, hash_files(self.directory, [rng.name]))
        except Exception as error:  # whatever it is, the others must not wait for this part
            return _Part(problem=_words(error))

    def _gather(self, part: _Part) -> Sequence[_Part]:
        if self._group is None:
            return [part]
        box: list[Any] = [None] * self._runtime.world_size
        try:
            dist.gather_object(part, box if self._runtime.is_main else None, dst=0, group=self._group)
        except RuntimeError as error:  # a rank is gone
            return [_Part(problem=_words(error))]
        return box

    def _complete(self, parts: Sequence[_Part]) -> _Outcome:
        failed = [(rank, part.problem) for rank, part in enumerate(parts) if part.problem is not None]
        if failed:
            return _Outcome(*failed[0])
        try:
            for name, files in self._models.items():
                files.complete([part.models[name] for part in parts])
            (self.directory / TRAINER).write_text(json.dumps(self._trainer))
            known = {name: digest for part in parts for name, digest in part.hashes.items()}
            seal(self.directory, known, manifest=STEP_MANIFEST)
            _sync_all(self.directory)
            if self._given_up.is_set():
                return _Outcome(problem="it was given up")
            self._put_in_place()
        except Exception as error:
            return _Outcome(problem=_words(error))
        return _Outcome()


def _group_of_threads(runtime: Runtime) -> dist.ProcessGroup | None:
    """Made once for all ranks, over gloo. A collective."""
    global _group
    if runtime.world_size == 1:
        return None
    everyone = dist.group.WORLD
    if _group is None or _group[0] is not everyone:
        _group = everyone, dist.new_group(backend="gloo", timeout=_LONGEST)
    return _group[1]


def _sync_all(directory: Path) -> None:
    """Has every file and folder in it on the disk; what was synced as it was written costs nothing more."""
    for folder, _, names in os.walk(directory):
        for name in names:
            sync(Path(folder) / name)
        sync(Path(folder))


def _words(error: Exception) -> str:
    return str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
