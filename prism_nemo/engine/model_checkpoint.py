"""One model's `torch_dist` checkpoint: its weights and its optimizer, saved at one layout and loaded at any."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase, ShardedObject
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from prism_nemo.config.enums import Fp8Recipe
from prism_nemo.convert.manifest import MANIFEST
from prism_nemo.convert.torch_dist import OPTIMIZER_UPDATES
from prism_nemo.convert.vetting import vet_checkpoint, vet_objects
from prism_nemo.engine.chunks import Chunks, chunks_of
from prism_nemo.engine.optimizer import ModelOptimizer
from prism_nemo.engine.wholeness import check_together
from prism_nemo.engine.writing import ModelFiles, plan
from prism_nemo.errors import CheckpointError


def is_model_checkpoint(directory: Path) -> bool:
    """Whether the directory is (or, when truncated, was) one of a model's folders."""
    return (directory / MANIFEST).is_file() or (directory / ".metadata").is_file()


def plan_model(directory: Path, model: Chunks, optimizer: ModelOptimizer | None) -> ModelFiles:
    """Plans one model's torch_dist checkpoint in a new directory. A collective; OSError when the directory cannot be made.

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
    return plan(directory, state, {OPTIMIZER_UPDATES: updates})


def live_storages(model: Chunks, optimizer: ModelOptimizer | None) -> set[int]:
    """Where the tensors lie that training changes in place: weights, buffers, master weights and moments."""
    tensors: list[Any] = []
    for chunk in chunks_of(model):
        tensors += [*chunk.parameters(), *chunk.buffers()]
    for part in optimizer.optimizer.chained_optimizers if optimizer is not None else ():
        tensors += [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
        tensors += [value for state in part.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


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
        "distrib_optim_fully_reshardable_mem_efficient": True,  # gathered on the host of the one that writes, on no GPU
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
    }
