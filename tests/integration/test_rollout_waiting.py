"""Ranks that wait for a leader's rollouts: longer than any collective may take."""

from __future__ import annotations

import datetime
import time

import pytest
import torch.distributed as dist
from helpers.ranks import run_ranks

from prism_nemo.config.schema import ParallelConfig, RuntimeConfig
from prism_nemo.engine import runtime as runtime_module
from prism_nemo.engine.runtime import session
from prism_nemo.rollout import base
from prism_nemo.rollout.base import RolloutError, WeightsLostError, shared_rollouts

_LIMIT_SECONDS = 8.0  # of every collective


class _Engine:
    """Counts how often it was given its weights back."""

    restored = 0

    def restore(self) -> None:
        self.restored += 1


def waiting() -> tuple[int, str, int]:
    """Two data-parallel leaders: one waits for twice the limit, the other has lost its weights once; then one fails."""
    join = runtime_module._join
    runtime_module._join = lambda device, limit: join(device, datetime.timedelta(seconds=_LIMIT_SECONDS))
    base.SLICE_SECONDS = 1.0
    engine, lost = _Engine(), []
    with session(ParallelConfig(), RuntimeConfig()) as runtime:

        def collect() -> int:
            if runtime.rank == 0:
                time.sleep(2 * _LIMIT_SECONDS)
                return 10
            if not lost:
                lost.append(True)
                raise WeightsLostError("gone", where="here")
            return 11

        found = shared_rollouts(runtime, collect, engine.restore)

        def fail() -> int:
            if runtime.rank == 1:
                raise RolloutError("no", where="there")
            return 1

        with pytest.raises(RolloutError) as raised:
            shared_rollouts(runtime, fail, engine.restore)
        dist.barrier()
    return found, str(raised.value.what), engine.restored


def test_a_leader_may_wait_longer_than_a_collective() -> None:
    assert run_ranks(waiting, 2) == [(10, "no", 1), (11, "no", 1)]


def group_of_one_model() -> tuple[int, int]:
    """The second rank leads nothing: it waits for the first."""
    join = runtime_module._join
    runtime_module._join = lambda device, limit: join(device, datetime.timedelta(seconds=_LIMIT_SECONDS))
    base.SLICE_SECONDS = 1.0
    calls = []
    with session(ParallelConfig(tensor_model_parallel_size=2), RuntimeConfig()) as runtime:

        def collect() -> int:
            calls.append(True)
            time.sleep(2 * _LIMIT_SECONDS)
            return 10

        found = shared_rollouts(runtime, collect, _Engine().restore)
    return found, len(calls)


def test_ranks_that_lead_nothing_wait_too() -> None:
    assert run_ranks(group_of_one_model, 2) == [(10, 1), (10, 0)]
