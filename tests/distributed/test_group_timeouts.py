"""How long a collective may take: what the configuration says, in every group that a layout makes."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from helpers.ranks import run_ranks

from prism_nemo.config.enums import Device
from prism_nemo.config.schema import ParallelConfig, RuntimeConfig
from prism_nemo.engine.runtime import beside, session


def limits() -> list[float]:
    """Seconds, of the groups of two layouts."""
    from megatron.core import parallel_state

    parallel, config = (
        ParallelConfig(tensor_model_parallel_size=2),
        RuntimeConfig(device=Device.cpu, distributed_timeout_minutes=3),
    )
    groups = []
    with session(parallel, config) as runtime:
        groups += [runtime.layout.model_group, parallel_state.get_tensor_model_parallel_group()]
        other = beside(runtime, ParallelConfig(), config)
        with other.layout.active():
            groups += [parallel_state.get_data_parallel_group(), parallel_state.get_data_parallel_group_gloo()]
        return [_limit(group).total_seconds() for group in groups]


def _limit(group: dist.ProcessGroup | None) -> timedelta:
    assert group is not None
    found: timedelta = group._get_backend(torch.device("cpu")).options._timeout  # type: ignore[attr-defined]
    return found


def test_all_groups_have_the_limit_of_the_configuration() -> None:
    for found in run_ranks(limits, 2):
        assert found == [180.0] * 4
