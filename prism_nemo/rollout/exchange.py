"""One HTTP request to a rollout server: with a limit on the time of the whole, and on the size of the answer."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

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
        return f"status {self.status}" + (f": {told:.300}" if isinstance(told, str) else "")


@dataclass(frozen=True)
class Address:
    """Of a server, and the token that it wants."""

    url: str
    token: str | None

    def get(self, path: str, *, timeout_seconds: float) -> Reply:
        return self._exchange("GET", path, (), timeout_seconds, _MAX_STATUS_BYTES)

    def post(
        self,
        path: str,
        parts: Sequence[bytes | memoryview],
        *,
        timeout_seconds: float,
        max_bytes: int = _MAX_STATUS_BYTES,
    ) -> Reply:
        """Sends the parts as one body. Raises ExchangeError."""
        return self._exchange("POST", path, parts, timeout_seconds, max_bytes)

    def _exchange(
        self, method: str, path: str, parts: Sequence[bytes | memoryview], timeout_seconds: float, max_bytes: int
    ) -> Reply:
        target = urlsplit(self.url)
        kind = http.client.HTTPSConnection if target.scheme == "https" else http.client.HTTPConnection
        connection = kind(target.hostname or "", target.port, timeout=timeout_seconds)
        over = threading.Event()

        def end() -> None:
            over.set()
            if connection.sock is not None:
                _shut_down(connection.sock)

        # A socket's own limit is for each read, and a server that sends a byte now and then would never reach it.
        clock = threading.Timer(timeout_seconds, end)
        clock.daemon = True
        clock.start()
        connected = False
        try:
            connection.connect()
            connected = True
            connection.putrequest(method, target.path.rstrip("/") + path, skip_accept_encoding=True)
            connection.putheader("Content-Length", str(sum(len(part) for part in parts)))
            if self.token is not None:
                connection.putheader("Authorization", f"Bearer {self.token}")
            connection.endheaders()
            for part in parts:
                connection.send(part)
            reply = _read(connection.getresponse(), max_bytes)
            if over.is_set():  # an answer without a length ends where it was ended
                raise TimeoutError
            return reply
        except TimeoutError as error:
            raise ExchangeError(f"no answer within {timeout_seconds:g} s", connected=connected, timed_out=True) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            if over.is_set():
                raise ExchangeError(f"no answer within {timeout_seconds:g} s", connected=connected, timed_out=True) from error
            raise ExchangeError(f"{type(error).__name__}: {error}"[:300], connected=connected) from error
        finally:
            clock.cancel()
            connection.close()


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
