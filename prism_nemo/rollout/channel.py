"""A connection of frames: what an HTTP connection to a rollout server becomes for an update's weights.

A frame is a JSON header as in `rollout/wire.py`, and the bytes that it announces as `body`. A request for every bucket would take
as long as to copy some megabytes; a frame takes as long as the socket.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from prism_nemo.rollout.wire import LENGTH_BYTES, MAX_HEADER_BYTES, WireError, pack_header, parse_header
from prism_nemo.waiting import waiting

PROTOCOL = "prism-nemo-weights"  # as the HTTP header `Upgrade` has it
_DRAIN_SECONDS = 5.0  # without a byte
_NO_BODY = torch.empty(0, dtype=torch.uint8)
B = TypeVar("B", bytearray, memoryview)


class FrameTooLong(WireError):
    """A body of more bytes than this end takes."""


class ChannelClosed(Exception):
    """The other end went away, or this one has been shut down."""


class ChannelTimeout(Exception):
    """The other end does not read or does not answer."""


class Channel:
    """One end, for one thread at a time; any thread may ask whether it `is_over`, and `shut_down` what another waits for."""

    def __init__(self, connection: socket.socket, *, max_body_bytes: int = 0) -> None:
        """`max_body_bytes`: of a frame; what announces more is refused."""
        self._socket = connection
        self._max_body_bytes = max_body_bytes
        with contextlib.suppress(OSError):  # it may be no TCP
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, header: Mapping[str, Any], body: Tensor | None = None, *, seconds: float | None = None) -> None:
        """Raises ChannelClosed, and ChannelTimeout when not all of it can be sent within `seconds`."""
        parts: list[bytes | memoryview] = [pack_header(header if body is None else {**header, "body": body.numel()})]
        if body is not None:
            parts.append(memoryview(body.numpy().data))
        deadline = None if seconds is None else time.monotonic() + seconds
        for part in parts:
            left = memoryview(part)
            while left:
                left = left[self._within(deadline, partial(self._socket.send, left)) :]

    def receive(self, *, seconds: float | None = None) -> tuple[dict[str, Any], Tensor]:
        """A frame's header and its body, uint8. Raises WireError, ChannelClosed and ChannelTimeout."""
        deadline = None if seconds is None else time.monotonic() + seconds
        size = int.from_bytes(self._read_into(bytearray(LENGTH_BYTES), deadline), "little")
        if size > MAX_HEADER_BYTES:
            raise WireError(f"a header of {size} bytes")
        header = parse_header(bytes(self._read_into(bytearray(size), deadline)))
        body = header.get("body", 0)
        if type(body) is not int or body < 0:
            raise WireError(f"a body of {body!r:.30} bytes")
        if body > self._max_body_bytes:
            raise FrameTooLong(f"a body of {body} bytes; serve.max_request_mb allows {self._max_body_bytes >> 20} MiB")
        if body == 0:
            return header, _NO_BODY
        data = torch.empty(body, dtype=torch.uint8)
        self._read_into(data.numpy().data, deadline)
        return header, data

    def is_over(self) -> bool:
        """Whether the other end is gone; what it sent before may still lie there."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    def shut_down(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def drain(self, most: int) -> None:
        """Reads and drops what comes until the other end closes: one that is still sending hears what was answered."""
        buffer = bytearray(1 << 16)
        with contextlib.suppress(ChannelClosed, ChannelTimeout):
            while most > 0:
                most -= self._read_some(memoryview(buffer), time.monotonic() + _DRAIN_SECONDS)

    def _read_into(self, target: B, deadline: float | None) -> B:
        view = memoryview(target)
        while view:
            view = view[self._read_some(view, deadline) :]
        return target

    def _read_some(self, target: memoryview, deadline: float | None) -> int:
        count = self._within(deadline, partial(self._socket.recv_into, target))
        if count == 0:
            raise ChannelClosed("the connection was closed")
        return count

    @waiting("the other end of a connection for weights")
    def _within(self, deadline: float | None, work: Callable[[], int]) -> int:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise ChannelTimeout
        try:
            self._socket.settimeout(left)
            return work()
        except TimeoutError as error:
            raise ChannelTimeout from error
        except OSError as error:
            raise ChannelClosed(f"{type(error).__name__}: {error}") from error
