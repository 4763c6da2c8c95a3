"""Checkpoints: Megatron `torch_dist` per model, resumable at another layout, complete or not there at all.

    <run>/checkpoints/latest                    the name of the newest complete one
    <run>/checkpoints/step_00000060/
        checkpoint.json                         size and hash of what is in this folder, and of its models' manifests
        trainer.json                            step, data position, …
        rng_<rank>.pt                           generators of every rank
        policy/  discriminator/                 one torch_dist checkpoint each: weights and optimizer
            hf/                                 config.json, tokenizer, processor
            manifest.json                       size and hash of every file: tells a damaged copy from a whole one

A model's folder is a checkpoint by itself: stages start from it, `convert export` reads it.
"""

from __future__ import annotations

import io
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch

from prism_nemo.convert.files import sync
from prism_nemo.convert.vetting import load_plain
from prism_nemo.engine.model_checkpoint import live_storages, load_model, plan_model
from prism_nemo.engine.optimizer import ModelOptimizer
from prism_nemo.engine.runtime import Runtime, rng_state, seed_everything, set_rng_state
from prism_nemo.engine.saving import Saving
from prism_nemo.engine.wholeness import TRAINER, choose
from prism_nemo.engine.writing import ModelFiles, SaveError, SaveHangs, together
from prism_nemo.errors import CheckpointError
from prism_nemo.run_directory import LATEST, write_atomically


class Checkpointed(Protocol):
    """What a checkpoint holds of a model."""

    @property
    def chunks(self) -> Sequence[Any]: ...

    @property
    def optimizer(self) -> ModelOptimizer | None: ...

    @property
    def runtime(self) -> Runtime: ...

    def save_assets(self, directory: Path) -> None:
        """Writes config.json, tokenizer and processor."""


def _at_hand(optimizer: ModelOptimizer | None) -> AbstractContextManager[None]:
    """Brings the optimizer's state from where it may wait between steps."""
    return nullcontext() if optimizer is None else optimizer.on_device()


def _rng_content() -> bytes:
    content = io.BytesIO()
    torch.save(rng_state(), content)
    return content.getvalue()


def _read_rng(file: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = load_plain(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"the generators' state cannot be read ({error})",
            where=str(file),
            remedy="use an earlier checkpoint, or copy this one again",
        ) from error
    return state


class CheckpointStore:
    """The `checkpoints` folder of a run."""

    def __init__(
        self,
        run_directory: Path,
        runtime: Runtime,
        *,
        keep_last_k: int,
        from_older: bool = True,
        longest_seconds: float = math.inf,
    ) -> None:
        """`from_older`: when the newest checkpoint is damaged, `load` takes the newest that is not.

        longest_seconds   for one save, before it counts as failed
        """
        self.folder = run_directory / "checkpoints"
        self.runtime = runtime
        self.keep_last_k = keep_last_k
        self.from_older = from_older
        self.longest_seconds = longest_seconds
        self.under_way: Saving | None = None
        self.notice = ""  # of the last `load`: why it was not the newest one
        self._damaged: set[str] = set()

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        marker = self.folder / LATEST
        return self.folder / marker.read_text().strip() if marker.is_file() else None

    def save(
        self,
        step: int,
        models: Mapping[str, Checkpointed],
        trainer: Mapping[str, Any],
        *,
        before: Callable[[], None] = lambda: None,
    ) -> Path:
        """`begin`, and waits until it is through."""
        self.begin(step, models, trainer, before=before, copied=False)
        self.settle(wait=True)
        return self.folder / _name(step)

    def begin(
        self,
        step: int,
        models: Mapping[str, Checkpointed],
        trainer: Mapping[str, Any],
        *,
        before: Callable[[], None] = lambda: None,
        copied: bool = True,
    ) -> None:
        """Starts to write step's checkpoint under a temporary name. A collective; one save at a time.

        It is renamed when all of it is there, `latest` moves, and the oldest goes; `settle` tells whether that has happened.
        `before` runs on the main rank first; its OSError counts as the save's. Raises SaveError, on every rank, when something
        cannot be written: then `latest` and what was there are as before, and it can be tried again.

        copied   from a copy on the host, so that training may go on meanwhile; without, nothing may change before it has settled
        """
        assert self.under_way is None, "one at a time"
        final = self.folder / _name(step)
        staging = self.folder / f".{final.name}.partial"
        try:
            files = self._plan(staging, models, before, copied)
        except SaveError:
            self._remove(staging)
            raise
        self.under_way = Saving(
            step,
            staging,
            files,
            generators=_rng_content(),
            trainer={**trainer, **self._ranks, "step": step},
            put_in_place=lambda: self._put_in_place(staging, final),
            runtime=self.runtime,
        )

    def _plan(
        self, staging: Path, models: Mapping[str, Checkpointed], before: Callable[[], None], copied: bool
    ) -> dict[str, ModelFiles]:
        with together(self.runtime, staging):
            if self.runtime.is_main:
                before()
                for left in self.folder.glob(".step_*.partial"):  # by runs that were killed, too
                    shutil.rmtree(left, ignore_errors=True)
                for name in models:  # here, since what fails on one rank alone must not fail between Megatron's collectives
                    (staging / name).mkdir(parents=True)
        files = {}
        for name, model in models.items():
            with (
                together(self.runtime, staging),
                model.runtime.layout.active(),
                _at_hand(model.optimizer),
            ):
                files[name] = plan_model(staging / name, model.chunks, model.optimizer)
                files[name].bring_to_host(live_storages(model.chunks, model.optimizer) if copied else set())
        with together(self.runtime, staging):
            if self.runtime.is_main:
                for name, model in models.items():
                    model.save_assets(staging / name / "hf")
        return files

    def settle(self, *, wait: bool) -> int | None:
        """The step whose save has come through since the last call; None when none has. A collective. Raises SaveError."""
        if self.under_way is None:
            return None
        saving, through = self.under_way, True
        try:
            through = saving.settled(wait=wait, longest_seconds=self.longest_seconds)
        except SaveHangs:
            raise
        except SaveError:
            self._remove(saving.directory)
            raise
        finally:
            if through:
                self.under_way = None
        return saving.step if through else None

    def _remove(self, staging: Path) -> None:
        if self.runtime.is_main:
            shutil.rmtree(staging, ignore_errors=True)

    def _put_in_place(self, staging: Path, final: Path) -> None:
        if final.exists():
            shutil.rmtree(final)
        staging.rename(final)
        sync(self.folder)
        write_atomically(self.folder / LATEST, final.name)
        sync(self.folder)
        self._damaged.discard(final.name)
        self._drop_oldest(final)

    def load(self, models: Mapping[str, Checkpointed]) -> dict[str, Any] | None:
        """Loads the newest whole checkpoint into the models and returns its trainer state; None when there is none. A collective.

        All ranks read and hash the files first. When `latest` names a damaged one, the newest older one that is whole is taken,
        and `notice` says so; CheckpointError when there is none, or without `from_older`.
        Generators are restored when the layout is the same; with another they are seeded from the step.
        """
        self.notice = ""
        choice = choose(self.folder, self.runtime, from_older=self.from_older)
        if choice is None:
            return None
        self.notice = choice.notice
        self._damaged = {path.name for path, _ in choice.skipped}
        directory = choice.directory
        for name, model in models.items():
            with model.runtime.layout.active(), _at_hand(model.optimizer):
                load_model(directory / name, model.chunks, model.optimizer, checked=True)
        trainer: dict[str, Any] = json.loads((directory / TRAINER).read_text())
        if all(trainer[key] == value for key, value in self._ranks.items()):
            set_rng_state(_read_rng(directory / f"rng_{self.runtime.rank}.pt"))
        else:
            seed_everything(trainer["step"])
        return trainer

    @property
    def _ranks(self) -> dict[str, Any]:
        """How many there are, and how they are cut."""
        return {"world_size": self.runtime.world_size, "layout": list(self.runtime.layout.sizes)}

    def _drop_oldest(self, newest: Path) -> None:
        """Keeps the last ones up to `newest`. First go damaged ones and later steps, of a line that somebody went back from."""
        steps = sorted(
            self.folder.glob("step_*"),
            key=lambda path: (path.name not in self._damaged, path.name <= newest.name, path.name),
        )
        for old in steps[: max(0, len(steps) - self.keep_last_k)]:
            shutil.rmtree(old, ignore_errors=True)  # on a network file system somebody may be reading it: then the next time


def _name(step: int) -> str:
    return f"step_{step:08d}"
