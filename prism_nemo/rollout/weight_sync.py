"""Sends a policy's weights to rollout servers in buckets: each is packed once, while the one before is read by all servers.

The path of a bucket's bytes to a server is a `WeightTransport`: shared memory on one machine, otherwise the request's body.
(Between GPUs it would be a collective of a process group that run and servers share: `begin` agrees on it, as on shared memory.)
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from prism_nemo.rollout.buckets import Bucket, BucketBuffer, piece_header
from prism_nemo.rollout.exchange import Address, Connection, ExchangeError, Reply
from prism_nemo.rollout.wire import pack_header

BEGIN, BUCKET, FINISH = "/v1/weights/begin", "/v1/weights/bucket", "/v1/weights/finish"
UNPROCESSABLE = 422  # the engine itself refuses: it would refuse again
TOO_LONG = 413


class WeightTransport(Protocol):
    """How the bytes of a bucket reach a server that has agreed to it at `begin`."""

    def parts(self, bucket: Bucket) -> tuple[dict[str, Any], Sequence[memoryview]]:
        """What the server must know to find them, and what of them goes into the request's body."""
        ...


class SharedMemoryTransport:
    """The server has mapped the buffer: the bytes are there already."""

    def parts(self, bucket: Bucket) -> tuple[dict[str, Any], Sequence[memoryview]]:
        return {"at": bucket.at, "size": bucket.data.numel()}, ()


class BodyTransport:
    """The bytes are the request's body."""

    def parts(self, bucket: Bucket) -> tuple[dict[str, Any], Sequence[memoryview]]:
        return {}, (memoryview(bucket.data.numpy().data),)


@dataclass(frozen=True)
class Receiver:
    """A server that weights are sent to; `instance` is another one when it has been started again."""

    name: str
    instance: str
    address: Address


@dataclass(frozen=True)
class Refusal:
    """Why a server has not got the weights; `final` where it is the weights that its engine does not take."""

    what: str
    final: bool = False
    remedy: str | None = None


@dataclass(frozen=True)
class SentWeights:
    """An update, by its own id, and the servers that do not have it."""

    update_id: str
    refusals: dict[str, Refusal]  # by the server's name


class WeightSender:
    """Keeps its buffer between updates: memory that is mapped afresh costs as much as a copy."""

    def __init__(self, *, bucket_bytes: int, timeout_seconds: float) -> None:
        """`timeout_seconds`: for each request; a server that takes longer does not get the weights."""
        self._bucket_bytes = bucket_bytes
        self._timeout = timeout_seconds
        self._buffer: BucketBuffer | None = None
        self._shared_name: str | None = None
        self._shares: dict[str, bool] = {}  # by a server's instance, whether it has mapped the buffer

    def send(self, tensors: Iterable[tuple[str, Tensor]], version: int, receivers: Sequence[Receiver]) -> SentWeights:
        """Reads all of `tensors`, whatever becomes of the servers: other ranks may be waiting for this one."""
        update_id = secrets.token_hex(8)
        buffer = self._prepare(receivers)
        links = [_Link(receiver, update_id, self._timeout) for receiver in receivers]
        try:
            header = {"update_id": update_id, "version": version, "shared": self._shared_name}
            wait([link.submit(partial(link.begin, header)) for link in links])
            buffer.hide()
            self._shares |= {link.receiver.instance: link.shares for link in links if link.refusal is None}
            under_way: dict[int, list[Future[None]]] = {0: [], 1: []}
            count = 0
            for bucket in buffer.pack(tensors, lambda half: _finished(under_way[half])):
                under_way[bucket.number % 2] = [link.submit(partial(link.send, bucket)) for link in links]
                count += 1
            wait([link.submit(partial(link.finish, count)) for link in links])
        finally:
            for link in links:
                link.close()
        return SentWeights(update_id, {link.receiver.name: link.refusal for link in links if link.refusal is not None})

    def close(self) -> None:
        if self._buffer is not None:
            self._buffer.hide()
            self._buffer = None

    def _prepare(self, receivers: Sequence[Receiver]) -> BucketBuffer:
        """A buffer that every server either has mapped, or can map now, or cannot map at all."""
        if self._buffer is None:
            self._buffer = BucketBuffer(self._bucket_bytes)
        elif any(receiver.instance not in self._shares for receiver in receivers):
            self._buffer.renew()
        else:
            return self._buffer
        self._shared_name, self._shares = self._buffer.name, {}
        return self._buffer


def _finished(requests: Sequence[Future[None]]) -> None:
    wait(requests)


class _Refused(Exception):
    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.what)
        self.refusal = refusal


class _Link:
    """The requests of one update to one server, one behind the other. After the first that fails there are no more."""

    def __init__(self, receiver: Receiver, update_id: str, timeout_seconds: float) -> None:
        self.receiver = receiver
        self.refusal: Refusal | None = None
        self.shares = False
        self._update_id = update_id
        self._timeout = timeout_seconds
        self._transport: WeightTransport = BodyTransport()
        self._thread = ThreadPoolExecutor(1, "weights")
        self._connection = Connection(receiver.address)

    def submit(self, request: Callable[[], None]) -> Future[None]:
        return self._thread.submit(self._attempt, request)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._connection.close()

    def _attempt(self, request: Callable[[], None]) -> None:
        if self.refusal is not None:
            return
        try:
            request()
        except _Refused as error:
            self.refusal = error.refusal
        except ExchangeError as error:
            self.refusal = Refusal(str(error))

    def begin(self, header: dict[str, Any]) -> None:
        told = self._post(BEGIN, header).json()
        if told.get("instance") != self.receiver.instance:
            raise _Refused(Refusal("it was started again meanwhile"))
        self.shares = header["shared"] is not None and told.get("shares") is True
        if self.shares:
            self._transport = SharedMemoryTransport()

    def send(self, bucket: Bucket) -> None:
        where, parts = self._transport.parts(bucket)
        self._post(BUCKET, {"update_id": self._update_id, **piece_header(bucket), **where}, parts)

    def finish(self, count: int) -> None:
        self._post(FINISH, {"update_id": self._update_id, "num_buckets": count})

    def _post(self, path: str, header: dict[str, Any], parts: Sequence[memoryview] = ()) -> Reply:
        reply = self._connection.exchange("POST", path, [pack_header(header), *parts], timeout_seconds=self._timeout)
        if not reply.ok:
            raise _Refused(Refusal(reply.problem, reply.status in (UNPROCESSABLE, TOO_LONG), _remedy(reply)))
        return reply


def _remedy(reply: Reply) -> str | None:
    if reply.status == TOO_LONG:
        return "a smaller rollout.servers.weight_bucket_mb, or a larger serve.max_request_mb"
    told = reply.json().get("remedy") if reply.status == UNPROCESSABLE else None
    return told if isinstance(told, str) else None
