"""A chat-completions server on this machine, whose answers a test writes: real HTTP, in threads of this process."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prism_nemo.config.endpoint import EndpointConfig

KEY = "sk-local-4711-do-not-tell"
VARIABLE = "PRISM_NEMO_TEST_KEY"


@dataclass
class Answer:
    """What the server does with a request. `write` takes the place of everything else: it gets the handler."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    write: Callable[[BaseHTTPRequestHandler], None] | None = None


def completion(text: str | None, *, prompt_tokens: int = 10, completion_tokens: int = 5, finish_reason: str = "stop") -> Answer:
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return Answer(body=json.dumps({"object": "chat.completion", "choices": [choice], "usage": usage}).encode())


@dataclass
class Seen:
    path: str
    headers: dict[str, str]
    body: dict[str, Any]


class ChatServer(ThreadingHTTPServer):
    """`answer(request, number)` is called in the thread of each connection; number counts requests from 1."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, answer: Callable[[Seen, int], Answer]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer = answer
        self.seen: list[Seen] = []
        self.lock = threading.Lock()
        self.under_way = self.most_under_way = 0
        self.base_url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.seen.append(Seen(self.path, dict(self.headers), body))
            number, seen = len(server.seen), server.seen[-1]
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            answer = server.answer(seen, number)
        finally:
            with server.lock:
                server.under_way -= 1
        if answer.write is not None:
            answer.write(self)
            return
        self.send_response(answer.status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(answer.body))}.items():
            if name not in answer.headers:
                self.send_header(name, value)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def chat_server(answer: Callable[[Seen, int], Answer]) -> Iterator[ChatServer]:
    server = ChatServer(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def endpoint_config(server: ChatServer, **settings: Any) -> EndpointConfig:
    """Quick to try again, and in no hurry to give up."""
    given = {"model": "teacher", "backoff_seconds": 0.01, "timeout_seconds": 30.0, "max_attempts": 4}
    return EndpointConfig(base_url=server.base_url, **(given | settings))


def until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    """Waits for something that comes soon; the limit is only so that a mistake ends."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)
