"""vLLM in rollout servers: requests decoded together, and servers that are killed, frozen, failing, or asked by who goes away."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rollout_servers import in_process, remote_config, serving, until
from helpers.rows import CPU, one_rank
from helpers.served import MAX_LENGTH, served

from prism_nemo.config.enums import Draws, Precision, RolloutEngineKind
from prism_nemo.config.rollout import RolloutConfig, VLLMConfig
from prism_nemo.config.schema import DataConfig, ModelConfig, ParallelConfig
from prism_nemo.models.policy import PolicyModel
from prism_nemo.rollout.base import Rollout, RolloutError, SamplingParams, WeightsLostError
from prism_nemo.rollout.channel import PROTOCOL, Channel
from prism_nemo.rollout.exchange import Address, Connection, ExchangeError
from prism_nemo.rollout.fleet import LocalMember
from prism_nemo.rollout.remote import RemoteEngine
from prism_nemo.rollout.server import GENERATE, TOKEN_VARIABLE, EngineHost
from prism_nemo.rollout.weight_link import HEALTH, WEIGHTS
from prism_nemo.rollout.wire import GenerateRequest, encode_request

pytestmark = pytest.mark.vllm
PROMPTS = tuple(served().prompt([(4, 6)] if index % 2 else [], seed=index) for index in range(12))
LONG = SamplingParams(1.0, 1.0, 0, 150, served().special[0], served().special)  # no response ends before
COUNT = 2
SEEDS = range(COUNT * len(PROMPTS))
VLLM = VLLMConfig(kv_cache_gb=0.1, draws=Draws.shared)
DATA = DataConfig(max_prompt_length=MAX_LENGTH - 150, max_response_length=150)


@cache
def policy() -> PolicyModel:
    return PolicyModel(ModelConfig(path=str(served().directory), precision=Precision.fp32), ParallelConfig(), one_rank())


@cache
def expected() -> list[Rollout]:
    """Of the Megatron engine, undisturbed; draws are shared."""
    return in_process(policy(), PROMPTS, LONG, COUNT)


@cache
def own_engine() -> Any:
    """In this process, for servers in this process."""
    from prism_nemo.rollout.vllm import ServedModel, VLLMEngine

    place = served()
    config = RolloutConfig(engine=RolloutEngineKind.vllm, vllm=VLLM)
    return VLLMEngine(config, ServedModel(place.directory, place.config, torch.float32, CPU, MAX_LENGTH))


@contextmanager
def run_over(urls: Sequence[str] = (), directory: Path | None = None, **servers: Any) -> Iterator[RemoteEngine]:
    config = replace(remote_config(urls, **servers), engine=RolloutEngineKind.vllm, vllm=VLLM, max_batch_size=8)
    engine = RemoteEngine(config, policy(), DATA, directory)
    try:
        yield engine
    finally:
        engine.close()


def same(found: Sequence[Rollout], version: int) -> None:
    """Every rollout is there once, and is what it would have been."""
    assert len(found) == len(expected())
    for one, other in zip(found, expected(), strict=True):
        assert one.prompt_index == other.prompt_index
        assert one.tokens.tolist() == other.tokens.tolist()
        assert one.finish_reason == other.finish_reason
        assert one.weights_version == version
        torch.testing.assert_close(one.log_probs, other.log_probs, atol=2e-5, rtol=0)


def generate(engine: Any) -> list[Rollout]:
    return list(engine.generate(PROMPTS, LONG, num_rollouts_per_prompt=COUNT, seeds=SEEDS))


def start(engine: Any) -> Any:
    return engine.start(PROMPTS, LONG, num_rollouts_per_prompt=COUNT, seeds=SEEDS)


@pytest.fixture(autouse=True)
def events(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.INFO, logger="prism_nemo.rollout"):
        yield caplog


# One server, in this process


@pytest.fixture
def host() -> EngineHost:
    return EngineHost(own_engine(), name="vllm", busy_seconds=1.0)


def test_requests_that_are_under_way_are_decoded_together(host: EngineHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many at a time as fill the engine, and one more; every rollout is what it is alone."""
    engine, together = own_engine(), list[int]()

    def step(engine_step: Callable[[], None] = engine.step) -> None:
        if not together:
            until(lambda: host.health()["busy"] == 8 // COUNT + 1)
        together.append(len(engine._decoder._generations))
        engine_step()

    monkeypatch.setattr(engine, "step", step)
    with serving(host) as url, run_over([url]) as run:
        run.update_weights(policy().hf_tensors(), 3)
        same(generate(run), 3)
    assert max(together) >= 8 // COUNT
    assert len(together) < len(PROMPTS) * LONG.max_new_tokens / 2  # a step each, one after the other, would be twice as many


def test_what_nobody_waits_for_is_not_generated(host: EngineHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine makes no headway until the client has gone; then others have it to themselves, and weights can be taken."""
    engine, release = own_engine(), threading.Event()
    engine_step = engine.step
    monkeypatch.setattr(engine, "step", lambda: engine_step() if release.is_set() else time.sleep(0.01))
    with serving(host) as url, run_over([url]) as run:
        run.update_weights(policy().hf_tensors(), 3)
        assert host._weights is not None
        request = GenerateRequest("1.1.1", host._weights[0], PROMPTS, LONG, COUNT, SEEDS)
        body = encode_request(request)
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))) as client:
            client.sendall(f"POST {GENERATE} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: host.health()["busy"] == 1)
            told = begin_an_update(url)
            assert told["status"] == 503 and "1 requests are still being generated" in told["what"]
        until(lambda: host.health()["busy"] == 0)
        until(lambda: engine._decoder.idle)
        release.set()
        run.update_weights(policy().hf_tensors(), 4)
        same(generate(run), 4)


def begin_an_update(url: str) -> dict[str, Any]:
    """What the server says to that."""
    with closing(Connection(Address(url, None))) as connection:
        channel = Channel(connection.upgrade(WEIGHTS, PROTOCOL, timeout_seconds=60))
        channel.send({"update_id": "1", "version": 1})
        return channel.receive(seconds=60)[0]


def test_a_request_that_cannot_be_is_refused_alone(host: EngineHost) -> None:
    with serving(host) as url, run_over([url]) as run:
        run.update_weights(policy().hf_tensors(), 3)
        call = start(run)
        too_long = run.start(PROMPTS[:1], replace(LONG, max_new_tokens=5000), num_rollouts_per_prompt=1, seeds=[0])
        with pytest.raises(RolloutError, match="do not fit into"):
            too_long.collect()
        same(call.collect(), 3)


def test_time_limits_are_each_requests_own(host: EngineHost) -> None:
    with serving(host) as url, run_over([url]) as run:
        run.update_weights(policy().hf_tensors(), 3)
        call = start(run)
        limited = run.start(PROMPTS, replace(LONG, time_limit_seconds=1e-3), num_rollouts_per_prompt=COUNT, seeds=SEEDS)
        for part, rollout in zip(limited.collect(), expected(), strict=True):
            assert part.finish_reason == "timeout" and len(part.tokens) >= 1
            assert rollout.tokens[: len(part.tokens)].tolist() == part.tokens.tolist()
        same(call.collect(), 3)


def test_when_the_engine_fails_its_requests_are_done_again(
    host: EngineHost, monkeypatch: pytest.MonkeyPatch, events: pytest.LogCaptureFixture
) -> None:
    engine, left = own_engine(), [40]
    executor = engine._llm.llm_engine.engine_core.engine_core.model_executor

    def execute(*given: Any, execute_model: Callable[..., Any] = executor.execute_model, **named: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise MemoryError("no room for 7 GiB")
        return execute_model(*given, **named)

    monkeypatch.setattr(executor, "execute_model", execute)
    with serving(host) as url, run_over([url]) as run:
        run.update_weights(policy().hf_tensors(), 3)
        call = start(run)
        with pytest.raises(WeightsLostError):
            call.collect()
        run.restore_weights(3)
        same(call.collect(), 3)
    assert re.search(r"500: EngineFailure: the engine failed while it generated \d requests: MemoryError: no room", events.text)


# Two servers, in processes of their own


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteEngine]:
    """A run that has started two servers, whose token others know."""
    directory = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TOKEN_VARIABLE, "secret")
        with run_over(directory=directory, num_replicas=2) as engine:
            engine.update_weights(policy().hf_tensors(), 3)
            yield engine


def members(engine: RemoteEngine) -> list[LocalMember]:
    assert engine._fleet is not None
    return [member for member in engine._fleet._members.values() if isinstance(member, LocalMember)]


def pid_of(member: LocalMember) -> int:
    return member._process.process.pid


def health(member: LocalMember) -> dict[str, Any]:
    assert member.receiver is not None
    return member.receiver.address.get(HEALTH, timeout_seconds=60).json()


def all_up(engine: RemoteEngine) -> bool:
    return engine._fleet is not None and len(engine._fleet.up()) == 2


def test_a_server_that_is_killed_is_replaced(started: RemoteEngine, events: pytest.LogCaptureFixture) -> None:
    """While it generates: the other generates what is missing. The one that takes its place has the next weights."""
    first, _ = members(started)
    killed = pid_of(first)
    call = start(started)
    until(lambda: health(first)["busy"] > 0)
    os.kill(killed, signal.SIGKILL)
    same(call.collect(), 3)
    assert re.search(r"replica 0: .*; prompt \d+ of call \d+ will be sent again", events.text)
    assert re.search(r"replica 0 .*: it is started again", events.text)
    counts = started.metrics()
    assert counts["resent_requests"][0] >= 1 and counts["servers_left_out"] == (1.0, 1.0)
    assert counts["lost_answers"] == (1.0, 1.0)
    until(lambda: all_up(started))
    assert pid_of(first) != killed
    started.update_weights(policy().hf_tensors(), 4)
    call = start(started)
    until(lambda: all(health(member)["busy"] > 0 for member in members(started)))
    same(call.collect(), 4)
    assert not any(count for name, (count, _) in started.metrics().items() if name != "restarts")


def test_a_server_that_is_frozen_comes_back(
    started: RemoteEngine, events: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Past the limit of its requests: the other generates what is missing, and what it says later reaches nobody.

    It generates no further what nobody waits for, and takes the next weights. (The run here is named the servers: one that has
    started them would have started it again.)
    """
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    frozen, sound = members(started)
    urls = [member.receiver.address.url for member in (frozen, sound) if member.receiver is not None]
    with run_over(urls, request_timeout_seconds=15.0) as run:
        run.update_weights(policy().hf_tensors(), 5)
        call = start(run)
        until(lambda: health(frozen)["busy"] > 0)
        os.kill(pid_of(frozen), signal.SIGSTOP)
        try:
            same(call.collect(), 5)
            assert re.search(rf"{urls[0]}: no answer within 15 s; prompt \d+ of call 1 will be sent again", events.text)
            counts = run.metrics()
            assert counts["late_answers"] == (1.0, 1.0) and counts["resent_requests"][0] >= 1
            with pytest.raises(ExchangeError):
                Address(urls[0], "secret").get(HEALTH, timeout_seconds=0.2)
        finally:
            os.kill(pid_of(frozen), signal.SIGCONT)
        until(lambda: health(frozen)["busy"] == 0)
        until(lambda: all_up(run))
        run.update_weights(policy().hf_tensors(), 6)
        call = start(run)
        until(lambda: all(health(member)["busy"] > 0 for member in (frozen, sound)))
        same(call.collect(), 6)
        assert not any(count for count, _ in run.metrics().values())
        assert [health(member)["version"] for member in (frozen, sound)] == [6, 6]
