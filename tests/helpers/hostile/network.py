"""Answers of endpoints, requests to rollout servers, and what is opened to others."""

from __future__ import annotations

import json
import os
import pickle
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from helpers.chat_server import KEY, VARIABLE, Answer, Seen, chat_server, completion, endpoint_config
from helpers.hostile import Bomb, case, refusal, refused_command
from helpers.rollout_servers import Host, serving
from helpers.tiny import tiny_model

from prism_nemo.endpoint.client import Endpoint
from prism_nemo.rollout.base import SamplingParams
from prism_nemo.rollout.wire import pack

ENDPOINT, SERVER = "teacher or judge", "rollout server"
ESCAPES = "\x1b[2J\x1b]0;owned\x07\u202e\r\n"


def error(status: int, message: str) -> Answer:
    return Answer(status=status, body=json.dumps({"error": {"message": message}}).encode())


ANSWERS: dict[str, Callable[[Seen, int], Answer]] = {
    "an answer of 100 MB": lambda seen, number: completion("x" * (100 << 20)),
    "an answer nested 100,000 deep": lambda seen, number: Answer(body=b"[" * 100_000),
    "a redirect to another machine": lambda seen, number: Answer(status=307, headers={"Location": "https://evil.invalid/v1"}),
    "an error message with escapes and line breaks": lambda seen, number: error(404, f"no{ESCAPES}such model"),
    "an error message that repeats the key": lambda seen, number: error(401, f"wrong key {KEY}"),
    "an error message of 1 MB": lambda seen, number: error(404, "x" * (1 << 20)),
}


def of_answer(answer: Callable[[Seen, int], Answer]) -> Callable[[Path], str]:
    def attempt(folder: Path) -> str:
        os.environ[VARIABLE] = KEY
        try:
            with chat_server(answer) as server:
                config = endpoint_config(server, api_key_env=VARIABLE, max_attempts=2)
                endpoint = Endpoint(config, folder / "cache", section="teacher")
                shown = refusal(lambda: endpoint.ask([{"role": "user", "content": "What?"}]))
        finally:
            del os.environ[VARIABLE]
        assert KEY not in shown
        return shown

    return attempt


for _given, _answer in ANSWERS.items():
    case(ENDPOINT, _given)(of_answer(_answer))


def asked(url: str, body: bytes, **headers: str) -> str:
    """Status and message of a refusal."""
    request = urllib.request.Request(f"{url}/v1/generate", data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60):
            raise AssertionError("it was answered")
    except urllib.error.HTTPError as refused:
        return f"{refused.code}: {json.loads(refused.read())['what']}"


def frame(header: bytes) -> bytes:
    return len(header).to_bytes(4, "little") + header


@case(SERVER, "`serve.host=0.0.0.0` without a token")
def _(folder: Path) -> str:
    return refused_command("serve", f"model.path={tiny_model().directory}", "serve.host=0.0.0.0", "runtime.device=cpu")


@case(SERVER, "a request without the token, or with another")
def _(folder: Path) -> str:
    with serving(Host(tiny_model()), token="right") as url:
        answers = {asked(url, b"{}"), asked(url, b"{}", Authorization="Bearer wrong"), asked(url, b"{}", Authorization="right")}
    (answer,) = answers
    return answer


SAMPLED = asdict(SamplingParams(1.0, 1.0, 0, 8, 1, ()))
REQUEST = {"request_id": "1", "update_id": "1", "seeds": [], "num_rollouts_per_prompt": 1, "sampling": SAMPLED}
BODIES: dict[str, Callable[[Path], bytes]] = {
    # Of one length, whatever the folder's.
    "a pickle that runs something": lambda folder: pickle.dumps(Bomb(folder)).ljust(1000, b"."),
    "a header nested 100,000 deep": lambda folder: frame(b'{"a":' * 100_000),
    "a header that is longer than the body": lambda folder: (2**32 - 1).to_bytes(4, "little") + b"{}",
    "a request for a billion prompts": lambda folder: pack({**REQUEST, "num_prompts": 10**9}, {}),
}


def of_body(make: Callable[[Path], bytes]) -> Callable[[Path], str]:
    def attempt(folder: Path) -> str:
        with serving(Host(tiny_model())) as url:
            return asked(url, make(folder))

    return attempt


for _given, _body in BODIES.items():
    case(SERVER, _given)(of_body(_body))


@case(SERVER, "a body above `serve.max_request_mb`")
def _(folder: Path) -> str:
    with serving(Host(tiny_model()), max_body_bytes=1 << 20) as url:
        return asked(url, bytes(2 << 20))
