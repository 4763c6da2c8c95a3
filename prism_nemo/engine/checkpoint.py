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
import os
import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase, ShardedObject
from torch.distributed.checkpoint.api import CheckpointException

from prism_nemo.config.enums import Fp8Recipe
from prism_nemo.convert.files import sync
from prism_nemo.convert.manifest import MANIFEST, seal
from prism_nemo.convert.torch_dist import OPTIMIZER_UPDATES
from prism_nemo.convert.vetting import load_plain, vet_checkpoint, vet_objects
from prism_nemo.engine.chunks import Chunks, chunks_of
from prism_nemo.engine.optimizer import ModelOptimizer
from prism_nemo.engine.runtime import Runtime, rng_state, seed_everything, set_rng_state
from prism_nemo.engine.wholeness import STEP_MANIFEST, TRAINER, check_together, choose, seal_together
from prism_nemo.engine.writing import SaveError, raise_what_failed, together, write_in_this_process
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


def is_model_checkpoint(directory: Path) -> bool:
    """Whether the directory is (or, when truncated, was) one of a model's folders."""
    return (directory / MANIFEST).is_file() or (directory / ".metadata").is_file()


def save_model(directory: Path, model: Chunks, optimizer: ModelOptimizer | None) -> None:
    """Writes one model's torch_dist checkpoint into a new directory. A collective; the manifest is `seal`'s.

    An optimizer that has not taken a step (a frozen discriminator's) has nothing to save.
    """
    directory.mkdir(parents=True, exist_ok=True)
    metadata = _metadata()
    for chunk in chunks_of(model):
        if _has_fp8_history(chunk):
            _keep_fp8_history(chunk)
    state = _sharded_state(model, metadata)
    updates = 0 if optimizer is None else optimizer.num_updates
    if optimizer is not None and updates:
        state["optimizer"] = _tensors_alone(optimizer.optimizer.sharded_state_dict(dict(state), metadata=metadata))
    write_in_this_process()
    dist_checkpointing.save(state, str(directory), content_metadata={OPTIMIZER_UPDATES: updates})
    raise_what_failed()


def _sharded_state(model: Chunks, metadata: dict[str, Any]) -> dict[str, Any]:
    """Every chunk's weights. Keys on disk count layers through the whole model; the names of the chunks do not get there."""
    return {f"model{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks_of(model))}


def _tensors_alone(optimizer_state: Any) -> Any:
    """The optimizer's state without what is not a cut tensor: parameter groups and counters.

    How those are arranged depends on the layout (experts over several ranks have an optimizer of their own), and they hold
    nothing that the configuration and the number of updates do not tell. Loading leaves them as they are.
    """
    return dict_list_map_outplace(
        lambda leaf: leaf if isinstance(leaf, ShardedBase) else LocalNonpersistentObject(leaf), optimizer_state
    )


def _has_fp8_history(chunk: Any) -> bool:
    """Whether FP8 scales come from earlier steps, so that a run can only go on as it was with those of its checkpoint."""
    return chunk.config.fp8 is not None and chunk.config.fp8_recipe == Fp8Recipe.delayed.value


def _keep_fp8_history(chunk: torch.nn.Module) -> None:
    """Has Transformer Engine save the scales that its modules hold, also when the last pass was bf16 (a rollout, say)."""
    for module in chunk.modules():
        meta: Any = getattr(module, "fp8_meta", {})
        if "scaling_fwd" in meta:
            meta["fp8_checkpoint"] = True


def _without_extra_states(state: Any) -> Any:
    """A model's state without what Transformer Engine keeps beside weights, as if the checkpoint had empty ones.

    It depends on how layers were made and on the FP8 recipe, and is a pickle. Weights do neither: so a checkpoint of any layers
    loads into any others, with such objects in it or without.
    """

    def emptied(leaf: Any) -> Any:
        is_extra = isinstance(leaf, ShardedObject) and leaf.key.endswith("._extra_state")
        return LocalNonpersistentObject(None) if is_extra else leaf

    return dict_list_map_outplace(emptied, state)


def _unwrapped(leaf: Any) -> Any:
    return leaf.unwrap() if isinstance(leaf, LocalNonpersistentObject) else leaf


def load_model(directory: Path, model: Chunks, optimizer: ModelOptimizer | None, *, checked: bool = False) -> None:
    """Loads weights, and with `optimizer` its state too, saved at any layout. A collective over all ranks.

    Raises CheckpointError when files are missing or not what was written (unless that was `checked` already), and when they hold
    a pickle that is more than a checkpoint's.
    """
    if not checked:
        check_together(directory)
    stored = vet_checkpoint(directory)
    metadata = _metadata()
    state = _sharded_state(model, metadata)
    try:
        content = dist_checkpointing.load_content_metadata(str(directory))
        updates = 0 if optimizer is None else (content or {}).get(OPTIMIZER_UPDATES, 0)
        if optimizer is not None and updates:
            optimizer.prepare_for_loading(updates)
            optimizer_state = optimizer.optimizer.sharded_state_dict(dict(state), is_loading=True, metadata=metadata)
            state["optimizer"] = _tensors_alone(optimizer_state)
        for index, chunk in enumerate(chunks_of(model)):
            if optimizer is None or not _has_fp8_history(chunk):
                state[f"model{index}"] = _without_extra_states(state[f"model{index}"])
        vet_objects(stored, (leaf.unique_key for leaf in nested_values(state) if isinstance(leaf, ShardedObject)))
        loaded = dist_checkpointing.load(state, str(directory))
    except (CheckpointingException, CheckpointException, KeyError, OSError) as error:
        raise CheckpointError(
            f"the checkpoint does not fit the model: {_reason(error)}",
            where=str(directory),
            remedy="use a checkpoint of this model, or an earlier one",
        ) from error
    for index, chunk in enumerate(chunks_of(model)):
        chunk.load_state_dict(loaded[f"model{index}"])
    if optimizer is None:
        return
    if updates:
        optimizer.optimizer.load_state_dict(dict_list_map_outplace(_unwrapped, loaded["optimizer"]))
        optimizer.set_num_updates(updates)
    else:
        optimizer.start_anew()


def _reason(error: BaseException) -> str:
    """What went wrong on the first rank that failed, without the list of all tensors that torch and Megatron add."""
    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return textwrap.shorten(text, 300, placeholder=" …")


def _metadata() -> dict[str, Any]:
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }


def _at_hand(optimizer: ModelOptimizer | None) -> AbstractContextManager[None]:
    """Brings the optimizer's state from where it may wait between steps."""
    return nullcontext() if optimizer is None else optimizer.on_device()


def _write_rng(file: Path) -> None:
    content = io.BytesIO()  # torch.save itself has another error than OSError for a full disk
    torch.save(rng_state(), content)
    with file.open("wb") as stream:
        stream.write(content.getbuffer())
        stream.flush()
        os.fsync(stream.fileno())


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

    def __init__(self, run_directory: Path, runtime: Runtime, *, keep_last_k: int, from_older: bool = True) -> None:
        """`from_older`: when the newest checkpoint is damaged, `load` takes the newest that is not."""
        self.folder = run_directory / "checkpoints"
        self.runtime = runtime
        self.keep_last_k = keep_last_k
        self.from_older = from_older
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
        """Writes step's checkpoint under a temporary name, renames it, moves `latest`, removes the oldest. A collective.

        `before` runs on the main rank first; its OSError counts as the save's. Raises SaveError, on every rank, when something
        could not be written: then `latest` and what was there are as before, and it can be tried again.
        """
        final = self.folder / f"step_{step:08d}"
        staging = self.folder / f".{final.name}.partial"
        try:
            self._write(staging, step, models, trainer, before)
            with together(self.runtime, final):
                if self.runtime.is_main:
                    self._put_in_place(staging, final)
        except SaveError:
            if self.runtime.is_main:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        return final

    def _write(
        self,
        staging: Path,
        step: int,
        models: Mapping[str, Checkpointed],
        trainer: Mapping[str, Any],
        before: Callable[[], None],
    ) -> None:
        with together(self.runtime, staging):
            if self.runtime.is_main:
                before()
                shutil.rmtree(staging, ignore_errors=True)
                staging.mkdir(parents=True)
        for name, model in models.items():
            with (
                together(self.runtime, staging),
                model.runtime.layout.active(),
                _at_hand(model.optimizer),
            ):
                save_model(staging / name, model.chunks, model.optimizer)
        with together(self.runtime, staging):
            _write_rng(staging / f"rng_{self.runtime.rank}.pt")
            if self.runtime.is_main:
                (staging / TRAINER).write_text(json.dumps({**trainer, **self._ranks, "step": step}))
                for name, model in models.items():
                    model.save_assets(staging / name / "hf")
        for name in models:
            with together(self.runtime, staging):
                seal_together(staging / name, self.runtime)
        with together(self.runtime, staging):
            if self.runtime.is_main:
                seal(staging, manifest=STEP_MANIFEST)

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
            shutil.rmtree(old)
