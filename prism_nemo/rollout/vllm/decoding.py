"""What vLLM's engine decodes: the responses of any number of calls together, each call with its own limit and its own errors."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed.parallel_state import get_tp_group
from vllm.exceptions import VLLMClientError

from prism_nemo.config.enums import Draws
from prism_nemo.rollout.base import Rollout, RolloutError, SamplingParams
from prism_nemo.rollout.vllm.requests import Request, check_finite, request_parameters

_names = itertools.count()  # of responses; no two alike in a process, whose engines are used by one stage after the other


class EngineBroken(RuntimeError):
    """vLLM failed on one of several ranks that share an engine: the others may wait for it in there, and hear of nothing."""


@dataclass(eq=False)
class Generation:
    """The responses of one call: see `OngoingGeneration`."""

    version: int  # of the weights
    requests: list[Request]
    running: dict[str, Request]  # those that have not ended, by vLLM's name for them
    keys: list[int]  # of the requests, in `SharedDraws`
    deadline: float | None  # on the decoder's clock
    error: BaseException | None = None

    @property
    def done(self) -> bool:
        return not self.running

    def numbered(self) -> list[tuple[int, Rollout]]:
        """The rollouts with their numbers in the call. Raises what went wrong with this call alone."""
        assert self.done, "it is generated still"
        if self.error is not None:
            raise self.error
        return [(request.number, request.rollout(self.version)) for request in self.requests]

    def rollouts(self) -> list[Rollout]:
        return [rollout for _, rollout in self.numbered()]


class Decoder:
    """Not for several threads at once. Ranks that share an engine call every method alike: each runs vLLM's scheduler itself."""

    def __init__(self, llm: Any, draws: Draws, *, shares_scheduling: bool) -> None:
        """`shares_scheduling`: whether several ranks have to decide alike."""
        self._llm = llm
        self._shared = draws is Draws.shared
        self._group = get_tp_group().cpu_group if shares_scheduling else None
        self._generations: dict[Generation, None] = {}  # in the order in which they came
        self._owner: dict[str, Generation] = {}  # of a response that is running
        self.spoilt = False  # the cache may hold what is not finite

    @property
    def idle(self) -> bool:
        return not self._generations

    def add(
        self, requests: list[Request], inputs: dict[int, Any], sampling: SamplingParams, seeds: Sequence[int], version: int
    ) -> Generation:
        """Has the requests decoded, by `step`, with all that is there already. Those of a call that fails here leave nothing.

        Raises RolloutError for what vLLM does not take.
        """
        self.clean()
        limit = sampling.time_limit_seconds
        deadline = None if limit is None else self._now() + limit
        generation = Generation(version, requests, {}, [], deadline)
        self._generations[generation] = None
        try:
            for request in requests:
                key = next(_names)
                generation.keys.append(key)
                generation.running[str(key)], self._owner[str(key)] = request, generation
                parameters = request_parameters(sampling, seeds[request.number], key if self._shared else None)
                self._llm.llm_engine.add_request(str(key), inputs[request.prompt_index], parameters)
        except BaseException as error:
            self.drop(generation)
            if isinstance(error, VLLMClientError | ValueError):  # what vLLM says of parameters and prompts
                raise RolloutError(f"vLLM refuses the request: {error}", where="rollout") from error
            raise
        self._forget(generation, ())  # it is done already, where there are no requests
        return generation

    def step(self) -> None:
        """A token more of every response that there is room for. What goes wrong with one generation ends that one alone.

        Raises what vLLM raises, where several ranks share it as the cause of EngineBroken; then nothing is running any more.
        """
        try:
            outputs = self._llm.llm_engine.step()
        except BaseException as error:
            for generation in list(self._generations):
                generation.error = error
                self.drop(generation)
            if self._group is not None and isinstance(error, Exception):
                raise EngineBroken(f"vLLM failed on this rank: {type(error).__name__}: {error}") from error
            raise
        for output in outputs:
            owner = self._owner.get(output.request_id)
            if owner is None:  # it was ended meanwhile
                continue
            try:
                if owner.running[output.request_id].take(output):
                    self._forget(owner, [output.request_id])
            except Exception as error:
                owner.error = error
                self.drop(owner)
        self._end_late()

    def drop(self, generation: Generation) -> None:
        """Nobody wants it any more; nothing, where it is done."""
        if generation in self._generations:
            self._abort(generation, list(generation.running))

    def clean(self) -> None:
        """Where nothing runs: what is not finite goes out of the cache, which must not be asleep.

        vLLM's kernels multiply what lies in a block behind a response's last token by 0, and 0 times NaN is NaN: after weights
        that overflowed, sound ones would sample nothing.
        """
        if self.spoilt and self.idle:
            forgotten = self._llm.reset_prefix_cache()
            assert forgotten, "vLLM keeps keys and values, and nothing runs"
            self._llm.collective_rpc("clear_prism_cache")
            self.spoilt = False

    def _end_late(self) -> None:
        """Of a generation whose time is up, ends the responses that have a token; the others go on until they do."""
        if all(generation.deadline is None for generation in self._generations):
            return
        now = self._now()
        for generation in list(self._generations):
            if generation.deadline is not None and generation.deadline <= now:
                late = [name for name, request in generation.running.items() if request.tokens]
                for name in late:
                    generation.running[name].finish_reason = "timeout"
                self._abort(generation, late)

    def _now(self) -> float:
        """Seconds on a clock that all ranks of the engine share: its first one's. A collective of theirs."""
        now = torch.tensor(time.monotonic(), dtype=torch.float64)
        if self._group is not None:
            dist.broadcast(now, group=self._group, group_src=0)
        return float(now)

    def _abort(self, generation: Generation, names: Sequence[str]) -> None:
        self._llm.llm_engine.abort_request(list(names))
        self._forget(generation, names)

    def _forget(self, generation: Generation, names: Iterable[str]) -> None:
        """These of its responses run no more."""
        for name in names:
            del generation.running[name], self._owner[name]
        if generation.done and generation in self._generations:
            self._end(generation)

    def _end(self, generation: Generation) -> None:
        del self._generations[generation]
        if self._shared:
            (drawn, *_) = self._llm.collective_rpc("take_prism_log_probs", args=(generation.keys,))
            for request, log_probs in zip(generation.requests, drawn, strict=False):
                request.log_probs = log_probs[: len(request.tokens)]
        try:
            for request in generation.requests:
                check_finite(request.log_probs)
        except RolloutError as error:
            generation.error, self.spoilt = error, True
