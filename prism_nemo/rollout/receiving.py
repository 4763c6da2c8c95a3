"""How a rollout server takes weights: buckets arrive in requests, and its engine reads them as one stream of tensors."""

from __future__ import annotations

import queue
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from prism_nemo.rollout.buckets import Assembly, Piece, map_shared, read_pieces
from prism_nemo.rollout.wire import WireError


class TakesWeights(Protocol):
    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None: ...


class UpdateAborted(Exception):
    """The update was given up, or another one begun in its place."""


@dataclass(frozen=True, eq=False)
class _Arrived:
    pieces: list[tuple[Piece, Tensor]]
    read: Future[None] = field(default_factory=Future)


class SharedMemory:
    """What this server has mapped: the buffer of the run that updates it, as long as that keeps it."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._data: Tensor | None = None

    def open(self, name: str | None) -> Tensor | None:
        """The memory of that name; None without a name, or where it is not this machine's. Raises WireError."""
        if name is None:
            return None
        if name != self._name or self._data is None:
            self._name, self._data = name, map_shared(name)
        return self._data


class WeightUpdate:
    """One update, which the engine reads in a thread of its own while its buckets arrive."""

    def __init__(
        self,
        engine: TakesWeights,
        executor: Executor,
        update_id: str,
        version: int,
        *,
        shared: Tensor | None,
        assembly: Assembly,
    ) -> None:
        self.update_id = update_id
        self.version = version
        self._shared = shared
        self._assembly = assembly
        assembly.restart()
        self._arrived: queue.SimpleQueue[_Arrived | UpdateAborted | None] = queue.SimpleQueue()
        self._expected = 0  # number of the next bucket
        self._all_read = False
        self._loaded: Future[None] = executor.submit(engine.update_weights, self._tensors(), version)

    @property
    def shares(self) -> bool:
        return self._shared is not None

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each is valid until the next is asked for: then its memory may be the next bucket's."""
        while (arrived := self._arrived.get()) is not None:
            if isinstance(arrived, UpdateAborted):
                raise arrived
            yield from self._assembly.add(arrived.pieces)
            arrived.read.set_result(None)
        self._assembly.check_complete()
        self._all_read = True

    def take(self, header: dict[str, Any], body: Tensor) -> None:
        """A bucket, uint8 `body` or in shared memory; returns when the engine has read it.

        Raises WireError for a bucket that is damaged or out of turn, and what the engine raises.
        """
        if header.get("number") != self._expected:
            raise WireError(f"bucket {header.get('number')!r:.20} came in place of {self._expected}")
        arrived = _Arrived(read_pieces(header, self._bytes_of(header, body)))
        self._expected += 1
        self._arrived.put(arrived)
        wait([arrived.read, self._loaded], return_when=FIRST_COMPLETED)
        if not arrived.read.done():
            self._loaded.result()
            raise WireError("the engine stopped reading")

    def finish(self, header: dict[str, Any]) -> None:
        """Returns when the engine has all weights. Raises WireError when more was sent than came, and what the engine raises."""
        if header.get("num_buckets") != self._expected:
            raise WireError(f"{self._expected} buckets came, {header.get('num_buckets')!r:.20} were sent")
        self._arrived.put(None)
        self._loaded.result()
        if not self._all_read:
            raise WireError("the engine left weights unread")

    def abort(self) -> None:
        """The engine ends reading, and has no weights."""
        self._arrived.put(UpdateAborted("the update was given up"))
        wait([self._loaded])

    def _bytes_of(self, header: dict[str, Any], body: Tensor) -> Tensor:
        if "at" not in header:
            return body
        at, size = header["at"], header.get("size")
        if self._shared is None or type(at) is not int or type(size) is not int:
            raise WireError("there is no shared memory")
        if not 0 <= at <= at + size <= self._shared.numel():
            raise WireError("the bucket does not lie within the shared memory")
        return self._shared[at : at + size]
