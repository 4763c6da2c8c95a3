"""How the requests that reach a server share its engine: one after the other, or decoded together where the engine can.

The engine is called in one thread alone, which is the executor's; every request waits in a thread of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from typing import Protocol

from prism_nemo.rollout.base import ContinuousEngine, OngoingGeneration, Rollout, RolloutEngine, SamplingParams
from prism_nemo.rollout.wire import GenerateRequest

_LEAST_LIMIT_SECONDS = 1e-3
_LOOK_SECONDS = 0.25  # between looks whether clients still wait
_log = logging.getLogger(__name__)


class NobodyWaits(Exception):
    """The client has gone away."""


class EngineFailure(Exception):
    """The engine as a whole failed, with all that it was generating."""


@dataclass(eq=False)
class _Request:
    """What a client asks for. `wanted` tells whether it still waits."""

    request: GenerateRequest
    wanted: Callable[[], bool]
    arrived: float = field(default_factory=time.monotonic)
    answer: Future[list[Rollout]] = field(default_factory=Future)

    @property
    def sampling(self) -> SamplingParams:
        """With the time that is left of the request's."""
        sampling, limit = self.request.sampling, self.request.sampling.time_limit_seconds
        if limit is None:
            return sampling
        return replace(sampling, time_limit_seconds=max(_LEAST_LIMIT_SECONDS, limit - (time.monotonic() - self.arrived)))


class Turns(Protocol):
    def generate(self, request: GenerateRequest, wanted: Callable[[], bool]) -> list[Rollout]:
        """Waits for the rollouts. Raises what the engine raises, and NobodyWaits."""
        ...


def turns_of(engine: RolloutEngine, executor: Executor) -> Turns:
    """`executor`: of one thread."""
    return Together(engine, executor) if isinstance(engine, ContinuousEngine) else OneByOne(engine, executor)


class OneByOne:
    """In the order in which they came; who has gone away by then is passed over."""

    def __init__(self, engine: RolloutEngine, executor: Executor) -> None:
        self._engine, self._executor = engine, executor

    def generate(self, request: GenerateRequest, wanted: Callable[[], bool]) -> list[Rollout]:
        return self._executor.submit(self._run, _Request(request, wanted)).result()

    def _run(self, one: _Request) -> list[Rollout]:
        if not one.wanted():
            raise NobodyWaits
        count, seeds = one.request.num_rollouts_per_prompt, one.request.seeds
        return self._engine.generate(one.request.prompts, one.sampling, num_rollouts_per_prompt=count, seeds=seeds)


class Together:
    """All that there are at a time. A request joins at the engine's next step, and leaves when it is done or nobody waits."""

    def __init__(self, engine: ContinuousEngine[OngoingGeneration], executor: Executor) -> None:
        self._engine, self._executor = engine, executor
        self._lock = threading.Lock()
        self._arrived: list[_Request] = []
        self._running = False  # the loop, in the executor's thread
        self._under_way: dict[_Request, OngoingGeneration] = {}  # the loop's own
        self._next_look = 0.0

    def generate(self, request: GenerateRequest, wanted: Callable[[], bool]) -> list[Rollout]:
        one = _Request(request, wanted)
        with self._lock:
            self._arrived.append(one)
            if not self._running:
                self._executor.submit(self._loop)
                self._running = True
        return one.answer.result()

    def _loop(self) -> None:
        """Until there is nothing left to do."""
        while True:
            with self._lock:
                arrived, self._arrived = self._arrived, []
                if not arrived and not self._under_way:
                    self._running = False
                    return
            for one in arrived:
                self._begin(one)
            try:
                self._drop_unwanted()
                if self._under_way:
                    self._engine.step()
            except BaseException as error:
                _log.exception("the engine failed")
                self._fail_all(error)
            self._answer_done()

    def _begin(self, one: _Request) -> None:
        try:
            if not one.wanted():
                raise NobodyWaits
            request, count = one.request, one.request.num_rollouts_per_prompt
            added = self._engine.add(request.prompts, one.sampling, num_rollouts_per_prompt=count, seeds=request.seeds)
        except BaseException as error:
            one.answer.set_exception(error)
        else:
            self._under_way[one] = added

    def _answer_done(self) -> None:
        for one in [one for one, generation in self._under_way.items() if generation.done]:
            generation = self._under_way.pop(one)
            try:
                one.answer.set_result(generation.rollouts())
            except BaseException as error:
                one.answer.set_exception(error)

    def _fail_all(self, error: BaseException) -> None:
        what = f"the engine failed while it generated {len(self._under_way)} requests: {type(error).__name__}: {error}"
        for one in self._under_way:
            failure = EngineFailure(what)
            failure.__cause__ = error
            one.answer.set_exception(failure)
        self._under_way.clear()

    def _drop_unwanted(self) -> None:
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + _LOOK_SECONDS
        for one in [one for one in self._under_way if not one.wanted()]:
            generation = self._under_way.pop(one)
            one.answer.set_exception(NobodyWaits())
            self._engine.drop(generation)
