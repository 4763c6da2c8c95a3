"""One HTTP POST to a chat-completions endpoint: a deadline for all of it, a limit of size, no redirects.

A connection lasts for one request, which against the seconds of an answer costs little. `HTTPS_PROXY` and `NO_PROXY` are
respected for https; http, and this machine itself, are reached directly.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import threading
import urllib.request
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Any
from urllib.parse import unquote, urlsplit

from prism_nemo.config.endpoint import LOOPBACK, EndpointConfig
from prism_nemo.endpoint.errors import EndpointError, RefusedRequest, TransientError
from prism_nemo.errors import ConfigError

_CHUNK = 1 << 16
_SHOWN = 300  # characters of a server's own message
_REFUSED = (400, 409, 413, 415, 422)  # of this request's content
_TRANSIENT = (408, 425, 429)  # and all that begin with 5, but for
_PERMANENT = (501, 505)
_REMEDIES = {
    401: "check the key in the environment variable that {section}.api_key_env names",
    403: "the key may not use this model or address",
    404: "check {section}.base_url (without /chat/completions) and {section}.model",
    405: "check {section}.base_url, it is not that of an OpenAI-compatible server",
}


class Transport:
    """Posts request bodies to `base_url`/chat/completions. `section` names the configuration's part in messages.

    Raises ConfigError when the environment variable of the key is not set or holds what cannot be a key.
    """

    def __init__(self, config: EndpointConfig, section: str) -> None:
        assert config.base_url is not None
        address = urlsplit(config.base_url)
        assert address.hostname is not None
        self.config = config
        self.section = section
        self.secure = address.scheme == "https"
        self.host, self.port = address.hostname, address.port or (443 if self.secure else 80)
        self.path = f"{address.path.rstrip('/')}/chat/completions"
        self.where = f"{config.base_url.rstrip('/')}/chat/completions"
        self._key = _read_key(config, section)

    def post(self, body: bytes) -> dict[str, Any]:
        """The JSON object of a successful answer, with the key blotted out wherever it should stand in it.

        Raises TransientError for what another attempt may mend, RefusedRequest and EndpointError for what it cannot.
        """
        try:
            with self._before_deadline() as (connection, expired):
                headers = {"Content-Type": "application/json", "Accept": "application/json", "Connection": "close"}
                if self._key is not None:
                    headers["Authorization"] = f"Bearer {self._key}"
                connection.connect()
                if expired():  # several addresses, each with a timeout of its own
                    raise TimeoutError
                connection.request("POST", self.path, body=body, headers=headers)
                response = connection.getresponse()
                self._refuse_redirect(response)
                text = self._read(response)
        except ssl.SSLCertVerificationError as error:
            raise EndpointError(
                f"the endpoint's certificate is not to be trusted: {error.verify_message}",
                where=self.where,
                remedy="check the address; SSL_CERT_FILE names a file with certificates of your own to trust",
            ) from error
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a read from a socket that was shut
            raise TransientError(f"the connection failed: {type(error).__name__} {_shown(self._blot(str(error)))}") from error
        if response.status != 200:
            raise self._status_error(response, text)
        try:
            answer = self._blot(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise TransientError(self._too_late if expired() else "the answer is not JSON") from error
        if not isinstance(answer, dict):
            raise TransientError("the answer is not a JSON object")
        return answer

    @contextmanager
    def _before_deadline(self) -> Iterator[tuple[http.client.HTTPConnection, Callable[[], bool]]]:
        """A connection that is shut when the deadline passes, wherever it then is, and whether that has happened."""
        connection = self._connection()
        expired = threading.Event()

        def expire() -> None:
            expired.set()
            if connection.sock is not None:
                with suppress(OSError):  # the plain socket's shutdown leaves the TLS object alone, which another thread is using
                    socket.socket.shutdown(connection.sock, socket.SHUT_RDWR)

        timer = threading.Timer(self.config.timeout_seconds, expire)
        timer.daemon = True
        timer.start()
        try:
            yield connection, expired.is_set
        except (OSError, http.client.HTTPException, ValueError, TransientError) as error:
            if expired.is_set() or isinstance(error, TimeoutError):
                raise TransientError(self._too_late) from error
            raise
        finally:
            timer.cancel()
            connection.close()

    @property
    def _too_late(self) -> str:
        return f"no whole answer within {self.config.timeout_seconds:g} seconds"

    def _connection(self) -> http.client.HTTPConnection:
        timeout = self.config.timeout_seconds
        if not self.secure:
            return http.client.HTTPConnection(self.host, self.port, timeout=timeout)
        proxy = (
            None if self.host in LOOPBACK or urllib.request.proxy_bypass(self.host) else urllib.request.getproxies().get("https")
        )
        if proxy is None:
            return http.client.HTTPSConnection(self.host, self.port, timeout=timeout, context=self._tls)
        address = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        if address.scheme != "http" or not address.hostname:
            raise ConfigError("the proxy's address cannot be used", where="HTTPS_PROXY", remedy="http://host:port")
        connection = http.client.HTTPSConnection(address.hostname, address.port or 80, timeout=timeout, context=self._tls)
        headers = {}
        if address.username is not None:
            user = f"{unquote(address.username)}:{unquote(address.password or '')}"
            headers["Proxy-Authorization"] = f"Basic {b64encode(user.encode()).decode()}"
        connection.set_tunnel(self.host, self.port, headers)
        return connection

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        limit = self.config.max_response_bytes
        chunks, size = [], 0
        while chunk := response.read1(_CHUNK):
            size += len(chunk)
            if size > limit:
                raise RefusedRequest(
                    f"the answer has more than {limit} bytes",
                    where=self.where,
                    remedy=f"lower {self.section}.max_tokens, or raise {self.section}.max_response_bytes",
                )
            chunks.append(chunk)
        if response.length:  # of the announced length, what never came
            raise TransientError(f"the connection broke {response.length} bytes before the end of the answer")
        return b"".join(chunks)

    # What went wrong

    def _refuse_redirect(self, response: http.client.HTTPResponse) -> None:
        if 300 <= response.status < 400:
            target = urlsplit(response.headers.get("Location", ""))
            raise EndpointError(
                f"the endpoint redirects (status {response.status}) to {target.scheme or 'this host'}://{target.hostname or ''}, "
                "which is not followed: the key would go there",
                where=self.where,
                remedy=f"check {self.section}.base_url",
            )

    def _status_error(self, response: http.client.HTTPResponse, text: bytes) -> Exception:
        status, said = response.status, _shown(self._blot(_message(text)))
        what = f"the endpoint answered with status {status}" + (f": {said}" if said else "")
        if status in _TRANSIENT or (status >= 500 and status not in _PERMANENT):
            return TransientError(what, retry_after=_retry_after(response.headers.get("Retry-After")))
        if status in _REFUSED:
            return RefusedRequest(
                what, where=self.where, remedy=f"check the settings of {self.section}: model, max_tokens, extra_body"
            )
        remedy = _REMEDIES.get(status, "check {section}.base_url and {section}.model").format(section=self.section)
        return EndpointError(what, where=self.where, remedy=remedy)

    def _blot(self, value: Any) -> Any:
        """A JSON value without the key, which may have been escaped on the way."""
        if self._key is None:
            return value
        if isinstance(value, str):
            return value.replace(self._key, "***")
        if isinstance(value, list):
            return [self._blot(part) for part in value]
        if isinstance(value, dict):
            return {self._blot(name): self._blot(part) for name, part in value.items()}
        return value


def _read_key(config: EndpointConfig, section: str) -> str | None:
    """The key; no message shows it."""
    if config.api_key_env is None:
        return None
    key = os.environ.get(config.api_key_env, "").strip()
    if not key:
        raise ConfigError(
            "the key's environment variable is not set",
            where=f"{section}.api_key_env: {config.api_key_env}",
            remedy=f"export {config.api_key_env}, or set {section}.api_key_env=null for an endpoint without a key",
        )
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(
            "the environment variable holds white space or characters that no key has",
            where=f"{section}.api_key_env: {config.api_key_env}",
            remedy="export the key alone",
        )
    return key


def _message(text: bytes) -> str:
    """What a server said about an error."""
    try:
        answer = json.loads(text)
        error = answer.get("error", answer.get("message", "")) if isinstance(answer, dict) else ""
        said = str(error.get("message", "")) if isinstance(error, dict) else str(error)
    except (ValueError, RecursionError):
        said = text.decode("utf-8", "replace")
    return said


def _shown(text: str) -> str:
    """On one line, of printable characters, and short."""
    line = " ".join("".join(character if character.isprintable() else " " for character in text[: 4 * _SHOWN]).split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}…"


def _retry_after(value: str | None) -> float | None:
    """Seconds from now, of a header that holds seconds or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value)) if float(value) == float(value) else None
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(value)
    except (ValueError, OverflowError):
        return None
    date = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
    return max(0.0, (date - datetime.now(UTC)).total_seconds())
