"""A rollout server: one engine behind HTTP. It generates from the weights of one complete update, or not at all.

    GET  /v1/health           {"instance", "engine", "update_id", "version", "busy"}; no update_id where there are no weights
    POST /v1/generate         a request of `rollout/wire.py`; the rollouts
    POST /v1/weights          the connection becomes a channel (`rollout/channel.py`) of the frames of `rollout/weight_link.py`:
                              the first takes the weights away, and when the last has said that all is well, there are others

An answer other than 200 is {"what": …}: 400 for what is no request, 401 without the token, 409 for other weights than the server
has, 413 for too long a body, 422 where the engine refuses and would again, 424 where another server failed, 500 where it fails,
503 while it is busy.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import os
import re
import secrets
import select
import socket
import socketserver
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch

from prism_nemo.errors import ConfigError, PrismError
from prism_nemo.rollout.base import RolloutEngine
from prism_nemo.rollout.buckets import Assembly
from prism_nemo.rollout.channel import PROTOCOL, Channel, ChannelClosed, FrameTooLong
from prism_nemo.rollout.receiving import Inlet, UpdateAborted, WeightUpdate
from prism_nemo.rollout.turns import NobodyWaits, turns_of
from prism_nemo.rollout.weight_group import GroupError, backend_of, identity_of, libraries_of
from prism_nemo.rollout.weight_link import HEALTH, TOO_LONG, UNPROCESSABLE, WEIGHTS
from prism_nemo.rollout.wire import GenerateRequest, WireError, decode_request, encode_answer

GENERATE = "/v1/generate"
TOKEN_VARIABLE = "PRISM_NEMO_ROLLOUT_TOKEN"
_CPU = torch.device("cpu")
_IDLE_SECONDS = 120.0  # without a byte of a request
_DRAINED = 4  # times the longest body: of a longer one so much is read, so that the client hears why it is refused

_log = logging.getLogger(__name__)


def token_from_environment() -> str | None:
    """The secret that run and servers share; None where there is none. Raises ConfigError for what no header can carry."""
    token = os.environ.get(TOKEN_VARIABLE) or None
    if token is not None and not re.fullmatch(r"[\x21-\x7e]+", token):
        raise ConfigError(
            "the token of the rollout servers has spaces or characters beyond ASCII",
            where=f"environment variable {TOKEN_VARIABLE}",
            remedy="letters and digits, such as `openssl rand -hex 24` gives",
        )
    return token


class Refused(Exception):
    """An answer other than the one asked for."""

    def __init__(self, status: int, what: str) -> None:
        super().__init__(what)
        self.status = status


class _Gate:
    """Generations go through together, an update alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._generating = 0

    def enter(self, check: Callable[[], None]) -> None:
        """`check` raises where nothing may be generated now."""
        with self._changed:
            check()
            self._generating += 1

    def leave(self) -> None:
        with self._changed:
            self._generating -= 1
            self._changed.notify_all()

    def close(self, forbid: Callable[[], None], seconds: float) -> bool:
        """`forbid` lets nothing in any more; whether all have left in time."""
        with self._changed:
            forbid()
            return self._changed.wait_for(lambda: self._generating == 0, timeout=seconds)

    @property
    def busy(self) -> int:
        return self._generating


class EngineHost:
    """The engine and its weights, for any number of threads. The engine itself is called in threads of its own alone."""

    def __init__(self, engine: RolloutEngine, *, name: str, busy_seconds: float = 60.0, device: torch.device = _CPU) -> None:
        """`busy_seconds`: how long an update waits for what is being generated. `device`: that the engine computes on."""
        self.instance = secrets.token_hex(8)
        self._engine = engine
        self._name = name
        self._busy_seconds = busy_seconds
        self._executor = ThreadPoolExecutor(1, "engine")
        self._turns = turns_of(engine, self._executor)
        self._gate = _Gate()
        self._updating = threading.Lock()
        self._update: WeightUpdate | None = None  # that is under way
        self._inlet, self._assembly = Inlet(device), Assembly()
        self._weights: tuple[str, int] | None = None  # id and version of the update that the engine has; None: not a whole one

    def health(self) -> dict[str, Any]:
        update_id, version = self._weights or (None, None)
        return {
            "instance": self.instance,
            "engine": self._name,
            "update_id": update_id,
            "version": version,
            "busy": self._gate.busy,
        }

    def generate(self, request: GenerateRequest, wanted: Callable[[], bool]) -> bytes:
        """The answer. `wanted` tells whether the client still waits for it."""

        def check() -> None:
            if self._weights is None or self._weights[0] != request.update_id:
                raise Refused(HTTPStatus.CONFLICT, "the server does not have these weights (any more)")

        self._gate.enter(check)
        try:
            rollouts = self._turns.generate(request, wanted)
        except NobodyWaits as error:
            raise Refused(HTTPStatus.CONFLICT, "nobody waits for it") from error
        finally:
            self._gate.leave()
        return encode_answer(request, rollouts)

    def _begin(self, channel: Channel) -> WeightUpdate:
        header, _ = channel.receive()
        update_id, version = header.get("update_id"), header.get("version")
        if not isinstance(update_id, str) or type(version) is not int:
            raise WireError("not the begin of an update")
        with self._updating:
            if not self._gate.close(self._forget, self._busy_seconds):
                raise Refused(HTTPStatus.SERVICE_UNAVAILABLE, f"{self._gate.busy} requests are still being generated")
            self._abort()
            self._update = WeightUpdate(self._engine, self._executor, update_id, version, channel, self._assembly)
            return self._update

    def receive(self, channel: Channel, host: str) -> dict[str, Any]:
        """An update, all of it; `host` is the address of this end. Raises what `WeightUpdate.wait` does."""
        update = self._begin(channel)
        device = self._inlet.device
        channel.send(
            {
                "instance": self.instance,
                "device": identity_of(device),
                "backend": backend_of(device),
                "libraries": libraries_of(device),
            }
        )
        header, _ = channel.receive()
        with self._updating:
            if self._update is not update:
                raise Refused(HTTPStatus.CONFLICT, "another update was begun")
            update.start(partial(self._inlet.open, header, host))
        failed: BaseException | None = None
        try:
            update.wait()
        except BaseException as error:
            failed = error
        with self._updating:  # what follows is not of another update that begins now
            if self._update is not update:
                raise Refused(HTTPStatus.CONFLICT, "another update was begun")
            self._update = None
            if failed is not None:
                raise failed
            self._weights = (update.update_id, update.version)
        _log.info("weights of version %d", update.version)
        return {"version": update.version}

    def close(self, seconds: float) -> bool:
        """Takes no more requests, and ends the engine; False where it was generating still after so many seconds."""
        with self._updating:
            self._abort()
            if not self._gate.close(self._forget, seconds):
                return False
        self._executor.shutdown(wait=True)
        self._inlet.close()
        self._engine.close()
        return True

    def _forget(self) -> None:
        self._weights = None

    def _abort(self) -> None:
        update, self._update = self._update, None
        if update is not None:
            update.abort()


class RolloutServer(ThreadingHTTPServer):
    """Serves a host until `shutdown`. With a token, requests without it are refused; port 0 takes a free one."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, host: EngineHost, address: tuple[str, int], *, token: str | None, max_body_bytes: int) -> None:
        self.engine_host = host
        self.token = token
        self.max_body_bytes = max_body_bytes
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's asks the network for a name that nobody needs
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]

    def handle_error(self, request: Any, client_address: Any) -> None:
        _log.info("the connection to %s broke off", client_address[0], exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: RolloutServer
    protocol_version = "HTTP/1.1"
    timeout = _IDLE_SECONDS
    disable_nagle_algorithm = True  # or every answer behind the first waits for the client's acknowledgement, 40 ms

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        if self.path == WEIGHTS:
            self._receive_weights()
        else:
            self._answer(self._post)

    def _get(self) -> bytes:
        self._check_token()
        if self.path != HEALTH:
            raise Refused(HTTPStatus.NOT_FOUND, f"there is no {self.path[:60]}")
        return _json(self.server.engine_host.health())

    def _post(self) -> bytes:
        self._check_token()
        host, length = self.server.engine_host, self._length()
        if self.path != GENERATE:
            raise Refused(HTTPStatus.NOT_FOUND, f"there is no {self.path[:60]}")
        return host.generate(decode_request(self.rfile.read(length)), self._client_waits)

    def _receive_weights(self) -> None:
        """Answers that the connection is a channel from here on, and after its frames with one more that tells the outcome."""
        refused = self._outcome(self._upgrade)
        if refused is None or refused[0] != HTTPStatus.OK:
            self._tell(refused)
            return
        self.send_response(HTTPStatus.SWITCHING_PROTOCOLS)
        self.send_header("Connection", "Upgrade")
        self.send_header("Upgrade", PROTOCOL)
        self.end_headers()
        self.close_connection = True
        channel = Channel(self.connection, max_body_bytes=self.server.max_body_bytes)
        outcome = self._outcome(lambda: _json(self.server.engine_host.receive(channel, self.connection.getsockname()[0])))
        if outcome is not None:
            with contextlib.suppress(ChannelClosed):
                channel.send({"status": outcome[0], **json.loads(outcome[1])})
                channel.drain(_DRAINED * self.server.max_body_bytes)

    def _upgrade(self) -> bytes:
        self._check_token()
        self.rfile.read(self._length())
        if self.headers.get("Upgrade") != PROTOCOL:
            raise Refused(HTTPStatus.UPGRADE_REQUIRED, f"this is for connections that become {PROTOCOL}")
        return b""

    def _length(self) -> int:
        text = self.headers.get("Content-Length", "")
        if not text.isdecimal() or len(text) > 18:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "the request has no length")
        length, limit = int(text), self.server.max_body_bytes
        if length > limit:
            left = min(length, _DRAINED * limit)
            while left > 0 and (read := len(self.rfile.read(min(left, 1 << 20)))):
                left -= read
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body of {length} bytes; serve.max_request_mb allows {limit >> 20} MiB"
            )
        return length

    def _check_token(self) -> None:
        token = self.server.token
        if token is None:
            return
        given = self.headers.get("Authorization", "").encode("latin-1", "replace")
        if not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise Refused(HTTPStatus.UNAUTHORIZED, f"the token is missing or wrong ({TOKEN_VARIABLE})")

    def _client_waits(self) -> bool:
        """A client that has given up has closed its side, which reads as an end."""
        poll = select.poll()
        try:
            poll.register(self.connection, select.POLLIN)
            return not poll.poll(0) or self.connection.recv(1, socket.MSG_PEEK) != b""
        except (OSError, ValueError):  # ValueError: it is closed on this side
            return False

    def _answer(self, make: Callable[[], bytes]) -> None:
        self._tell(self._outcome(make))

    def _outcome(self, make: Callable[[], bytes]) -> tuple[int, bytes] | None:
        """Status and body; None where nobody is there any more to be told."""
        try:
            status, body = int(HTTPStatus.OK), make()
        except Refused as error:
            status, body = error.status, _json({"what": str(error)})
        except FrameTooLong as error:
            status, body = TOO_LONG, _json({"what": str(error)})
        except GroupError as error:
            status, body = int(HTTPStatus.FAILED_DEPENDENCY), _json({"what": str(error)})
        except WireError as error:
            status, body = int(HTTPStatus.BAD_REQUEST), _json({"what": str(error)})
        except PrismError as error:
            status, body = UNPROCESSABLE, _json({"what": error.what, "where": error.where, "remedy": error.remedy})
        except (ConnectionError, TimeoutError, ChannelClosed, UpdateAborted):
            return None
        except Exception as error:
            _log.exception("%s %s failed", self.command, self.path[:60])
            status, body = int(HTTPStatus.INTERNAL_SERVER_ERROR), _json({"what": f"{type(error).__name__}: {error}"[:1000]})
        if status != HTTPStatus.OK:
            _log.warning("%s %s: %d %s", self.command, self.path[:60], status, body.decode()[:300])
        return status, body

    def _tell(self, outcome: tuple[int, bytes] | None) -> None:
        if outcome is None:
            self.close_connection = True
            return
        status, body = outcome
        if status != HTTPStatus.OK:
            self.close_connection = True  # some of the body may not have been read
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are not listed; what goes wrong is logged where it does."""


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value).encode()
