"""Requests of many threads over one engine: each gets its own answer or its own error, whatever becomes of the others."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from prism_nemo.config.enums import RolloutEngineKind
from prism_nemo.config.rollout import RolloutConfig, RolloutServersConfig
from prism_nemo.rollout.base import ContinuousEngine, Rollout, RolloutError, SamplingParams
from prism_nemo.rollout.megatron import MegatronEngine
from prism_nemo.rollout.remote import requests_per_replica
from prism_nemo.rollout.turns import EngineFailure, NobodyWaits, OneByOne, Together, turns_of
from prism_nemo.rollout.wire import GenerateRequest

SAMPLING = SamplingParams(1.0, 1.0, 0, 50, 1, ())
REFUSED, BROKEN, FATAL = 1, 2, 3  # what a seed modulo 16 makes of a request: refused as it comes, wrong in the end, all fail


@dataclass(eq=False)
class Counting:
    seed: int
    left: int
    limit: float | None

    @property
    def done(self) -> bool:
        return self.left == 0

    def rollouts(self) -> list[Rollout]:
        if self.seed % 16 == BROKEN:
            raise RolloutError(f"broken {self.seed}")
        return [Rollout(0, torch.tensor([self.seed]), torch.zeros(1), "stop", 0)]


@dataclass
class Counter:
    """Needs as many steps for a request as its seed says; only ever in one thread, and in one call at a time."""

    fails: bool = False
    under_way: list[Counting] = field(default_factory=list)
    most: int = 0
    steps: int = 0
    failures: int = 0
    thread: int | None = None
    busy: threading.Lock = field(default_factory=threading.Lock)

    def alone(self) -> threading.Lock:
        assert self.thread in (None, threading.get_ident())
        self.thread = threading.get_ident()
        assert self.busy.acquire(blocking=False)
        self.busy.release()
        return self.busy

    def add(self, prompts: Any, sampling: SamplingParams, *, num_rollouts_per_prompt: int, seeds: Sequence[int]) -> Counting:
        with self.alone():
            if seeds[0] % 16 == REFUSED:
                raise RolloutError(f"refused {seeds[0]}")
            self.under_way.append(Counting(seeds[0], seeds[0] % 7, sampling.time_limit_seconds))
            self.most = max(self.most, len(self.under_way))
            return self.under_way[-1]

    def step(self) -> None:
        with self.alone():
            time.sleep(0.0005)
            self.steps += 1
            if self.fails and any(one.seed % 16 == FATAL and one.left == 1 for one in self.under_way):
                self.under_way.clear()
                self.failures += 1
                raise MemoryError("no room")
            for one in list(self.under_way):
                one.left = max(0, one.left - 1)
                if not one.left:
                    self.under_way.remove(one)

    def drop(self, generation: Counting) -> None:
        with self.alone():
            if generation in self.under_way:
                self.under_way.remove(generation)


def request(seed: int, sampling: SamplingParams = SAMPLING) -> GenerateRequest:
    return GenerateRequest(str(seed), "weights", (), sampling, 1, [seed])


def outcome(make: Callable[[], list[Rollout]]) -> str:
    try:
        return f"token {int(make()[0].tokens[0])}"
    except RolloutError as error:
        return error.what
    except (NobodyWaits, EngineFailure) as error:
        return type(error).__name__


@pytest.mark.parametrize("fails", [False, True])
def test_every_request_gets_its_own_answer_or_error(fails: bool) -> None:
    """600 of 12 threads, some given up before or while they are generated; again and again the engine has nothing to do."""
    engine: Any = Counter(fails)
    allowed: dict[int, set[str]] = {}
    found: dict[int, str] = {}
    with ThreadPoolExecutor(1) as executor:
        turns = Together(engine, executor)

        def client(first: int) -> None:
            draw = random.Random(first)
            for seed in range(first, 600, 12):
                looks = draw.choice([0, 1, 2, 10**9, 10**9, 10**9])  # as often it still waits
                given_up = looks < 10**9

                def wanted(left: list[int] = [looks]) -> bool:  # noqa: B006  (one for each request)
                    left[0] -= 1
                    return left[0] >= 0

                kind = {REFUSED: f"refused {seed}", BROKEN: f"broken {seed}"}.get(seed % 16, f"token {seed}")
                allowed[seed] = {kind, *(["NobodyWaits"] if given_up else []), *(["EngineFailure"] if fails else [])}
                found[seed] = outcome(lambda seed=seed, wanted=wanted: turns.generate(request(seed), wanted))
                time.sleep(draw.choice([0, 0, 0.002]))

        threads = [threading.Thread(target=client, args=(first,)) for first in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert executor.submit(lambda: 7).result(60) == 7  # the engine's thread is free for an update
    assert len(found) == 600
    assert all(found[seed] in allowed[seed] for seed in found)
    assert set(found.values()) >= {"NobodyWaits", *(["EngineFailure"] if fails else [])}
    assert sum(told.startswith("token") for told in found.values()) > 200
    assert not engine.under_way and not turns._under_way and not turns._running
    assert engine.most > 2
    assert (engine.failures > 0) == fails


def test_a_clients_time_runs_from_its_arrival() -> None:
    """While others' prompts are added, and where it has to wait for them."""

    class Slow(Counter):
        def add(self, *given: Any, **named: Any) -> Counting:
            time.sleep(0.05)
            return super().add(*given, **named)

    engine: Any = Slow()
    limits: list[float | None] = []
    with ThreadPoolExecutor(1) as executor:
        turns = Together(engine, executor)
        limited = replace(SAMPLING, time_limit_seconds=1000.0)
        added = engine.add
        engine.add = lambda prompts, sampling, **named: (
            limits.append(sampling.time_limit_seconds) or added(prompts, sampling, **named)
        )
        threads = [
            threading.Thread(target=lambda seed=seed: turns.generate(request(seed, limited), lambda: True))
            for seed in (20, 21, 22, 23)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(limits) == 4
    assert 0 < min(limit or 0.0 for limit in limits) < 1000.0 - 0.04  # one has waited for another at least


def test_which_engines_take_requests_together() -> None:
    executor = ThreadPoolExecutor(1)
    assert isinstance(Counter(), ContinuousEngine)
    assert isinstance(turns_of(Counter(), executor), Together)  # type: ignore[arg-type]
    megatron = MegatronEngine.__new__(MegatronEngine)
    assert isinstance(turns_of(megatron, executor), OneByOne)
    executor.shutdown()


@pytest.mark.parametrize(
    ("settings", "leaders", "num_rollouts", "expected"),
    [
        ({}, 1, 16, 2),
        ({}, 8, 1, 2),
        ({"engine": RolloutEngineKind.vllm}, 1, 16, 17),
        ({"engine": RolloutEngineKind.vllm}, 8, 16, 3),
        ({"engine": RolloutEngineKind.vllm}, 100, 16, 2),
        ({"engine": RolloutEngineKind.vllm, "max_batch_size": 8}, 1, 3, 4),
        ({"engine": RolloutEngineKind.vllm}, 1, 1, 64),
        ({"engine": RolloutEngineKind.vllm, "servers": RolloutServersConfig(requests_per_replica=200)}, 1, 1, 200),
        ({"servers": RolloutServersConfig(requests_per_replica=1)}, 1, 1, 1),
    ],
)
def test_how_many_requests_are_under_way(settings: dict[str, Any], leaders: int, num_rollouts: int, expected: int) -> None:
    assert requests_per_replica(RolloutConfig(**settings), leaders, num_rollouts) == expected
