"""An update's way to one rollout server: a message behind the other, on a channel (`rollout/channel.py`)."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor

from prism_nemo.rollout.buckets import Bucket, bucket_header
from prism_nemo.rollout.channel import PROTOCOL, Channel, ChannelClosed, ChannelTimeout
from prism_nemo.rollout.exchange import Address, Connection, ExchangeError, Reply
from prism_nemo.rollout.wire import WireError

HEALTH, WEIGHTS = "/v1/health", "/v1/weights"
UNPROCESSABLE = 422  # the engine itself refuses: it would refuse again
TOO_LONG = 413
_LEAST_SECONDS = 0.05  # to take what has arrived, when the time was spent on waiting for another server
_ALIVE_SECONDS = 5.0  # for a server to show that it is not the one at fault
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


class _Refused(Exception):
    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.what)
        self.refusal = refusal


class Link:
    """An update's way to one server, a message behind the other. After the first that fails there are no more."""

    def __init__(self, receiver: Receiver, update_id: str, timeout_seconds: float) -> None:
        self.receiver = receiver
        self.refusal: Refusal | None = None
        self.shares = False
        self.device = self.backend = self.libraries = ""  # of the server, as it told them
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
        except Exception as error:  # nobody would look at it in this thread, and the update would count as arrived
            _log.exception("weights for %s", self.receiver.name)
            self.refusal = Refusal(f"{type(error).__name__}: {error}"[:500])

    def begin(self, version: int) -> None:
        self._channel = Channel(self._connection.upgrade(WEIGHTS, PROTOCOL, timeout_seconds=self._timeout))
        self._channel.send({"update_id": self._update_id, "version": version}, seconds=self._timeout)
        told = self._next("instance")
        if told["instance"] != self.receiver.instance:
            raise _Refused(Refusal("it was started again meanwhile"))
        self.device, self.backend, self.libraries = (str(told.get(key)) for key in ("device", "backend", "libraries"))
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
