"""The client of chat-completions endpoints, against real servers on this machine that behave, misbehave and hang."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import random
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from helpers.chat_server import KEY, VARIABLE, Answer, ChatServer, Seen, chat_server, completion, endpoint_config, until

from prism_nemo.config.endpoint import EndpointConfig, check_endpoint
from prism_nemo.endpoint.client import Endpoint
from prism_nemo.endpoint.errors import BudgetExhausted, EndpointError, RefusedRequest, Stopped
from prism_nemo.endpoint.pool import RequestPool
from prism_nemo.errors import ConfigError, PrismError


def message(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def echo(seen: Seen, number: int) -> Answer:
    return completion(f"echo {seen.body['messages'][-1]['content']}")


def endpoint_of(server: ChatServer, folder: Path, **settings: Any) -> Endpoint:
    return Endpoint(endpoint_config(server, **settings), folder, section="teacher")


def answered_by(tmp_path: Path, answers: list[Answer], **settings: Any) -> tuple[Any, list[Seen]]:
    """What one question gives on a server that answers so in turn, the last one for ever; an error is returned."""
    with chat_server(lambda seen, number: answers[min(number, len(answers)) - 1]) as server:
        try:
            return endpoint_of(server, tmp_path / "cache", **settings).ask(message("hello")), server.seen
        except PrismError as error:
            return error, server.seen


# What is sent and what comes back


def test_a_request_and_its_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, f" {KEY}\n")
    with chat_server(echo) as server:
        endpoint = endpoint_of(server, tmp_path, api_key_env=VARIABLE, extra_body={"top_p": 0.5}, temperature=0.25)
        reply = endpoint.ask(message("ä ☃"), seed=7)
    assert (reply.text, reply.finish_reason, reply.prompt_tokens, reply.completion_tokens) == ("echo ä ☃", "stop", 10, 5)
    (seen,) = server.seen
    assert seen.path == "/v1/chat/completions"
    assert seen.headers["Authorization"] == f"Bearer {KEY}"
    assert seen.body == {
        "model": "teacher",
        "messages": message("ä ☃"),
        "temperature": 0.25,
        "max_tokens": 8192,
        "seed": 7,
        "top_p": 0.5,
    }


def test_without_a_key_none_is_sent(tmp_path: Path) -> None:
    _, seen = answered_by(tmp_path, [completion("yes")])
    assert "Authorization" not in seen[0].headers


@pytest.mark.parametrize(
    ("content", "text"),
    [(None, ""), ("", ""), ([{"type": "text", "text": "a"}, {"type": "other"}, {"type": "text", "text": "b"}], "ab")],
)
def test_contents_that_are_not_plain_text(tmp_path: Path, content: Any, text: str) -> None:
    body = json.dumps({"choices": [{"message": {"content": content}, "finish_reason": None}]}).encode()
    reply, _ = answered_by(tmp_path, [Answer(body=body)])
    assert (reply.text, reply.finish_reason, reply.prompt_tokens) == (text, "", None)


# Trying again


def test_busy_and_failing_servers_are_asked_again(tmp_path: Path) -> None:
    answers = [Answer(status=429, headers={"Retry-After": "0"}), Answer(status=500), Answer(status=503), completion("at last")]
    reply, seen = answered_by(tmp_path, answers)
    assert reply.text == "at last" and len(seen) == 4
    assert len({json.dumps(request.body) for request in seen}) == 1


@pytest.mark.parametrize("as_date", [False, True])
def test_a_server_that_asks_for_patience_gets_it(tmp_path: Path, as_date: bool) -> None:
    """A date has whole seconds, so it may lie up to a second nearer than it was meant to."""
    times: list[float] = []

    def answer(seen: Seen, number: int) -> Answer:
        times.append(time.monotonic())
        later = format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)
        return Answer(status=429, headers={"Retry-After": later if as_date else "1"}) if number == 1 else completion("now")

    with chat_server(answer) as server:
        assert endpoint_of(server, tmp_path).ask(message("hello")).text == "now"
    assert times[1] - times[0] >= 0.95


@pytest.mark.parametrize("value", ["soon", "-5", "nan", "", "Thu, 99 Foo 2020", "1e400"])
def test_nonsense_in_retry_after_does_no_harm(tmp_path: Path, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prism_nemo.endpoint.client._LONGEST_RETRY_AFTER", 0.01)
    reply, _ = answered_by(tmp_path, [Answer(status=429, headers={"Retry-After": value}), completion("yes")])
    assert reply.text == "yes"


def half_a_body(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{"choices": [')


def half_a_chunk(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n50\r\n{"choices": [')


def nothing(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.shutdown(socket.SHUT_RDWR)


def no_http(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"\x1b[31m" + KEY.encode() + b"\x00" * 100 + b"\r\n\r\n")


@pytest.mark.parametrize("write", [half_a_body, half_a_chunk, nothing, no_http])
def test_broken_connections(tmp_path: Path, write: Callable[[BaseHTTPRequestHandler], None]) -> None:
    reply, seen = answered_by(tmp_path / "mended", [Answer(write=write), completion("whole")])
    assert reply.text == "whole" and len(seen) == 2
    error, seen = answered_by(tmp_path / "broken", [Answer(write=write)])
    assert type(error) is EndpointError and len(seen) == 4
    assert error.what.startswith("4 attempts failed") and error.what.isprintable()


@pytest.mark.parametrize(
    "body",
    [
        *(b"<html>busy</html>", b"", b"[]", b"null", b'"x"', b"{}", b"\xff\xfe", b"[" * 9999),
        *(b'{"choices": []}', b'{"choices": {"0": 1}}', b'{"choices": [7]}'),
        *(b'{"choices": [{"message": {"content": 5}}]}', b'{"choices": [{"message": "text"}]}'),
    ],
)
def test_answers_that_are_no_chat_completions(tmp_path: Path, body: bytes) -> None:
    reply, seen = answered_by(tmp_path / "mended", [Answer(body=body), completion("sense")])
    assert reply.text == "sense" and len(seen) == 2
    error, _ = answered_by(tmp_path / "broken", [Answer(body=body)], max_attempts=2)
    assert type(error) is EndpointError and "the answer is not" in error.what
    assert not list((tmp_path / "broken").rglob("*.json"))


def silence(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.recv(1)  # until the client goes away


def drip(handler: BaseHTTPRequestHandler) -> None:
    """Never silent for long, and never done."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        handler.wfile.write(b"X-Drop: 1\r\n" if handler.headers["Content-Length"] == "0" else b"X")
        time.sleep(0.05)


def drip_body(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.05)


@pytest.mark.parametrize("write", [silence, drip, drip_body])
def test_the_deadline_is_for_the_whole_answer(tmp_path: Path, write: Callable[[BaseHTTPRequestHandler], None]) -> None:
    error, seen = answered_by(tmp_path, [Answer(write=write)], timeout_seconds=1.0, max_attempts=2)
    assert type(error) is EndpointError and "no whole answer within 1 seconds" in error.what
    assert 1 <= len(seen) <= 2


def test_nobody_listens(tmp_path: Path) -> None:
    with chat_server(echo) as server:
        config = endpoint_config(server, max_attempts=2)
    with pytest.raises(EndpointError, match="2 attempts failed, the last one so: the connection failed: ConnectionRefusedError"):
        Endpoint(config, tmp_path, section="teacher").ask(message("hello"))


def test_whatever_a_server_does_in_between_every_answer_is_the_right_one(tmp_path: Path) -> None:
    """Two of three attempts fail, each in a way of its own, for many requests at a time."""
    generator = random.Random(0)
    tricks: list[Callable[[], Answer]] = [
        *(lambda write=write: Answer(write=write) for write in (half_a_body, half_a_chunk, nothing, no_http)),
        *(lambda status=status: Answer(status=status) for status in (408, 429, 500, 503, 529)),
        lambda: Answer(body=generator.randbytes(200)),
        lambda: Answer(body=b'{"error": {"message": "busy"}}'),
        lambda: Answer(status=429, headers={"Retry-After": "0.01"}),
    ]

    def answer(seen: Seen, number: int) -> Answer:
        return echo(seen, number) if generator.random() < 1 / 3 else generator.choice(tricks)()

    with chat_server(answer) as server, ThreadPoolExecutor(16) as threads:
        endpoint = endpoint_of(server, tmp_path, max_attempts=100, backoff_seconds=0.0, max_concurrency=16)
        texts = list(threads.map(lambda number: endpoint.ask(message(str(number))).text, range(150)))
        assert texts == [f"echo {number}" for number in range(150)]
        usage = endpoint.ledger.usage()
        assert usage.requests == len(server.seen) > 300 and usage.answers == 150
    again = endpoint_of(server, tmp_path, max_requests=0)
    assert [again.ask(message(str(number))).text for number in range(150)] == texts


# What is not tried again


@pytest.mark.parametrize(
    ("status", "kind", "remedy"),
    [
        (401, EndpointError, "teacher.api_key_env"),
        (403, EndpointError, "the key may not use"),
        (404, EndpointError, "teacher.base_url"),
        (405, EndpointError, "teacher.base_url"),
        (501, EndpointError, "teacher.base_url"),
        (202, EndpointError, "teacher.base_url"),
        (400, RefusedRequest, "teacher: model, max_tokens, extra_body"),
        (413, RefusedRequest, "teacher: model"),
        (422, RefusedRequest, "teacher: model"),
    ],
)
def test_mistakes_are_told_at_once(tmp_path: Path, status: int, kind: type[EndpointError], remedy: str) -> None:
    said = {"error": {"message": "no such\nmodel \x1b[31m" + "x" * 5000}}
    error, seen = answered_by(tmp_path, [Answer(status=status, body=json.dumps(said).encode())])
    assert type(error) is kind and len(seen) == 1
    assert f"status {status}: no such model" in error.what and len(error.what) < 400 and error.what.isprintable()
    assert error.where.endswith("/v1/chat/completions") and remedy in error.remedy


def test_redirects_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, KEY)
    with chat_server(echo) as other:
        target = f"{other.base_url}/chat/completions?token=secret"
        for status in (301, 302, 307, 308):
            error, seen = answered_by(tmp_path, [Answer(status=status, headers={"Location": target})], api_key_env=VARIABLE)
            assert type(error) is EndpointError and f"redirects (status {status}) to http://127.0.0.1" in error.what
            assert "secret" not in str(error) and len(seen) == 1
    assert other.seen == []


def test_an_answer_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    for number, headers in enumerate(({}, {"Content-Length": "999999999"})):
        answer = completion("x" * 100_000)
        answer.headers = headers
        error, seen = answered_by(tmp_path / str(number), [answer], max_response_bytes=50_000)
        assert type(error) is RefusedRequest and len(seen) == 1
        assert "more than 50000 bytes" in error.what and "teacher.max_tokens" in error.remedy


def test_when_everything_is_refused_it_is_not_the_requests(tmp_path: Path) -> None:
    with chat_server(lambda seen, number: Answer(status=400, body=b'{"error": "unknown field"}')) as server:
        endpoint = endpoint_of(server, tmp_path)
        for number in range(7):
            with pytest.raises(RefusedRequest):
                endpoint.ask(message(str(number)))
        with pytest.raises(
            EndpointError, match=r"the first 8 requests were all refused; the last one: .*unknown field"
        ) as caught:
            endpoint.ask(message("7"))
    assert type(caught.value) is EndpointError


# The cache


def test_nothing_is_asked_twice(tmp_path: Path) -> None:
    with chat_server(echo) as server:
        endpoint = endpoint_of(server, tmp_path)
        first = endpoint.ask(message("a"))
        assert endpoint.ask(message("a")) == first and endpoint.cache_hits == 1
        assert endpoint_of(server, tmp_path).ask(message("a")) == first
        assert len(server.seen) == 1
        endpoint.ask(message("a"), seed=1)
        endpoint.ask(message("b"))
        endpoint_of(server, tmp_path, temperature=0.5).ask(message("a"))
        endpoint_of(server, tmp_path, model="another").ask(message("a"))
        assert len(server.seen) == 5
    assert endpoint_of(server, tmp_path).ask(message("a")) == first, "the server is gone"


def test_a_model_that_moves_keeps_its_answers(tmp_path: Path) -> None:
    for _ in range(2):
        with chat_server(echo) as server:
            endpoint_of(server, tmp_path, cache_as="our teacher").ask(message("a"))
            requests = len(server.seen)
    assert requests == 0


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"reply": {}}', "half", "changed", "no json"])
def test_damaged_entries_are_asked_anew(tmp_path: Path, damage: str) -> None:
    with chat_server(echo) as server:
        reply = endpoint_of(server, tmp_path).ask(message("a"))
        (file,) = tmp_path.rglob("*.json")
        whole = file.read_text()
        if damage == "changed":
            assert "echo a" in whole
        text = {"half": whole[: len(whole) // 2], "changed": whole.replace("echo a", "echo b")}.get(damage, damage)
        file.write_text(text)
        assert endpoint_of(server, tmp_path).ask(message("a")) == reply
        assert len(server.seen) == 2 and file.read_text() == whole


def test_the_same_question_at_the_same_time_is_asked_once(tmp_path: Path) -> None:
    go = threading.Event()

    def answer(seen: Seen, number: int) -> Answer:
        assert go.wait(60)
        return completion("once")

    with chat_server(answer) as server, ThreadPoolExecutor(6) as threads:
        endpoint = endpoint_of(server, tmp_path)
        calls = [threads.submit(endpoint.ask, message("a")) for _ in range(6)]
        until(lambda: len(server.seen) == 1)
        go.set()
        assert {call.result().text for call in calls} == {"once"} and len(server.seen) == 1


def _ask_many(config: EndpointConfig, folder: Path, numbers: range) -> None:
    endpoint = Endpoint(config, folder, section="teacher")
    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(lambda number: endpoint.ask(message(str(number))).text == f"echo {number}", numbers))


def test_processes_share_a_cache_and_a_budget(tmp_path: Path) -> None:
    with chat_server(echo) as server:
        config = endpoint_config(server)
        context = multiprocessing.get_context("spawn")
        processes = [context.Process(target=_ask_many, args=(config, tmp_path, range(20 * n, 20 * n + 40))) for n in range(3)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(120)
        assert [process.exitcode for process in processes] == [0, 0, 0]
        asked = len(server.seen)
        usage = Endpoint(config, tmp_path, section="teacher").ledger.usage()
        assert 80 <= asked <= 120  # of two processes that ask the same at the same moment both are answered
        assert (usage.requests, usage.answers, usage.prompt_tokens, usage.completion_tokens) == (
            asked,
            asked,
            10 * asked,
            5 * asked,
        )
        _ask_many(endpoint_config(server, max_requests=0), tmp_path, range(80))
        assert len(server.seen) == asked
    assert not list(tmp_path.rglob("*.new"))


# Budgets


@pytest.mark.parametrize(
    ("limits", "asked"),
    [
        ({"max_requests": 3}, 3),
        ({"max_prompt_tokens": 25}, 3),
        ({"max_completion_tokens": 10}, 2),
        ({"max_cost": 4e-5, "prompt_price": 1.0, "completion_price": 2.0}, 2),
        ({"max_requests": 0}, 0),
    ],
)
def test_a_budget_ends_and_goes_on_when_it_is_raised(tmp_path: Path, limits: dict[str, float], asked: int) -> None:
    with chat_server(echo) as server:
        for session in range(2):  # a later process has not forgotten
            endpoint = endpoint_of(server, tmp_path, **limits)
            with pytest.raises(BudgetExhausted) as caught:
                for number in range(10):
                    endpoint.ask(message(str(number)))
            assert len(server.seen) == asked, session
        assert caught.value.where == f"teacher.{next(iter(limits))}"
        endpoint = endpoint_of(server, tmp_path)
        assert [endpoint.ask(message(str(number))).text for number in range(10)] == [f"echo {number}" for number in range(10)]
        assert len(server.seen) == 10


def test_attempts_that_fail_are_requests_too(tmp_path: Path) -> None:
    error, seen = answered_by(tmp_path, [Answer(status=500)], max_requests=3, max_attempts=10)
    assert isinstance(error, BudgetExhausted) and len(seen) == 3


def test_tokens_that_nobody_counts_cannot_be_limited(tmp_path: Path) -> None:
    body = json.dumps({"choices": [{"message": {"content": "yes"}}]}).encode()
    error, _ = answered_by(tmp_path, [Answer(body=body)], max_prompt_tokens=100)
    assert type(error) is EndpointError and "teacher.max_requests" in error.remedy
    reply, seen = answered_by(tmp_path, [Answer(body=body)])
    assert reply.text == "yes" and len(seen) == 1


def test_a_torn_line_in_the_ledger_costs_that_line_alone(tmp_path: Path) -> None:
    with chat_server(echo) as server:
        endpoint_of(server, tmp_path).ask(message("a"))
        with (tmp_path / "usage.jsonl").open("a") as file:
            file.write('{"requests": 1, "prom')
        endpoint = endpoint_of(server, tmp_path)
        endpoint.ask(message("b"))
    assert vars(endpoint_of(server, tmp_path).ledger.usage()) == {
        "requests": 2,
        "answers": 2,
        "prompt_tokens": 20,
        "completion_tokens": 10,
        "uncounted": 0,
    }
    assert endpoint.summary() == "2 requests, 2 answers, 20 prompt and 10 completion tokens"


def test_an_account_that_cannot_be_kept_and_one_that_was_removed(tmp_path: Path) -> None:
    with chat_server(echo) as server:
        endpoint = endpoint_of(server, tmp_path / "cache", max_requests=2)
        endpoint.ask(message("a"))
        (tmp_path / "cache" / "usage.jsonl").unlink()
        endpoint.ask(message("b"))
        assert endpoint.ledger.usage().requests == 1
        (tmp_path / "file").touch()
        with pytest.raises(PrismError, match="cannot be kept"):
            endpoint_of(server, tmp_path / "file").ask(message("c"))
        assert len(server.seen) == 2


# Many at a time, and being told to stop


def test_no_more_at_a_time_than_allowed(tmp_path: Path) -> None:
    gate = threading.Barrier(4)

    def answer(seen: Seen, number: int) -> Answer:
        gate.wait(60)  # four are there together
        return echo(seen, number)

    with chat_server(answer) as server, ThreadPoolExecutor(12) as threads:
        endpoint = endpoint_of(server, tmp_path, max_concurrency=4)
        texts = list(threads.map(lambda number: endpoint.ask(message(str(number))).text, range(24)))
    assert texts == [f"echo {number}" for number in range(24)]
    assert server.most_under_way == 4


def test_a_stopped_program_keeps_what_is_under_way_and_sends_no_more(tmp_path: Path) -> None:
    stop, go = threading.Event(), threading.Event()

    def answer(seen: Seen, number: int) -> Answer:
        assert go.wait(60)
        return echo(seen, number)

    with chat_server(answer) as server:
        endpoint = Endpoint(endpoint_config(server), tmp_path, section="teacher", stopped=stop.is_set)
        ended = []
        with RequestPool[int, Any](2) as pool:
            for number in range(4):
                pool.submit(number, lambda number=number: endpoint.ask(message(str(number))))
            assert pool.free == 0
            until(lambda: len(server.seen) == 2)
            stop.set()
            go.set()
            while pool.busy:
                ended += pool.wait(60)
        assert sorted(number for number, _ in ended) == [0, 1] and len(server.seen) == 2
        assert len(list(tmp_path.rglob("*.json"))) == 2


def test_stopping_ends_a_wait_for_the_next_attempt(tmp_path: Path) -> None:
    stop = threading.Event()
    with chat_server(lambda seen, number: Answer(status=429, headers={"Retry-After": "500"})) as server:
        endpoint = Endpoint(endpoint_config(server), tmp_path, section="teacher", stopped=stop.is_set)
        with ThreadPoolExecutor(1) as threads:
            call = threads.submit(endpoint.ask, message("a"))
            until(lambda: len(server.seen) == 1)
            stop.set()
            with pytest.raises(Stopped):
                call.result(60)


# The key


def test_the_key_is_nowhere_but_in_the_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A server that says it in every answer: in texts, in errors, instead of HTTP."""
    monkeypatch.setenv(VARIABLE, KEY)
    caplog.set_level(0)
    escaped = "".join(f"\\u{ord(character):04x}" for character in KEY).encode()
    told = [
        completion(f"your key is {KEY}"),
        *(
            Answer(status=status, body=json.dumps({"error": {"message": f"bad key {KEY}"}}).encode())
            for status in (400, 401, 500)
        ),
        Answer(status=401, body=f"<html>{KEY}".encode()),
        *(Answer(status=status, body=b'{"error": {"message": "' + escaped + b'"}}') for status in (400, 500)),
        Answer(body=completion("KEY").body.replace(b"KEY", escaped)),
        Answer(write=no_http),
        Answer(write=half_a_body),
    ]
    shown = []
    for number, answer in enumerate(told):
        result, seen = answered_by(tmp_path / str(number), [answer], api_key_env=VARIABLE, max_attempts=2)
        assert seen[0].headers["Authorization"].endswith(KEY)
        shown.append(repr(result) + str(result))
    assert "your key is ***" in shown[0] and "bad key ***" in shown[1]
    written = [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > len(told)
    output = capfd.readouterr()
    assert KEY not in "".join([*shown, *written, output.out, output.err, caplog.text])


@pytest.mark.parametrize("key", ["", "  ", "two words", "line\nbreak: x", "schlüssel", "tab\tbed"])
def test_a_key_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv(VARIABLE, key)
    config = EndpointConfig(base_url="http://localhost:1/v1", model="m", api_key_env=VARIABLE)
    with pytest.raises(ConfigError) as caught:
        Endpoint(config, tmp_path, section="teacher")
    assert VARIABLE in str(caught.value) and (not key.strip() or key not in str(caught.value))


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"base_url": None}, "teacher.base_url"),
        ({"model": ""}, "teacher.model"),
        ({"base_url": "ftp://secret.host/v1"}, "teacher.base_url"),
        ({"base_url": "secret.host/v1"}, "teacher.base_url"),
        ({"base_url": "https://"}, "teacher.base_url"),
        ({"base_url": "https://[secret"}, "teacher.base_url"),
        ({"base_url": "https://secret.host:99999/v1"}, "teacher.base_url"),
        ({"base_url": "https://me:secret@host/v1"}, "teacher.base_url"),
        ({"base_url": "https://host/v1?key=secret"}, "teacher.base_url"),
        ({"base_url": "https://host/v1#secret"}, "teacher.base_url"),
        ({"base_url": "https://host/secret\r\nHost: other"}, "teacher.base_url"),
        ({"base_url": "http://secret.host/v1"}, "teacher.base_url"),
        ({"base_url": "http://localhost.secret.host/v1"}, "teacher.base_url"),
        ({"api_key_env": "sk-secret"}, "teacher.api_key_env"),
        ({"max_cost": 5.0}, "teacher.max_cost"),
        ({"extra_body": {"stream": True}}, "teacher.extra_body"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, Any], where: str) -> None:
    config = EndpointConfig(**({"base_url": "https://host/v1", "model": "m"} | settings))
    with pytest.raises(ConfigError) as caught:
        check_endpoint(config, "teacher")
    assert caught.value.where == where and caught.value.remedy
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000/v1", "http://localhost/v1", "http://[::1]:80", "https://a.b/c/v1/"])
def test_addresses_that_can_be_used(url: str) -> None:
    check_endpoint(EndpointConfig(base_url=url, model="m"), "teacher")
    check_endpoint(EndpointConfig(base_url="http://node7:8000/v1", model="m", allow_http=True), "teacher")


# TLS and proxies


def tunnel(listener: socket.socket, told: list[bytes]) -> None:
    """A proxy: connects to this machine, whatever host it is told, and notes what that was."""

    def copy(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        head = b""
        while b"\r\n\r\n" not in head:
            head += client.recv(1)
        told.append(head)
        upstream = socket.create_connection(("127.0.0.1", int(head.split(b" ")[1].rpartition(b":")[2])))
        client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        for source, sink in ((client, upstream), (upstream, client)):
            threading.Thread(target=copy, args=(source, sink), daemon=True).start()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate of its own for `endpoint.test`, in one file."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=endpoint.test"]
    made += ["-addext", "subjectAltName=DNS:endpoint.test,DNS:localhost", "-keyout", "key.pem", "-out", "cert.pem"]
    subprocess.run(made, cwd=folder, check=True, capture_output=True)
    (folder / "both.pem").write_text((folder / "key.pem").read_text() + (folder / "cert.pem").read_text())
    return folder / "both.pem"


def test_https_directly_and_through_a_proxy(tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(VARIABLE, KEY)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    told: list[bytes] = []
    with chat_server(echo) as server, socket.create_server(("127.0.0.1", 0)) as listener:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=tunnel, args=(listener, told), daemon=True).start()

        def ask(host: str, text: str, **settings: Any) -> str:
            config = endpoint_config(server, api_key_env=VARIABLE, **settings)
            config.base_url = f"https://{host}:{server.server_port}/v1"
            check_endpoint(config, "teacher")
            return Endpoint(config, tmp_path, section="teacher").ask(message(text)).text

        with pytest.raises(EndpointError, match="the endpoint's certificate is not to be trusted"):
            ask("localhost", "a")
        assert server.seen == []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        monkeypatch.setenv("https_proxy", f"http://me:pass@127.0.0.1:{listener.getsockname()[1]}")
        assert ask("localhost", "b") == "echo b" and told == [], "this machine is reached directly"
        assert ask("endpoint.test", "c") == "echo c"
        assert told[0].startswith(b"CONNECT endpoint.test:") and b"Proxy-Authorization: Basic bWU6cGFzcw==" in told[0]
        assert KEY.encode() not in told[0] and server.seen[-1].headers["Authorization"] == f"Bearer {KEY}"
        server.answer = lambda seen, number: Answer(write=silence)
        with pytest.raises(EndpointError, match=r"no whole answer within 0\.5 seconds"):
            ask("localhost", "d", timeout_seconds=0.5, max_attempts=1)
        listener.shutdown(socket.SHUT_RDWR)
