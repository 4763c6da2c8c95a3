"""Several processes that convert together: torchrun's ranks, each with a share of the files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from prism_nemo.errors import CheckpointError


@dataclass(frozen=True)
class Ranks:
    """This process's number among those that work together; alone by default."""

    rank: int = 0
    size: int = 1

    def gather(self, value: Any) -> list[Any]:
        """One value of every rank, on every rank. A collective."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """What the ranks do in it either succeeds on all of them, or raises on all: nobody waits for one that failed."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        failures = self.gather(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        for rank, message in enumerate(failures):
            if message is not None:
                raise CheckpointError(f"rank {rank} failed:\n{message}")


ALONE = Ranks()


@contextmanager
def launched_ranks() -> Iterator[Ranks]:
    """The ranks that torchrun (or srun with its variables) started; this process alone where nobody did."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield ALONE
        return
    import torch.distributed as dist

    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo")
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        if started:
            dist.destroy_process_group()
