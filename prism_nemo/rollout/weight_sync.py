"""Sends a policy's weights to rollout servers in buckets: each is packed once, while those before it are read by all servers.

An update is a channel (`rollout/channel.py`) to each server: a frame that begins it and is answered with what the server is, one
that agrees on the path of the bytes, one for every bucket, which the server acknowledges when it has read it, and one at the end,
whose answer tells what became of it all.
How the bytes of a bucket travel is a `WeightPath`: they lie in shared memory, they follow their frame, or they are broadcast in a
process group of run and servers.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from prism_nemo.config.enums import WeightTransport
from prism_nemo.rollout.buckets import NUM_SLOTS, Bucket, BucketBuffer, bucket_header
from prism_nemo.rollout.channel import PROTOCOL, Channel, ChannelClosed, ChannelTimeout
from prism_nemo.rollout.exchange import Address, Connection, ExchangeError, Reply
from prism_nemo.rollout.weight_group import (
    GroupError,
    GroupInvitation,
    Rendezvous,
    WeightGroup,
    backend_of,
    identity_of,
)
from prism_nemo.rollout.wire import WireError

HEALTH, WEIGHTS = "/v1/health", "/v1/weights"
UNPROCESSABLE = 422  # the engine itself refuses: it would refuse again
TOO_LONG = 413
_LEAST_SECONDS = 0.05  # to take what has arrived, when the time was spent on waiting for another server
_ALIVE_SECONDS = 5.0  # for a server to show that it is not the one at fault
_CPU = torch.device("cpu")
_log = logging.getLogger(__name__)


class WeightPath(Protocol):
    """How the bytes of a bucket reach a server that has agreed to it."""

    def parts(self, bucket: Bucket) -> tuple[dict[str, Any], Tensor | None]:
        """What the server must know to find them, and what of them follows the frame."""
        ...


class SharedMemoryPath:
    """The server has mapped the buffer: the bytes are there already."""

    def parts(self, bucket: Bucket) -> tuple[dict[str, Any], Tensor | None]:
        return {"at": bucket.at, "size": bucket.data.numel()}, None


class BodyPath:
    """The bytes follow their frame."""

    def parts(self, bucket: Bucket) -> tuple[dict[str, Any], Tensor | None]:
        return {}, bucket.data


class GroupPath:
    """The bytes are broadcast, once for all servers: `WeightSender` does that."""

    def parts(self, bucket: Bucket) -> tuple[dict[str, Any], Tensor | None]:
        return {"size": bucket.data.numel()}, None


@dataclass(frozen=True)
class Receiver:
    """A server that weights are sent to; `instance` is another one when it has been started again."""

    name: str
    instance: str
    address: Address


@dataclass(frozen=True)
class Refusal:
    """Why a server has not got the weights.

    final     it is the weights, or the configuration, that it does not take: it would refuse again
    at_fault  False: another server was, and took the update of all with it
    """

    what: str
    final: bool = False
    remedy: str | None = None
    at_fault: bool = True


@dataclass(frozen=True)
class SentWeights:
    """An update, by its own id, and the servers that do not have it."""

    update_id: str
    refusals: dict[str, Refusal]  # by the server's name


class WeightSender:
    """Keeps its buffer and its process group between updates: memory that is mapped afresh costs as much as a copy."""

    def __init__(
        self,
        *,
        bucket_bytes: int,
        timeout_seconds: float,
        transport: WeightTransport = WeightTransport.auto,
        device: torch.device = _CPU,
    ) -> None:
        """`timeout_seconds`: for each bucket; a server that takes longer does not get the weights. `device`: of the tensors."""
        self._bucket_bytes = bucket_bytes
        self._timeout = timeout_seconds
        self._transport = transport
        self._device = device
        self._buffer: BucketBuffer | None = None
        self._shared_name: str | None = None
        self._shares: dict[str, bool] = {}  # by a server's instance, whether it has mapped the buffer
        self._group: WeightGroup | None = None
        self._members: list[str] = []  # instances, in the order of their ranks
        self._group_id = ""
        self._unexplained = False  # the last group failed, and no server could be blamed
        self._told = ""  # which transport is in use, as it was logged last

    def send(self, tensors: Iterable[tuple[str, Tensor]], version: int, receivers: Sequence[Receiver]) -> SentWeights:
        """Reads all of `tensors`, whatever becomes of the servers: other ranks may be waiting for this one."""
        update_id = secrets.token_hex(8)
        links = [_Link(receiver, update_id, self._timeout) for receiver in receivers]
        try:
            _each(links, lambda link: link.begin(version))
            in_group = self._in_group(links)
            buffer = self._prepare(receivers, self._device if in_group else _CPU)
            if in_group:
                self._open_group(links, buffer.bucket_bytes)
            else:
                self._open(links)
            buffer.hide()
            self._log_transport(links)
            count = 0

            for bucket in buffer.pack(tensors, lambda number: _wait_for(links, number - NUM_SLOTS, self._timeout)):
                for link in links:
                    link.start(bucket)
                if in_group:
                    self._broadcast(bucket, links)
                count += 1
            _each(links, lambda link: link.finish(count))
            if in_group and any(link.refusal is not None for link in links):
                self._leave_group()
                self._judge(links)
            else:
                self._unexplained = False
        finally:
            for link in links:
                link.close()
        return SentWeights(update_id, {link.receiver.name: link.refusal for link in links if link.refusal is not None})

    def close(self) -> None:
        if self._buffer is not None:
            self._buffer.hide()
            self._buffer = None
        self._leave_group()

    # Buffer and transport

    def _in_group(self, links: Sequence[_Link]) -> bool:
        """Whether the bytes are broadcast; servers that cannot take part where they must refuse, with what to do."""
        if self._transport in (WeightTransport.shared_memory, WeightTransport.body):
            return False
        own, seen = identity_of(self._device), set[str]()
        able = True
        for link in links:
            if link.refusal is not None:
                continue
            same_kind = link.backend == backend_of(self._device)
            distinct = self._device.type != "cuda" or (link.device != own and link.device not in seen)
            seen.add(link.device)
            if same_kind and distinct:
                continue
            able = False
            if self._transport is WeightTransport.process_group:
                problem = "shares a GPU with the run or another server" if same_kind else "computes on another kind of device"
                link.refusal = Refusal(
                    f"it {problem}, and the weights are to travel in a process group",
                    final=True,
                    remedy="rollout.servers.weight_transport=auto, or servers on GPUs of their own (CUDA_VISIBLE_DEVICES)",
                )
        if self._transport is WeightTransport.process_group:
            return True
        return able and self._device.type == "cuda"

    def _prepare(self, receivers: Sequence[Receiver], device: torch.device) -> BucketBuffer:
        """A buffer that every server either has mapped, or can map now, or cannot map at all."""
        if self._buffer is None or self._buffer.device != device:
            if self._buffer is not None:
                self._buffer.hide()
            self._buffer = BucketBuffer(self._bucket_bytes, device)
        elif device.type == "cpu" and any(receiver.instance not in self._shares for receiver in receivers):
            self._buffer.renew()
        else:
            return self._buffer
        self._shared_name, self._shares = self._buffer.name, {}
        return self._buffer

    def _open(self, links: Sequence[_Link]) -> None:
        shared = None if self._transport is WeightTransport.body else self._shared_name
        _each(links, lambda link: link.agree({"shared": shared}))
        for link in links:
            if link.refusal is None and self._transport is WeightTransport.shared_memory and not link.shares:
                link.refusal = Refusal(
                    "it cannot map the run's shared memory",
                    final=True,
                    remedy="rollout.servers.weight_transport=auto, or one machine, one user and a /dev/shm with room for "
                    f"{NUM_SLOTS} times rollout.servers.weight_bucket_mb",
                )
        self._shares |= {link.receiver.instance: link.shares for link in links if link.refusal is None}

    def _log_transport(self, links: Sequence[_Link]) -> None:
        used = sorted({link.transport for link in links if link.refusal is None})
        told = ", ".join(used)
        if used and told != self._told:
            _log.info("weights travel by %s", told)
            self._told = told

    # The process group

    def _open_group(self, links: Sequence[_Link], bucket_bytes: int) -> None:
        """A group of all servers that are there: the one of the last update where they are the same."""
        ready = [link for link in links if link.refusal is None]
        members = [link.receiver.instance for link in ready]
        if self._group is not None and members == self._members:
            _each(ready, lambda link: link.agree({"group_id": self._group_id}))
            return
        self._leave_group()
        if not ready:
            return
        hosts = [link.local_host for link in ready]
        rendezvous = Rendezvous(hosts, self._timeout)
        self._group_id = rendezvous.group_id
        opened = []
        for rank, link in enumerate(ready, start=1):
            invitation = GroupInvitation(
                rendezvous.group_id,
                rendezvous.secret,
                backend_of(self._device),
                hosts[rank - 1],
                rendezvous.port,
                rank,
                len(ready) + 1,
                bucket_bytes,
                self._timeout,
            )
            opened.append(link.submit(partial(link.agree, {"group": invitation.header()})))
        try:
            store = rendezvous.open()
            self._group = WeightGroup(store, 0, len(ready) + 1, self._device, host=hosts[0], seconds=self._timeout)
            self._members = members
        except GroupError as error:
            self._fail_group(links, str(error))
        wait(opened)

    def _broadcast(self, bucket: Bucket, links: Sequence[_Link]) -> None:
        if self._group is None:
            return
        try:
            self._group.broadcast(bucket.data, self._timeout, lambda: any(link.refusal is not None for link in links))
        except GroupError as error:
            self._fail_group(links, str(error))

    def _fail_group(self, links: Sequence[_Link], what: str) -> None:
        self._leave_group()
        for link in links:
            link.give_up(what)

    def _judge(self, links: Sequence[_Link]) -> None:
        """Where one server fails, the group does, and with it the update of all: who still answers is not to blame.

        When all of them answer, the group is formed again; when that happens twice in a row, they all are.
        """
        failed = [link for link in links if link.refusal is not None]
        with ThreadPoolExecutor(len(failed)) as threads:
            alive = list(threads.map(lambda link: link.is_alive(), failed))
        if self._unexplained and all(alive):
            return
        self._unexplained = all(alive)
        for link, answers in zip(failed, alive, strict=True):
            if answers and link.refusal is not None and not link.refusal.final:
                link.refusal = replace(link.refusal, at_fault=False)

    def _leave_group(self) -> None:
        if self._group is not None:
            self._group.abort()
            self._group = None


def _each(links: Sequence[_Link], work: Callable[[_Link], None]) -> None:
    """On every link, in its own thread, and done when this returns."""
    wait([link.submit(partial(work, link)) for link in links])


def _wait_for(links: Sequence[_Link], number: int, seconds: float) -> None:
    """Until all servers have read that bucket."""
    deadline = time.monotonic() + seconds
    for link in links:
        link.attempt(partial(link.wait_for, number, deadline))


class _Refused(Exception):
    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.what)
        self.refusal = refusal


class _Link:
    """An update's way to one server, a message behind the other. After the first that fails there are no more."""

    def __init__(self, receiver: Receiver, update_id: str, timeout_seconds: float) -> None:
        self.receiver = receiver
        self.refusal: Refusal | None = None
        self.shares = False
        self.device = self.backend = ""  # of the server, as it told them
        self.transport = ""
        self.local_host = ""
        self._update_id = update_id
        self._timeout = timeout_seconds
        self._path: WeightPath = BodyPath()
        self._read = -1  # number of the last bucket that the server has read
        self._thread = ThreadPoolExecutor(1, "weights")
        self._connection = Connection(receiver.address)
        self._channel: Channel | None = None
        self._given_up: str | None = None
        self._sending: Future[None] | None = None  # the last bucket

    def submit(self, work: Callable[[], None]) -> Future[None]:
        return self._thread.submit(self.attempt, work)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._channel is not None:
            self._channel.shut_down()
        self._connection.close()

    def give_up(self, what: str) -> None:
        """From another thread: what is under way ends, and this is why, unless there is another reason."""
        self._given_up = what
        if self._channel is not None:
            self._channel.shut_down()

    def attempt(self, work: Callable[[], None]) -> None:
        """Does it, unless something has failed before. No two at a time."""
        if self.refusal is None and self._given_up is not None:
            self.refusal = Refusal(self._given_up)
        if self.refusal is not None:
            return
        try:
            work()
        except _Refused as error:
            self.refusal = error.refusal
        except (ExchangeError, WireError) as error:
            self.refusal = Refusal(str(error))
        except ChannelTimeout:
            self.refusal = Refusal(f"no answer within {self._timeout:g} s")
        except ChannelClosed as error:
            self.refusal = self._last_words() or Refusal(self._given_up or str(error))

    def begin(self, version: int) -> None:
        self._channel = Channel(self._connection.upgrade(WEIGHTS, PROTOCOL, timeout_seconds=self._timeout))
        self._channel.send({"update_id": self._update_id, "version": version}, seconds=self._timeout)
        told = self._next("instance")
        if told["instance"] != self.receiver.instance:
            raise _Refused(Refusal("it was started again meanwhile"))
        self.device, self.backend = str(told.get("device")), str(told.get("backend"))
        self.local_host = self._connection.local_host

    def agree(self, agreement: dict[str, Any]) -> None:
        """`agreement`: {"shared": name or null}, {"group": an invitation} or {"group_id": of the group that it is in}."""
        assert self._channel is not None
        self._channel.send(agreement, seconds=self._timeout)
        self.shares = self._next("ready").get("shares") is True
        if "shared" not in agreement:
            self._path, self.transport = GroupPath(), "process_group"
        elif self.shares:
            self._path, self.transport = SharedMemoryPath(), "shared_memory"
        else:
            self._path, self.transport = BodyPath(), "body"

    def start(self, bucket: Bucket) -> None:
        """Sends a bucket. What follows a frame may take long, and goes to all servers at once; a frame alone goes at once."""
        header, body = self._path.parts(bucket)
        frame = partial(self._send, {**bucket_header(bucket), **header}, body)
        if body is None:
            self.attempt(frame)
        else:
            self._sending = self.submit(frame)

    def _send(self, header: dict[str, Any], body: Tensor | None) -> None:
        assert self._channel is not None
        self._channel.send(header, body, seconds=self._timeout)

    def wait_for(self, number: int, deadline: float) -> None:
        """Until the server has read that bucket; 0 is the first."""
        if self._sending is not None:
            self._sending.result()
        while self._read < number:
            read = self._next("read", deadline)["read"]
            if read != self._read + 1:
                raise WireError(f"it acknowledges bucket {read!r:.20} in place of {self._read + 1}")
            self._read = read

    def finish(self, count: int) -> None:
        self._send({"num_buckets": count}, None)
        self.wait_for(count - 1, time.monotonic() + self._timeout)
        self._next("status")

    def is_alive(self) -> bool:
        """Whether the server answers, over a connection of its own."""
        try:
            reply = self.receiver.address.get(HEALTH, timeout_seconds=_ALIVE_SECONDS)
            return reply.ok and reply.json().get("instance") == self.receiver.instance
        except ExchangeError:
            return False

    def _next(self, key: str, deadline: float | None = None) -> dict[str, Any]:
        """The next frame, which has that key. Raises _Refused for a status that is an error."""
        assert self._channel is not None
        left = self._timeout if deadline is None else max(_LEAST_SECONDS, deadline - time.monotonic())
        frame, _ = self._channel.receive(seconds=left)
        status = frame.get("status")
        if type(status) is int and status != 200:
            raise _Refused(_refusal(Reply(status, json.dumps(frame).encode())))
        if key not in frame:
            raise WireError("it answers with something else than was asked")
        return frame

    def _last_words(self) -> Refusal | None:
        """Why the server closed the connection, where it has told."""
        try:
            while True:
                self._next("read")
        except _Refused as error:
            return error.refusal
        except (ChannelClosed, ChannelTimeout, WireError):
            return None


def _refusal(reply: Reply) -> Refusal:
    return Refusal(reply.problem, reply.status in (UNPROCESSABLE, TOO_LONG), _remedy(reply))


def _remedy(reply: Reply) -> str | None:
    if reply.status == TOO_LONG:
        return "a smaller rollout.servers.weight_bucket_mb, or a larger serve.max_request_mb"
    told = reply.json().get("remedy") if reply.status == UNPROCESSABLE else None
    return told if isinstance(told, str) else None
