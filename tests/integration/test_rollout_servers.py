"""Rollouts on servers: the same bits as in process, and every failure that a server can have."""

from __future__ import annotations

import json
import logging
import re
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rollout_servers import (
    COUNT,
    PROMPTS,
    SAMPLING,
    Host,
    assert_bit_equal,
    engine_over,
    generate,
    in_process,
    policy_of,
    remote_engine,
    serving,
    until,
)
from helpers.tiny import IMAGE_TOKEN, tiny_model

from prism_nemo.models.policy import PolicyModel
from prism_nemo.rollout.base import RolloutError, SamplingParams
from prism_nemo.rollout.exchange import Address, ExchangeError
from prism_nemo.rollout.wire import GenerateRequest, pack, unpack

pytestmark = pytest.mark.usefixtures("events")


@pytest.fixture(scope="module")
def dense() -> PolicyModel:
    return policy_of(tiny_model())


def nothing_happened(engine: Any) -> bool:
    return not any(count for count, _ in engine.metrics().values())


@pytest.mark.parametrize("experts", [False, True], ids=["dense", "moe"])
@pytest.mark.parametrize("servers", [1, 2])
def test_rollouts_equal_those_of_an_engine_in_this_process(experts: bool, servers: int) -> None:
    tiny = tiny_model(experts=experts)
    policy = policy_of(tiny)
    hosts = [Host(tiny) for _ in range(servers)]
    with engine_over(policy, hosts, prompts_per_request=1) as engine:
        assert_bit_equal(generate(engine), in_process(policy, PROMPTS, SAMPLING, COUNT))
        greedy = SamplingParams(0.0, 1.0, 0, 9, -1, ())
        assert_bit_equal(generate(engine, greedy), in_process(policy, PROMPTS, greedy, COUNT))
        assert nothing_happened(engine)
    assert sum(host.asked for host in hosts) == 2 * len(PROMPTS)
    assert all(host.asked for host in hosts)


def test_prompts_that_travel_together_are_decoded_together(dense: PolicyModel) -> None:
    with engine_over(dense, [Host(tiny_model())], prompts_per_request=4) as engine:
        assert_bit_equal(generate(engine), in_process(dense, PROMPTS, SAMPLING, COUNT, at_once=4))


def test_start_returns_at_once_and_calls_may_overlap(dense: PolicyModel) -> None:
    gate = threading.Event()

    def wait(answer: bytes, request: GenerateRequest, number: int) -> bytes:
        assert gate.wait(60)
        return answer

    seeds = range(COUNT * len(PROMPTS))
    with engine_over(dense, [Host(tiny_model(), wait)]) as engine:
        calls = [engine.start(PROMPTS, SAMPLING, num_rollouts_per_prompt=COUNT, seeds=seeds) for _ in range(2)]
        gate.set()
        expected = in_process(dense, PROMPTS, SAMPLING, COUNT)
        for call in calls[::-1]:
            assert_bit_equal(call.collect(), expected)
            assert_bit_equal(call.collect(), expected)


# Failures: one server is sound, the other does something wrong once. Everything is there, once, and equal.


def change_header(**changes: Any) -> Callable[[bytes, GenerateRequest, int], bytes]:
    def change(answer: bytes, request: GenerateRequest, number: int) -> bytes:
        header, tensors = unpack(answer)
        for name, value in changes.items():
            header[name] = value(header[name]) if callable(value) else value
        return pack(header, tensors)

    return change


def change_tensors(
    change: Callable[[dict[str, torch.Tensor]], None],
) -> Callable[[bytes, GenerateRequest, int], bytes]:
    def changed(answer: bytes, request: GenerateRequest, number: int) -> bytes:
        header, tensors = unpack(answer)
        change(tensors)
        return pack(header, tensors)

    return changed


def fail(*_: Any) -> bytes:
    raise RuntimeError("the engine broke")


def put(name: str, value: float) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][1] = value

    return change


SPOILT: dict[str, tuple[Callable[..., bytes], str]] = {
    "nonsense": (lambda *_: b"<html>502 Bad Gateway</html>", "cut short|JSON"),
    "nothing": (lambda *_: b"", "cut short"),
    "half": (lambda answer, *_: answer[: len(answer) // 2], "cannot be read|cut short"),
    "huge": (lambda *_: bytes(10 << 20), "more than"),
    "lengths": (change_tensors(put("lengths", 10**9)), "not rollouts"),
    "negative": (change_tensors(put("lengths", -3)), "not rollouts"),
    "status 500": (fail, "500: RuntimeError: the engine broke"),
    "old version": (change_header(weights_version=lambda found: [2] * len(found)), "version 2 .*, the server was given 3"),
    "other request": (change_header(request_id="1.1.77"), "to request '1.1.77'"),
    "other weights": (change_header(update_id="0"), "other weights"),
    "other prompts": (change_header(prompts_digest="0"), "other prompts"),
    "other order": (change_header(prompt_index=lambda found: [1, *found[1:]]), "of prompt 1"),
    "no number": (change_header(prompt_index=lambda found: [True, *found[1:]]), "not rollouts"),
    "fewer": (change_header(finish_reason=lambda found: found[1:]), "not rollouts"),
    "unknown end": (change_header(finish_reason=lambda found: ["abort", *found[1:]]), "'abort'"),
    "wrong end": (change_header(finish_reason=lambda found: ["timeout", *found[1:]]), "timeout|ran out"),
    "token 128": (change_tensors(put("tokens", 128)), "vocabulary has 128"),
    "token -1": (change_tensors(put("tokens", -1)), "vocabulary has 128"),
    "image token": (change_tensors(put("tokens", IMAGE_TOKEN)), "may not be sampled"),
    "nan": (change_tensors(put("log_probs", float("nan"))), "log-probabilities"),
    "infinite": (change_tensors(put("log_probs", float("-inf"))), "log-probabilities"),
    "above 1": (change_tensors(put("log_probs", 1e-3)), "log-probabilities"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_wrong_answer_is_not_taken(kind: str, dense: PolicyModel, caplog: pytest.LogCaptureFixture) -> None:
    spoil, message = SPOILT[kind]
    bad = Host(tiny_model(), spoil)
    with engine_over(dense, [bad, Host(tiny_model())]) as engine:
        assert_bit_equal(generate(engine), in_process(dense, PROMPTS, SAMPLING, COUNT))
        counts = engine.metrics()
    assert 1 <= bad.asked <= 2  # both that it had at the time; nothing after
    assert counts["resent_requests"] == (bad.asked, 1.0)
    assert counts["servers_left_out"] == (1.0, 1.0)
    told = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert any(re.search(message, line) and "will be sent again" in line for line in told), told


def test_a_server_that_is_sound_again_takes_part_after_the_next_update(dense: PolicyModel) -> None:
    def first_only(answer: bytes, request: GenerateRequest, number: int) -> bytes:
        return b"" if number == 1 else answer

    bad, good = Host(tiny_model(), first_only), Host(tiny_model())
    with engine_over(dense, [bad, good], requests_per_replica=1) as engine:
        generate(engine)
        asked = bad.asked
        generate(engine)
        assert bad.asked == asked
        until(lambda: len(engine._fleet.up()) == 2)
        engine.update_weights(dense.hf_tensors(), 4)
        assert_bit_equal(generate(engine), in_process(dense, PROMPTS, SAMPLING, COUNT, version=4))
        assert bad.asked > asked


def test_an_answer_that_comes_too_late_is_dropped(dense: PolicyModel) -> None:
    release = threading.Event()

    def delay(answer: bytes, request: GenerateRequest, number: int) -> bytes:
        release.wait(60)
        return answer

    late = Host(tiny_model(), delay)
    with engine_over(dense, [late, Host(tiny_model())], request_timeout_seconds=3.0) as engine:
        found = generate(engine)
        release.set()
        time.sleep(0.2)  # the late answers find nobody
        assert_bit_equal(found, in_process(dense, PROMPTS, SAMPLING, COUNT))
        assert engine.metrics()["late_answers"] == (1.0, 1.0)


def test_a_server_that_sends_a_byte_now_and_then_is_late_too(dense: PolicyModel) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def drip() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
            while not ended.wait(0.05):
                try:
                    connection.sendall(b"x")
                except OSError:
                    return

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    try:
        with pytest.raises(ExchangeError, match="no answer within 1 s") as raised:
            Address(f"http://127.0.0.1:{listener.getsockname()[1]}", None).get("/", timeout_seconds=1.0)
        assert raised.value.timed_out
    finally:
        ended.set()
        listener.close()
        thread.join()


def test_a_slow_server_gets_fewer_prompts(dense: PolicyModel) -> None:
    quick = Host(tiny_model())

    def last(answer: bytes, request: GenerateRequest, number: int) -> bytes:
        until(lambda: quick.asked == len(PROMPTS) - 1)
        return answer

    slow = Host(tiny_model(), last)
    with engine_over(dense, [slow, quick], requests_per_replica=1) as engine:
        assert_bit_equal(generate(engine), in_process(dense, PROMPTS, SAMPLING, COUNT))
    assert (slow.asked, quick.asked) == (1, len(PROMPTS) - 1)


def test_a_prompt_that_no_server_survives_ends_the_run(dense: PolicyModel) -> None:
    hosts = [Host(tiny_model(), lambda *_: b"") for _ in range(6)]
    with engine_over(dense, hosts, requests_per_replica=1) as engine:
        call = engine.start(PROMPTS[:1], SAMPLING, num_rollouts_per_prompt=COUNT, seeds=range(COUNT))
        with pytest.raises(RolloutError, match="prompt 0 of a call failed 5 times"):
            call.collect()


def test_what_the_engine_refuses_is_an_error_at_once(dense: PolicyModel) -> None:
    """Another engine with the same weights would refuse as well."""
    host = Host(tiny_model())
    with engine_over(dense, [host]) as engine:
        with torch.no_grad():
            host.served._model.language_model.decoder.final_layernorm.weight[3] = float("nan")
        with pytest.raises(RolloutError, match="logits are not finite") as raised:
            generate(engine)
        assert "http://127.0.0.1" in str(raised.value.where)


def test_when_nothing_comes_back_it_says_why(dense: PolicyModel) -> None:
    host = Host(tiny_model())
    with serving(host) as url:
        pass  # it is gone
    with remote_engine(dense, [url], startup_timeout_seconds=1.0) as engine, pytest.raises(RolloutError) as raised:
        engine.update_weights(dense.hf_tensors(), 0)
    assert f"{url}: ConnectionRefusedError" in raised.value.what
    assert raised.value.remedy


def test_a_wrong_token_is_told(dense: PolicyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Host(tiny_model()), token="right") as url:
        monkeypatch.setenv("PRISM_NEMO_ROLLOUT_TOKEN", "wrong")
        refused = pytest.raises(RolloutError, match="status 401: the token is missing or wrong")
        with remote_engine(dense, [url], startup_timeout_seconds=1.0) as engine, refused:
            engine.update_weights(dense.hf_tensors(), 0)
        monkeypatch.setenv("PRISM_NEMO_ROLLOUT_TOKEN", "right")
        with remote_engine(dense, [url]) as engine:
            engine.update_weights(dense.hf_tensors(), 3)
            assert_bit_equal(generate(engine), in_process(dense, PROMPTS, SAMPLING, COUNT))


def test_what_is_longer_than_a_server_takes_is_told(dense: PolicyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prism_nemo.rollout.buckets.SHARED_MEMORY", Path("/nowhere"))
    with serving(Host(tiny_model()), max_body_bytes=1 << 17) as url, remote_engine(dense, [url]) as engine:
        with pytest.raises(RolloutError, match=r"serve\.max_request_mb") as raised:
            engine.update_weights(dense.hf_tensors(), 0)
        assert "weight_bucket_mb" in str(raised.value.remedy)


def test_time_limits_travel(dense: PolicyModel) -> None:
    """With no time at all every response has one token; with much, nothing changes."""
    with engine_over(dense, [Host(tiny_model())]) as engine:
        for limit, reasons in ((1e-6, {"timeout"}), (1000.0, {"stop", "length"})):
            free = SamplingParams(0.9, 0.97, 90, 24, 5, SAMPLING.banned_token_ids, time_limit_seconds=limit)
            found = generate(engine, free)
            ended = [rollout for rollout in found if rollout.tokens.numel() == 1 and rollout.finish_reason == "stop"]
            assert {rollout.finish_reason for rollout in found if rollout not in ended} <= reasons
            if limit < 1:
                assert all(rollout.tokens.numel() == 1 for rollout in found)
            else:
                assert_bit_equal(found, in_process(dense, PROMPTS, SAMPLING, COUNT))


def test_closing_ends_who_waits(dense: PolicyModel) -> None:
    release = threading.Event()

    def wait(answer: bytes, request: GenerateRequest, number: int) -> bytes:
        release.wait(60)
        return answer

    host = Host(tiny_model(), wait)
    with engine_over(dense, [host]) as engine:
        call = engine.start(PROMPTS, SAMPLING, num_rollouts_per_prompt=COUNT, seeds=range(COUNT * len(PROMPTS)))
        threading.Timer(0.2, engine.close).start()
        with pytest.raises(RolloutError, match="closed"):
            call.collect()
        release.set()
        engine.close()


def test_health_tells_what_the_server_has(dense: PolicyModel) -> None:
    host = Host(tiny_model())
    with serving(host) as url, remote_engine(dense, [url]) as engine:
        before = Address(url, None).get("/v1/health", timeout_seconds=30).json()
        engine.update_weights(dense.hf_tensors(), 3)
        after = Address(url, None).get("/v1/health", timeout_seconds=30).json()
        assert (before["version"], after["version"], after["engine"]) == (None, 3, "megatron")
        assert before["instance"] == after["instance"] == host.instance
        assert Address(url, None).get("/v1/nothing", timeout_seconds=30).status == 404
        for body in (b"", b"\xff\xff\xff\xff", struct.pack("<I", 2) + b"[]", struct.pack("<I", 2) + b"{}"):
            for path, status in (("generate", 400), ("weights", 426)):
                reply = Address(url, None).post(f"/v1/{path}", [body], timeout_seconds=30)
                assert reply.status == status, (path, body, reply)
                assert json.loads(reply.body)["what"]
        assert_bit_equal(generate(engine), in_process(dense, PROMPTS, SAMPLING, COUNT))  # none of that did harm
