"""One HTTP request to a rollout server: with a limit on the time of the whole, and on the size of the answer."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from prism_nemo.waiting import waiting

_MAX_STATUS_BYTES = 1 << 20  # of answers that are JSON


class ExchangeError(Exception):
    """There is no answer: the server cannot be reached, went away, took too long, or does not speak HTTP."""

    def __init__(self, what: str, *, connected: bool = True, timed_out: bool = False) -> None:
        super().__init__(what)
        self.connected = connected  # the server may have begun with the request
        self.timed_out = timed_out


@dataclass(frozen=True)
class Reply:
    status: int
    body: bytes

    @property
    def ok(self) -> bool:
        return self.status == http.client.OK

    def json(self) -> dict[str, Any]:
        """The body's object. Raises ExchangeError when it is none."""
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise ExchangeError(f"status {self.status} with something that is no JSON") from error
        if not isinstance(value, dict):
            raise ExchangeError(f"status {self.status} with something that is no JSON object")
        return value

    @property
    def problem(self) -> str:
        """What a server says that refuses, for people; it may be any server."""
        try:
            told = self.json().get("what")
        except ExchangeError:
            told = None
        if not isinstance(told, str):
            return f"status {self.status}"
        return f"status {self.status}: " + "".join(sign if sign.isprintable() else " " for sign in told[:300])


@dataclass(frozen=True)
class Address:
    """Of a server, and the token that it wants."""

    url: str
    token: str | None = field(repr=False)

    def get(self, path: str, *, timeout_seconds: float) -> Reply:
        with contextlib.closing(Connection(self)) as connection:
            return connection.exchange("GET", path, (), timeout_seconds=timeout_seconds)

    def post(
        self,
        path: str,
        parts: Sequence[bytes | memoryview],
        *,
        timeout_seconds: float,
        max_bytes: int = _MAX_STATUS_BYTES,
    ) -> Reply:
        """Sends the parts as one body. Raises ExchangeError."""
        with contextlib.closing(Connection(self)) as connection:
            return connection.exchange("POST", path, parts, timeout_seconds=timeout_seconds, max_bytes=max_bytes)


class Connection:
    """To one server, for one request after the other. It is of no use after one that failed."""

    def __init__(self, address: Address) -> None:
        target = urlsplit(address.url)
        kind = http.client.HTTPSConnection if target.scheme == "https" else http.client.HTTPConnection
        self._connection = kind(target.hostname or "", target.port)
        self._prefix, self._token = target.path.rstrip("/"), address.token

    @waiting("a rollout server")
    def exchange(
        self,
        method: str,
        path: str,
        parts: Sequence[bytes | memoryview],
        *,
        timeout_seconds: float,
        max_bytes: int = _MAX_STATUS_BYTES,
        upgrade: str | None = None,
    ) -> Reply:
        """One request and its answer. Raises ExchangeError."""
        over = threading.Event()

        def end() -> None:
            over.set()
            if self._connection.sock is not None:
                _shut_down(self._connection.sock)

        # A socket's own limit is for each read, and a server that sends a byte now and then would never reach it.
        clock = threading.Timer(timeout_seconds, end)
        clock.daemon = True
        clock.start()
        connected = self._connection.sock is not None
        try:
            if not connected:
                self._connection.timeout = timeout_seconds
                self._connection.connect()
                connected = True
                if over.is_set():  # before there was a socket to shut down
                    raise TimeoutError
            reply = self._send_and_read(method, path, parts, max_bytes, upgrade)
            if over.is_set():  # an answer without a length ends where it was ended
                raise TimeoutError
            return reply
        except (OSError, http.client.HTTPException, ValueError) as error:
            self._connection.close()
            if over.is_set() or isinstance(error, TimeoutError):
                raise ExchangeError(f"no answer within {timeout_seconds:g} s", connected=connected, timed_out=True) from error
            raise ExchangeError(f"{type(error).__name__}: {error}"[:300], connected=connected) from error
        finally:
            clock.cancel()

    def upgrade(self, path: str, protocol: str, *, timeout_seconds: float) -> socket.socket:
        """The connection itself, which from here on speaks `protocol`; it is closed with this. Raises ExchangeError."""
        reply = self.exchange("POST", path, (), timeout_seconds=timeout_seconds, upgrade=protocol)
        if reply.status != http.client.SWITCHING_PROTOCOLS:
            raise ExchangeError(reply.problem)
        assert self._connection.sock is not None
        return self._connection.sock

    @property
    def local_host(self) -> str:
        """The address of this end, as the other may reach it."""
        assert self._connection.sock is not None
        return str(self._connection.sock.getsockname()[0])

    def close(self) -> None:
        self._connection.close()

    def _send_and_read(
        self, method: str, path: str, parts: Sequence[bytes | memoryview], max_bytes: int, upgrade: str | None
    ) -> Reply:
        self._connection.putrequest(method, self._prefix + path, skip_accept_encoding=True)
        if upgrade is not None:
            self._connection.putheader("Connection", "Upgrade")
            self._connection.putheader("Upgrade", upgrade)
        self._connection.putheader("Content-Length", str(sum(len(part) for part in parts)))
        if self._token is not None:
            self._connection.putheader("Authorization", f"Bearer {self._token}")
        self._connection.endheaders()
        for part in parts:
            self._connection.send(part)
        return _read(self._connection.getresponse(), max_bytes)


def _shut_down(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it is closed already
        connected.shutdown(socket.SHUT_RDWR)


def _read(response: http.client.HTTPResponse, max_bytes: int) -> Reply:
    body = response.read(max_bytes + 1)
    if len(body) > max_bytes:
        raise http.client.HTTPException(f"an answer of more than {max_bytes} bytes")
    if response.length:  # `read` with a limit gives what there is when the connection ends early
        raise http.client.IncompleteRead(body, response.length)
    return Reply(response.status, body)
