"""Rollouts on servers: what a run does when weights are lost, and when its own machine has too little of something."""

from __future__ import annotations

import threading
import time
from concurrent.futures import wait
from types import SimpleNamespace
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
)
from helpers.rows import one_rank
from helpers.tiny import tiny_model

from prism_nemo.data.records import Record
from prism_nemo.models.policy import PolicyModel
from prism_nemo.rollout.base import RolloutError, WeightsLostError
from prism_nemo.rollout.exchange import Address
from prism_nemo.rollout.fleet import Fleet
from prism_nemo.rollout.sampler import PendingRollouts, Sampler
from prism_nemo.rollout.weight_link import Receiver
from prism_nemo.rollout.wire import GenerateRequest

pytestmark = pytest.mark.usefixtures("events")


@pytest.fixture(scope="module")
def dense() -> PolicyModel:
    return policy_of(tiny_model())


def test_a_request_that_gets_no_thread_is_an_error(dense: PolicyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever thread it is that would have sent it."""
    started, start = [], threading.Thread.start

    def short(thread: threading.Thread) -> None:
        if thread.name.startswith("rollout "):
            started.append(thread)
            if len(started) == 4:
                raise RuntimeError("can't start new thread")
        start(thread)

    with engine_over(dense, [Host(tiny_model())], requests_per_replica=1) as engine:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", short)
            with pytest.raises(RolloutError, match="no thread for a request: can't start new thread"):
                generate(engine)
        assert_bit_equal(generate(engine), in_process(dense, PROMPTS, SAMPLING, COUNT))


# Servers that are looked after


class Troubled:
    """A member that cannot be looked after at first."""

    name, problem, hopeless = "replica 0", "", False
    receiver: Receiver | None = None
    looked = 0

    def watch(self) -> bool:
        self.looked += 1
        if self.looked < 4:
            raise OSError(12, "Cannot allocate memory")
        self.receiver, self.problem = Receiver(self.name, "a", Address("http://127.0.0.1:9", None)), ""
        return True

    def broken(self, what: str) -> None:
        raise OSError(12, "Cannot allocate memory")

    def answered(self) -> None: ...

    def close(self) -> None: ...


def test_a_server_that_cannot_be_started_now_is_tried_again() -> None:
    member = Troubled()
    fleet = Fleet([member], startup_timeout_seconds=60.0)
    assert fleet.wait(60.0, for_all=True, since=time.monotonic())
    assert member.looked == 4
    fleet.report("replica 0", "a", "it froze")
    assert "Cannot allocate memory" in fleet.describe()
    fleet.close()


# Weights that are lost


def test_lost_weights_are_restored(dense: PolicyModel, caplog: pytest.LogCaptureFixture) -> None:
    def forget(answer: bytes, request: GenerateRequest, number: int) -> bytes:
        if number == 3:
            host._weights = None
        return answer

    host = Host(tiny_model(), forget)
    with engine_over(dense, [host]) as engine:
        seeds = range(COUNT * len(PROMPTS))
        call = engine.start(PROMPTS, SAMPLING, num_rollouts_per_prompt=COUNT, seeds=seeds)
        with pytest.raises(WeightsLostError, match="no rollout server has the weights any more"):
            call.collect()
        with pytest.raises(WeightsLostError):
            call.collect()
        engine.restore_weights(3)
        assert_bit_equal(call.collect(), in_process(dense, PROMPTS, SAMPLING, COUNT))
        host.asked = 0
        assert_bit_equal(generate(engine), in_process(dense, PROMPTS, SAMPLING, COUNT))
    assert "the server does not have these weights" in caplog.text


def test_weights_that_are_lost_after_a_step_come_back_by_their_own_version(dense: PolicyModel) -> None:
    """Rollouts begun by version 3; the server loses it while the policy becomes version 4: what is missing is of that."""

    def forget(answer: bytes, request: GenerateRequest, number: int) -> bytes:
        if number == 3:
            host._weights = None
        return answer

    host = Host(tiny_model(), forget)
    (parameter,) = (value for name, value in dense.chunks[0].named_parameters() if name.endswith("final_layernorm.weight"))
    before = parameter.detach().clone()
    old = in_process(dense, PROMPTS, SAMPLING, COUNT, version=3)
    with engine_over(dense, [host], requests_per_replica=1) as engine:
        encoder: Any = SimpleNamespace(decode=lambda tokens: "")
        sampler = Sampler(engine, encoder, None, one_rank(), 0, weights_version=3, policy_version=lambda: 4)
        seeds = range(COUNT * len(PROMPTS))
        generation = engine.start(PROMPTS, SAMPLING, num_rollouts_per_prompt=COUNT, seeds=seeds)
        records = [Record(str(number), "") for number in range(len(PROMPTS))]
        pending = PendingRollouts(sampler, records, PROMPTS, generation, 3)
        assert pending._graded is not None
        wait([pending._graded])
        try:
            with torch.no_grad():
                parameter.mul_(torch.linspace(0.2, 3.0, len(before)))  # a step of training
            new = in_process(dense, PROMPTS, SAMPLING, COUNT, version=4)
            found = pending.result().rollouts
        finally:
            with torch.no_grad():
                parameter.copy_(before)
    answered = 3 * COUNT
    assert_bit_equal(found[:answered], old[:answered])
    assert_bit_equal(found[answered:], new[answered:])
    assert sampler.weights_version == 4


def test_another_runs_weights_are_not_taken_for_ours(dense: PolicyModel) -> None:
    """Even where the two versions have the same number."""
    host = Host(tiny_model())
    with serving(host) as url, remote_engine(dense, [url]) as one, remote_engine(dense, [url]) as other:
        one.update_weights(dense.hf_tensors(), 3)
        other.update_weights([(name, tensor * 1.5) for name, tensor in dense.hf_tensors()], 3)
        call = one.start(PROMPTS, SAMPLING, num_rollouts_per_prompt=COUNT, seeds=range(COUNT * len(PROMPTS)))
        with pytest.raises(WeightsLostError):
            call.collect()
        one.restore_weights(3)
        assert_bit_equal(call.collect(), in_process(dense, PROMPTS, SAMPLING, COUNT))
