"""How a checkpoint's files get to the disk: in this process, and so that what goes wrong on one rank is known to all."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from torch.distributed.checkpoint.api import CheckpointException

from prism_nemo.engine.runtime import Runtime
from prism_nemo.errors import CheckpointError

_failures: list[Exception] = []  # of the files that the main rank alone writes, in the save that is running


class SaveError(CheckpointError):
    """A checkpoint could not be written. Raised on all ranks alike; earlier checkpoints are as they were."""

    exit_status = 1


@contextmanager
def together(runtime: Runtime, directory: Path) -> Iterator[None]:
    """A block that writes files: what the disk refuses any rank is a SaveError on every rank. A collective at its end."""
    problem: str | None = None
    try:
        yield
    except CheckpointException as error:
        problem = next((str(failure) for failure, _ in error.failures.values()), "")
    except OSError as error:
        problem = str(error)
    found = runtime.gather_objects_over_all(problem)
    failed = [rank for rank, what in enumerate(found) if what is not None]
    if failed:
        named = next((rank for rank in failed if found[rank]), failed[0])  # of a writer's failure only the main rank knows more
        raise SaveError(
            f"the checkpoint could not be written (rank {named}: {found[named] or 'a write failed'})",
            where=str(directory),
            remedy="make room there; earlier checkpoints are as they were, and the same command goes on from the newest",
        )


def write_in_this_process() -> None:
    """Has Megatron write its files here, in threads, instead of in forked processes with a manager process for the results.

    A fork of a process with device contexts and communication threads is a hazard, a killed rank would leave its writers waiting
    for it forever, and the manager's start takes seconds. Saves are waited for anyway. The three small files that the main rank
    alone writes come between collectives: a full disk must not take it out of these, so that is told when all is done.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
        FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_buckets)
        TorchCommonSaveStrategy.save_common = _told_later(TorchCommonSaveStrategy.save_common)
        FileSystemWriterAsync.finish = _told_later(FileSystemWriterAsync.finish)
        serialization.save_config = _told_later(serialization.save_config)
    _failures.clear()


def raise_what_failed() -> None:
    """OSError when one of the main rank's own files could not be written since `write_in_this_process`."""
    if _failures:
        raise OSError(str(_failures[0])) from _failures[0]


def _told_later(write: Callable[..., None]) -> Callable[..., None]:
    @wraps(write)
    def attempt(*arguments: Any, **named: Any) -> None:
        try:
            write(*arguments, **named)
        except (OSError, RuntimeError) as error:  # torch.save has the latter for a full disk
            _failures.append(error)

    return attempt


def _write_buckets(transforms: Any, use_msc: bool, rank: int, buckets: list[Any], results: Any) -> None:
    """`FileSystemWriterAsync.write_preloaded_data_multiproc` without processes: a thread for each file."""
    own: queue.Queue[tuple[int, Any]] = queue.Queue()
    count: queue.Queue[int] = queue.Queue()
    with ThreadPoolExecutor(max(1, len(buckets))) as threads:
        for index, bucket in enumerate(buckets):
            count.put(index)
            threads.submit(
                FileSystemWriterAsync.write_preloaded_data, transforms, index, bucket, own, count, True, use_msc=use_msc
            )
    written = dict(own.get_nowait() for _ in buckets)
    failures = [result for result in written.values() if isinstance(result, Exception)]
    results.put(failures[0] if failures else written)
