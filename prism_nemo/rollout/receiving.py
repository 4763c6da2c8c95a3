"""How a rollout server takes weights: its engine reads the frames of a channel as one stream of tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, wait
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from prism_nemo.rollout.buckets import Assembly, Piece, Rows, map_shared, read_pieces
from prism_nemo.rollout.channel import Channel, ChannelClosed
from prism_nemo.rollout.weight_group import GroupError, GroupInvitation, WeightGroup, backend_of, join_store
from prism_nemo.rollout.wire import WireError

T = TypeVar("T")


class TakesWeights(Protocol):
    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None: ...


@runtime_checkable
class TakesRows(Protocol):
    """An engine that needs no whole tensors: those that are larger than a bucket are not put together for it."""

    def update_rows(self, rows: Iterable[Rows], version: int) -> None:
        """`update_weights` from parts; the rows of a tensor come in order, one behind the other."""
        ...


class UpdateAborted(Exception):
    """The update was given up, or another one begun in its place."""


BytesOf = Callable[[dict[str, Any], Tensor, Channel], Tensor]
"""(a bucket's header, the body of its frame, the channel) -> its bytes, uint8, valid until it is acknowledged.

Raises WireError, and GroupError where they do not come.
"""


class Inlet:
    """The ways by which bytes reach this server. What it has mapped, and the group it is in, serve the next update too."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._shared_name: str | None = None
        self._shared: Tensor | None = None
        self._group: WeightGroup | None = None
        self._group_id = ""
        self._group_seconds = 0.0
        self._memory = torch.empty(0, dtype=torch.uint8)  # what is broadcast into

    def open(self, header: dict[str, Any], host: str) -> tuple[BytesOf, dict[str, Any]]:
        """As a channel's first frame asks for it, and what it is told. Raises WireError and GroupError.

        host   the address of this end of the channel
        """
        if "group" in header:
            self._join(GroupInvitation.read(header["group"]), host)
            return self._broadcast_bytes, {}
        if "group_id" in header:
            if self._group is None or header["group_id"] != self._group_id:
                raise GroupError("the server is not in that process group (any more)")
            return self._broadcast_bytes, {}
        name = header.get("shared")
        if not isinstance(name, str | None):
            raise WireError("not the begin of a channel")
        if name is None:
            return _body_bytes, {"shares": False}
        if name != self._shared_name or self._shared is None:
            self._shared_name, self._shared = name, map_shared(name)
        if self._shared is None:
            return _body_bytes, {"shares": False}
        return self._shared_bytes, {"shares": True}

    def close(self) -> None:
        if self._group is not None:
            self._group.abort()
            self._group = None

    def _join(self, invitation: GroupInvitation, host: str) -> None:
        self.close()
        if invitation.backend != backend_of(self.device):
            raise WireError(f"the run broadcasts by {invitation.backend}, and this server is on {self.device}")
        store = join_store(invitation)
        self._group = WeightGroup(store, invitation.rank, invitation.size, self.device, host=host, seconds=invitation.seconds)
        self._group_id, self._group_seconds = invitation.group_id, invitation.seconds
        if self._memory.numel() != invitation.bucket_bytes:
            self._memory = torch.empty(invitation.bucket_bytes, dtype=torch.uint8, device=self.device)

    def _shared_bytes(self, header: dict[str, Any], body: Tensor, channel: Channel) -> Tensor:
        at, size = header.get("at"), header.get("size")
        assert self._shared is not None
        if type(at) is not int or type(size) is not int or not 0 <= at <= at + size <= self._shared.numel():
            raise WireError("the bucket does not lie within the shared memory")
        return self._shared[at : at + size]

    def _broadcast_bytes(self, header: dict[str, Any], body: Tensor, channel: Channel) -> Tensor:
        size = header.get("size")
        assert self._group is not None
        if type(size) is not int or not 0 <= size <= self._memory.numel():
            raise WireError("the bucket is larger than was agreed")
        self._group.broadcast(self._memory[:size], self._group_seconds, channel.is_over)
        return self._memory[:size]


def _body_bytes(header: dict[str, Any], body: Tensor, channel: Channel) -> Tensor:
    return body


class WeightUpdate:
    """One update. Its engine reads it in a thread of its own, and acknowledges every bucket when it is done with its bytes."""

    def __init__(
        self, engine: TakesWeights, executor: Executor, update_id: str, version: int, channel: Channel, assembly: Assembly
    ) -> None:
        self.update_id = update_id
        self.version = version
        self._engine, self._executor = engine, executor
        self._assembly = assembly
        self._channel = channel
        self._loaded: Future[None] | None = None
        self._problem: WireError | GroupError | UpdateAborted | None = None  # what is wrong with what came
        self._all_read = False

    def start(self, open_inlet: Callable[[], tuple[BytesOf, dict[str, Any]]]) -> None:
        """`open_inlet` is called in the engine's thread."""
        self._assembly.restart()
        if isinstance(self._engine, TakesRows):
            self._loaded = self._executor.submit(
                self._engine.update_rows, self._read(open_inlet, self._assembly.rows), self.version
            )
        else:
            self._loaded = self._executor.submit(
                self._engine.update_weights, self._read(open_inlet, self._assembly.tensors), self.version
            )

    def wait(self) -> None:
        """Returns when the engine has all weights.

        Raises WireError for what is damaged, missing or out of turn, UpdateAborted where the sender went away, GroupError where
        another server may have, and what the engine raises.
        """
        assert self._loaded is not None
        error = self._loaded.exception()
        if self._problem is not None:
            raise self._problem
        if error is not None:
            raise error
        if not self._all_read:
            raise WireError("the engine left weights unread")

    def abort(self) -> None:
        """The engine ends reading, and has no weights."""
        self._channel.shut_down()
        if self._loaded is not None:
            wait([self._loaded])

    def _read(
        self,
        open_inlet: Callable[[], tuple[BytesOf, dict[str, Any]]],
        assemble: Callable[[list[tuple[Piece, Tensor]]], Iterator[T]],
    ) -> Iterator[T]:
        """Each is valid until the next is asked for: then its memory may be another bucket's."""
        channel, expected = self._channel, 0  # number of the next bucket
        try:
            bytes_of, told = open_inlet()
            channel.send({"ready": True, **told})
            while True:
                header, body = channel.receive()
                if "num_buckets" in header:
                    break
                if header.get("number") != expected:
                    raise WireError(f"bucket {header.get('number')!r:.20} came in place of {expected}")
                yield from assemble(read_pieces(header, bytes_of(header, body, channel)))
                channel.send({"read": expected})
                expected += 1
            if header["num_buckets"] != expected:
                raise WireError(f"{expected} buckets came, {header['num_buckets']!r:.20} were sent")
            self._assembly.check_complete()
            self._all_read = True
        except ChannelClosed as error:
            self._problem = UpdateAborted(f"the update was given up: {error}")
            raise self._problem from error
        except (WireError, GroupError) as error:
            self._problem = error
            raise
