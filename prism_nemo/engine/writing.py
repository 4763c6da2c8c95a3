"""One model's part of a checkpoint on its way to the disk: planned by all ranks together, then written by each on its own.

Megatron plans what goes where (a collective) and describes it in the end. Between the two, files are written here, by threads of
this process: a fork of a process with device contexts and communication threads is a hazard, and a killed rank would leave its
writers waiting for it forever.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from inspect import unwrap
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from prism_nemo.convert.manifest import hash_files, seal
from prism_nemo.engine.runtime import Runtime
from prism_nemo.errors import CheckpointError

FORMAT = ("torch_dist", 1)  # and its version
_failures: list[Exception] = []  # of the file that the main rank alone writes while all plan


class SaveError(CheckpointError):
    """A checkpoint could not be written. Raised on all ranks alike; earlier checkpoints are as they were."""

    exit_status = 1

    def __init__(self, rank: int, problem: str, directory: Path) -> None:
        super().__init__(
            f"the checkpoint could not be written (rank {rank}: {problem})",
            where=str(directory),
            remedy="make room there; earlier checkpoints are as they were, and the same command goes on from the newest",
        )


class SaveHangs(SaveError):
    """It takes too long. Its threads may go on at any time, so that this run cannot save again."""


@contextmanager
def together(runtime: Runtime, directory: Path) -> Iterator[None]:
    """A block that writes files: what the disk refuses any rank is a SaveError on every rank. A collective at its end."""
    problem: str | None = None
    try:
        yield
    except OSError as error:
        problem = str(error)
    for rank, found in enumerate(runtime.gather_objects_over_all(problem)):
        if found is not None:
            raise SaveError(rank, found, directory)


@dataclass(frozen=True)
class Written:
    """What a rank has written of one model: results for Megatron's description, and each file's hash."""

    results: list[Any]
    hashes: dict[str, str]


@dataclass
class ModelFiles:
    """This rank's files of one model, planned and not yet written."""

    directory: Path
    _writer: FileSystemWriterAsync
    _description: Any  # torch's Metadata, on the main rank
    _buckets: list[Any] = field(default_factory=list)  # (path, name, (bytes, tensors)), one for each file

    def bring_to_host(self, live: set[int]) -> None:
        """Has every tensor in host memory; of those that are there already, what lies in a `live` storage is copied.

        live   addresses of the storages that are going to change before the files are written
        """
        on_device = False
        for _, _, (_, tensors) in self._buckets:
            for index, (item, tensor) in enumerate(tensors):
                if tensor.device.type != "cpu":
                    on_device = True
                    tensors[index] = (item, tensor.to("cpu", non_blocking=True))  # into pinned memory
                elif tensor.untyped_storage().data_ptr() in live:
                    tensors[index] = (item, tensor.clone())
        if on_device:
            torch.cuda.synchronize()

    def write(self) -> Written:
        """Writes them to the disk, and reads them back for their hashes. OSError, or what else went wrong. No collective."""
        done: queue.Queue[tuple[int, Any]] = queue.Queue()
        count: queue.Queue[int] = queue.Queue()
        write = unwrap(FileSystemWriterAsync.write_preloaded_data)  # without what stops the collection of garbage meanwhile
        transforms = [self._writer.transforms] if hasattr(self._writer, "transforms") else []
        with ThreadPoolExecutor(max(1, len(self._buckets))) as threads:
            for index, bucket in enumerate(self._buckets):
                count.put(index)
                threads.submit(write, transforms, index, bucket, done, count, True)
        results: list[Any] = []
        for _, found in sorted((done.get_nowait() for _ in self._buckets), key=lambda pair: pair[0]):
            if isinstance(found, Exception):
                raise found
            results += found
        names = [name for _, name, _ in self._buckets]
        self._buckets = self._writer.write_buckets = []  # the copy's memory
        return Written(results, hash_files(self.directory, names))

    def complete(self, parts: Sequence[Written]) -> None:
        """On the main rank, when all ranks have written theirs: the description, and last of all the manifest."""
        self._writer.finish(self._description, [part.results for part in parts])
        serialization.save_config(CheckpointingConfig(*FORMAT), str(self.directory))
        seal(self.directory, {name: digest for part in parts for name, digest in part.hashes.items()})


class _Planned(TorchDistSaveShardedStrategy):
    """Megatron's plan of a save, without the save."""

    def __init__(self) -> None:
        super().__init__(*FORMAT)

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any) -> AsyncRequest:
        self.writer, self.description = planned[:2]
        return AsyncRequest(None, (), [])


def plan(directory: Path, state: dict[str, Any], content: Mapping[str, Any]) -> ModelFiles:
    """What every rank writes of a model's sharded state. A collective; only the main rank's `common.pt` is written by it.

    Raises OSError when that cannot be: not before all ranks have planned, as the main rank must not stay away from that.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()  # unused; Megatron's own starts a process
        TorchCommonSaveStrategy.save_common = _told_later(TorchCommonSaveStrategy.save_common)
    _failures.clear()
    strategy = _Planned()
    dist_checkpointing.save(state, str(directory), strategy, async_sharded_save=True, content_metadata=dict(content))
    if _failures:
        raise OSError(str(_failures[0])) from _failures[0]
    writer = strategy.writer
    return ModelFiles(directory, writer, strategy.description, list(writer.write_buckets or []))


def _told_later(write: Callable[..., None]) -> Callable[..., None]:
    @wraps(write)
    def attempt(*arguments: Any, **named: Any) -> None:
        try:
            write(*arguments, **named)
        except (OSError, RuntimeError) as error:  # torch.save has the latter for a full disk
            _failures.append(error)

    return attempt
