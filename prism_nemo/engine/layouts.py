"""Process groups of several layouts in one process.

Megatron-Core keeps one set of groups, in the module globals of `parallel_state`, and one tracker of tensor-parallel random
states. A `Layout` holds both for one way to cut a model; while it is active, Megatron sees nothing else. So the policy and the
discriminator may be cut differently, and a stage that comes back to an earlier stage's layout finds its groups ready.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as parallel_random

from prism_nemo.config.schema import ParallelConfig

Sizes = tuple[int | None, ...]  # tensor, pipeline, virtual pipeline, context, expert, expert-tensor

_GLOBAL = re.compile(r"_[A-Z][A-Z0-9_]*")
_TRACKER = "_CUDA_RNG_STATE_TRACKER"


@dataclass(eq=False)
class Layout:
    """The groups of one layout, as Megatron's globals; those of the active layout are kept up to date by Megatron itself.

    model_group   of the ranks that hold one model between them, their leader first; None where every rank holds a whole one
    """

    sizes: Sizes
    state: dict[str, Any]
    tracker: Any
    model_group: dist.ProcessGroup | None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Megatron sees this layout meanwhile."""
        before = _active
        _switch(self)
        try:
            yield
        finally:
            if before is not None:
                _switch(before)


_unset: dict[str, Any] = {}  # Megatron's globals before any layout was there
_layouts: dict[Sizes, Layout] = {}
_active: Layout | None = None


def sizes_of(parallel: ParallelConfig) -> Sizes:
    tp, ep = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    return (
        tp,
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
        parallel.context_parallel_size,
        ep,
        parallel.expert_tensor_parallel_size or (tp if ep == 1 else 1),
    )


def use(parallel: ParallelConfig, timeout_minutes: int) -> Layout:
    """Makes a layout the active one; its groups are built when it is seen first. A collective of all ranks.

    timeout_minutes   for every collective of these groups: those of the group of all ranks is not theirs
    """
    global _active
    if not _layouts:
        _unset.update(_globals())
    sizes = sizes_of(parallel)
    if sizes not in _layouts:
        _leave()
        _set(_unset)
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=sizes[0],
            pipeline_model_parallel_size=sizes[1],
            virtual_pipeline_model_parallel_size=sizes[2],
            context_parallel_size=sizes[3],
            expert_model_parallel_size=sizes[4],
            expert_tensor_parallel_size=sizes[5],
            create_gloo_process_groups=True,
            distributed_timeout_minutes=timeout_minutes,
        )
        group = _make_model_group(datetime.timedelta(minutes=timeout_minutes))
        _active = _layouts[sizes] = Layout(sizes, _globals(), getattr(parallel_random, _TRACKER), group)
    _switch(_layouts[sizes])
    return _layouts[sizes]


def _make_model_group(timeout: datetime.timedelta) -> dist.ProcessGroup | None:
    """For Python objects, over gloo. A collective of all ranks."""
    if parallel_state.get_data_parallel_world_size() == dist.get_world_size():
        return None
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, parallel_state.get_data_parallel_rank())
    models = [[rank for rank, place in enumerate(places) if place == model] for model in sorted(set(places))]
    group, _ = dist.new_subgroups_by_enumeration(models, timeout=timeout, backend="gloo")
    return group


def forget_all() -> None:
    """Takes every layout's groups apart; safe to call twice."""
    global _active
    for layout in _layouts.values():
        _switch(layout)
        parallel_state.destroy_model_parallel()
    _layouts.clear()
    _active = None


def _switch(layout: Layout) -> None:
    global _active
    if layout is _active:
        return
    _leave()
    _set(layout.state)
    setattr(parallel_random, _TRACKER, layout.tracker)
    _active = layout


def _leave() -> None:
    if _active is not None:
        _active.state, _active.tracker = _globals(), getattr(parallel_random, _TRACKER)


def _globals() -> dict[str, Any]:
    return {name: value for name, value in vars(parallel_state).items() if _GLOBAL.fullmatch(name)}


def _set(state: dict[str, Any]) -> None:
    for name, value in state.items():
        setattr(parallel_state, name, value)
