"""Asks an OpenAI-compatible chat-completions endpoint: retried, within a budget, and nothing twice."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from prism_nemo.config.endpoint import EndpointConfig
from prism_nemo.endpoint.cache import Reply, ReplyCache
from prism_nemo.endpoint.errors import EndpointError, RefusedRequest, Stopped, TransientError
from prism_nemo.endpoint.ledger import Ledger
from prism_nemo.endpoint.transport import Transport
from prism_nemo.waiting import waiting

_LONGEST_BACKOFF = 60.0  # seconds
_LONGEST_RETRY_AFTER = 600.0  # seconds that a server may ask for
_MAX_REFUSED = 8  # requests, before any is answered, of which it is said that the settings are wrong and not they
_POLL = 0.1  # seconds between looks at whether to stop


class Endpoint:
    """Safe to be asked by many threads. `section` names the configuration's part in messages.

    stopped   asked before every attempt; once it says so, nothing more is sent, and what is under way is still received

    Raises ConfigError when the key's environment variable is not set.
    """

    def __init__(
        self, config: EndpointConfig, cache_dir: Path, *, section: str, stopped: Callable[[], bool] = lambda: False
    ) -> None:
        self.config = config
        self.section = section
        self.ledger = Ledger(cache_dir, config, section)
        self.cache_hits = 0
        self._transport = Transport(config, section)
        self._cache = ReplyCache(cache_dir)
        self._told_to_stop = stopped
        self._closed = threading.Event()
        self._slots = threading.BoundedSemaphore(config.max_concurrency)
        self._lock = threading.Lock()
        self._under_way: dict[str, Future[Reply]] = {}
        self._answered = self._refused = 0

    @waiting("an endpoint")
    def ask(self, messages: Sequence[Mapping[str, Any]], *, seed: int | None = None) -> Reply:
        """The answer to a conversation of OpenAI's form, from the cache where it has it. Blocks.

        The same messages with another `seed` are another request. Raises RefusedRequest, EndpointError, BudgetExhausted, and
        Stopped when the program was told to stop before there was an answer.
        """
        body = self._body(messages, seed)
        key = self._cache.key(self.config.cache_as or self._transport.where, body)
        with self._lock:
            other = self._under_way.get(key)
            mine: Future[Reply] = other or self._under_way.setdefault(key, Future())
        if other is not None:  # another thread is asking the very same
            reply = other.result()
            with self._lock:
                self.cache_hits += 1
            return reply
        try:
            reply = self._cached_or_asked(key, body)
        except BaseException as error:
            mine.set_exception(error)
            raise
        else:
            mine.set_result(reply)
            return reply
        finally:
            with self._lock:
                del self._under_way[key]

    def close(self) -> None:
        """Nothing more is sent from now on, by threads that wait for their next attempt either."""
        self._closed.set()

    def _stopped(self) -> bool:
        return self._closed.is_set() or self._told_to_stop()

    def summary(self) -> str:
        """What was used so far, by all processes and runs that share the cache, for people."""
        usage = self.ledger.usage()
        tokens = f"{usage.prompt_tokens} prompt and {usage.completion_tokens} completion tokens"
        uncounted = f" (and those of {usage.uncounted} answers that told none)" if usage.uncounted else ""
        priced = self.config.prompt_price or self.config.completion_price
        cost = f", cost {usage.cost(self.config):.4g}" if priced else ""
        return f"{usage.requests} requests, {usage.answers} answers, {tokens}{uncounted}{cost}"

    def _body(self, messages: Sequence[Mapping[str, Any]], seed: int | None) -> bytes:
        limit = {} if self.config.max_tokens is None else {"max_tokens": self.config.max_tokens}
        seeded = {} if seed is None else {"seed": seed}
        settings = {"model": self.config.model, "temperature": self.config.temperature, **limit, **seeded}
        return json.dumps({**settings, "messages": messages, **self.config.extra_body}, sort_keys=True).encode("ascii")

    def _cached_or_asked(self, key: str, body: bytes) -> Reply:
        reply = self._cache.get(key)
        if reply is not None:
            with self._lock:
                self.cache_hits += 1
            return reply
        with self._slots:
            try:
                reply = self._attempts(key, body)
            except RefusedRequest as error:
                self._note_refusal(error)
                raise
        with self._lock:
            self._answered += 1
        return reply

    def _attempts(self, key: str, body: bytes) -> Reply:
        for attempt in range(1, self.config.max_attempts + 1):
            if self._stopped():
                raise Stopped
            self.ledger.reserve()
            try:
                reply = _reply(self._transport.post(body))
            except TransientError as error:
                if attempt == self.config.max_attempts:
                    raise self._given_up(error) from error
                self._wait(attempt, error.retry_after)
            else:
                self._cache.put(key, reply)  # first of all: it was paid for
                self.ledger.settle(reply.prompt_tokens, reply.completion_tokens)
                return reply
        raise AssertionError("max_attempts is at least 1")

    def _wait(self, attempt: int, retry_after: float | None) -> None:
        """Before the next attempt: longer each time, never in step with others, and at least as long as the server asks."""
        seconds = min(self.config.backoff_seconds * 2 ** (attempt - 1), _LONGEST_BACKOFF) * random.uniform(0.5, 1.0)
        until = time.monotonic() + max(seconds, min(retry_after or 0.0, _LONGEST_RETRY_AFTER))
        while (left := until - time.monotonic()) > 0:
            if self._stopped():
                raise Stopped
            time.sleep(min(left, _POLL))

    def _given_up(self, error: TransientError) -> EndpointError:
        return EndpointError(
            f"{self.config.max_attempts} attempts failed, the last one so: {error.what}",
            where=self._transport.where,
            remedy=f"see whether the endpoint is up, lower {self.section}.max_concurrency, or raise {self.section}.max_attempts "
            f"or {self.section}.timeout_seconds; what is answered is not asked again",
        )

    def _note_refusal(self, error: RefusedRequest) -> None:
        """When nothing but refusals came, it is not the requests."""
        with self._lock:
            self._refused += 1
            hopeless = self._answered == 0 and self._refused >= _MAX_REFUSED
        if hopeless:
            raise EndpointError(
                f"the first {self._refused} requests were all refused; the last one: {error.what}",
                where=error.where,
                remedy=error.remedy,
            ) from error


def _reply(answer: Mapping[str, Any]) -> Reply:
    """Raises TransientError for what is not a chat completion: some proxies say that they are busy in such ways."""
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise TransientError("the answer is not a chat completion: it has no `choices` with a `message`")
    content = message.get("content")
    if isinstance(content, list):  # of parts
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(text for text in texts if isinstance(text, str))
    if content is not None and not isinstance(content, str):
        raise TransientError("the answer is not a chat completion: its `content` is not text")
    usage, reason = answer.get("usage"), choice.get("finish_reason")
    return Reply(
        text=content or "",  # null where a filter let nothing through
        finish_reason=reason if isinstance(reason, str) else "",
        prompt_tokens=_count(usage, "prompt_tokens"),
        completion_tokens=_count(usage, "completion_tokens"),
    )


def _count(usage: object, name: str) -> int | None:
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if type(value) is int and value >= 0 else None
