"""Gives prompts to the rollout servers that have the weights, and takes nothing but right answers.

Every leader of a model's ranks has its own dispatcher, and all of them use all servers. A server has only so many requests at a
time, so that a slow one gets fewer. A request that fails, in whatever way, goes to another server; what a server sends after it
was given up reaches nobody.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from prism_nemo.errors import PrismError
from prism_nemo.packing.groups import EncodedPrompt
from prism_nemo.rollout.answers import max_answer_bytes, read_answer
from prism_nemo.rollout.base import Rollout, RolloutError, SamplingParams, WeightsLostError
from prism_nemo.rollout.exchange import Address, ExchangeError, Reply
from prism_nemo.rollout.server import GENERATE
from prism_nemo.rollout.weight_link import UNPROCESSABLE
from prism_nemo.rollout.wire import GenerateRequest, WireError, encode_request

_MAX_FAILURES = 5  # of one request that servers had begun with: then it is the request
_LEAST_LIMIT_SECONDS = 1e-3
_CONFLICT = 409
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Replica:
    """A server with the weights of one update."""

    name: str
    instance: str
    address: Address
    update_id: str
    version: int
    under_way: int = 0

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.instance


@dataclass(frozen=True)
class Failure:
    """What a server did wrong, for those who look after it."""

    name: str
    instance: str
    what: str


@dataclass(frozen=True)
class _Outcome:
    """What became of a request that has no answer."""

    what: str
    kind: Literal["refused", "late", "lost", "wrong"]
    began: bool = True  # the server may have begun with it
    blamed: bool = True  # the server is not as it should be; without, it has got other weights


@dataclass(eq=False)
class _Job:
    """Prompts that go into one request, from number `first` of their call on."""

    call: Call
    number: int
    first: int
    prompts: Sequence[EncodedPrompt]
    seeds: Sequence[int]
    attempts: int = 0
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        last = self.first + len(self.prompts) - 1
        return f"prompt {self.first}" if last == self.first else f"prompts {self.first} to {last}"


class Call:
    """A `generate` that was started: see `PendingGeneration`."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        number: int,
        prompts: Sequence[EncodedPrompt],
        sampling: SamplingParams,
        count: int,
        seeds: Sequence[int],
        prompts_per_request: int,
    ) -> None:
        self.number, self.sampling, self.count = number, sampling, count
        limit = sampling.time_limit_seconds
        self.deadline = None if limit is None else time.monotonic() + limit
        self.error: PrismError | None = None
        self._dispatcher = dispatcher
        self.jobs = [
            _Job(self, index, first, chunk, seeds[first * count : (first + len(chunk)) * count])
            for index, first in enumerate(range(0, len(prompts), prompts_per_request))
            for chunk in [prompts[first : first + prompts_per_request]]
        ]
        self.results: dict[int, list[Rollout]] = {}  # by the job's number

    @property
    def done(self) -> bool:
        return len(self.results) == len(self.jobs)

    def collect(self) -> list[Rollout]:
        """See `PendingGeneration.collect`. Raises RolloutError for what no server can do, and when the engine was closed."""
        self._dispatcher.wait_for(self)
        return [rollout for job in self.jobs for rollout in self.results[job.number]]


class Dispatcher:
    """For any number of threads. `on_failure` and `on_answer` are told of servers, by name and instance, outside of all locks."""

    def __init__(
        self,
        *,
        requests_per_replica: Callable[[int], int],
        timeout_seconds: float,
        grace_seconds: float,
        vocab_size: int,
        on_failure: Callable[[Failure], None],
        on_answer: Callable[[str, str], None],
    ) -> None:
        """What the numbers are.

        requests_per_replica   under way to a server at a time, of requests for so many rollouts each
        timeout_seconds        for an answer; where the responses' time is limited, that and `grace_seconds` if it is less
        """
        self._requests_per_replica = requests_per_replica
        self._timeout, self._grace = timeout_seconds, grace_seconds
        self._vocab_size = vocab_size
        self._on_failure, self._on_answer = on_failure, on_answer
        self._changed = threading.Condition()
        self._replicas: dict[tuple[str, str], Replica] = {}
        self._waiting: deque[_Job] = deque()
        self._closed = False
        self._numbers = itertools.count(1)
        self._counts: Counter[str] = Counter()

    def serve_with(self, replicas: Sequence[Replica]) -> None:
        """These servers have the weights, and no others."""
        with self._changed:
            for replica in replicas:
                known = self._replicas.get(replica.key)
                replica.under_way = 0 if known is None else known.under_way
                if known is not None:  # its requests under way are counted there
                    known.update_id, known.version = replica.update_id, replica.version
            self._replicas = {replica.key: self._replicas.get(replica.key, replica) for replica in replicas}
            self._pump()
            self._changed.notify_all()

    def start(
        self,
        prompts: Sequence[EncodedPrompt],
        sampling: SamplingParams,
        count: int,
        seeds: Sequence[int],
        prompts_per_request: int,
    ) -> Call:
        call = Call(self, next(self._numbers), prompts, sampling, count, list(seeds), prompts_per_request)
        with self._changed:
            self._waiting.extend(call.jobs)
            self._pump()
        return call

    def wait_for(self, call: Call) -> None:
        """Until all of the call is there. Raises its error, and WeightsLostError when no server has the weights any more."""

        def settled() -> bool:
            return call.done or call.error is not None or self._closed or not self._replicas

        with self._changed:
            self._changed.wait_for(settled)
            if call.error is not None:
                raise call.error
            if call.done:
                return
            if self._closed:
                raise RolloutError("the rollout engine was closed before all rollouts were there", where="rollout")
            missing = ", ".join(str(job) for job in call.jobs if job.number not in call.results)
            raise WeightsLostError(f"no rollout server has the weights any more; {missing} of call {call.number} are missing")

    def take_counts(self) -> dict[str, int]:
        """What happened since the last time: requests sent again, servers left out, and how often for what kind of answer."""
        with self._changed:
            counts, self._counts = self._counts, Counter()
        return dict(counts)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def _pump(self) -> None:
        """Sends what can be sent, to the server that has least to do; the lock is held."""
        while self._waiting and self._replicas and not self._closed:
            job = self._waiting[0]
            if job.call.error is not None:
                self._waiting.popleft()
                continue
            replica = min(self._replicas.values(), key=lambda one: one.under_way)
            if replica.under_way >= self._requests_per_replica(len(job.seeds)):
                return
            self._waiting.popleft()
            replica.under_way += 1
            job.attempts += 1
            request = self._request(job, replica)
            work = (job, replica, request, replica.version)
            try:
                threading.Thread(target=self._work, args=work, name=f"rollout {request.request_id}", daemon=True).start()
            except RuntimeError as error:  # who waits for the call must hear of it, and may be another thread
                replica.under_way -= 1
                job.call.error = RolloutError(
                    f"there is no thread for a request: {error}",
                    where="rollout.servers.requests_per_replica",
                    remedy="lower it, or raise the limit of processes (ulimit -u)",
                )

    def _request(self, job: _Job, replica: Replica) -> GenerateRequest:
        sampling = job.call.sampling
        if job.call.deadline is not None:
            left = max(_LEAST_LIMIT_SECONDS, job.call.deadline - time.monotonic())
            sampling = replace(sampling, time_limit_seconds=left)
        return GenerateRequest(
            request_id=f"{job.call.number}.{job.number}.{job.attempts}",
            update_id=replica.update_id,
            prompts=job.prompts,
            sampling=sampling,
            num_rollouts_per_prompt=job.call.count,
            seeds=job.seeds,
        )

    def _work(self, job: _Job, replica: Replica, request: GenerateRequest, version: int) -> None:
        """One request, in a thread of its own."""
        try:
            limit = request.sampling.time_limit_seconds
            timeout = self._timeout if limit is None else min(self._timeout, limit + self._grace)
            reply = replica.address.post(
                GENERATE, [encode_request(request)], timeout_seconds=timeout, max_bytes=max_answer_bytes(request)
            )
            if reply.ok:
                self._succeeded(job, replica, read_answer(request, reply.body, version=version, vocab_size=self._vocab_size))
                return
            if reply.status == UNPROCESSABLE:
                self._impossible(job, replica, _refusal(reply, replica))
                return
            outcome = _Outcome(reply.problem, "refused", blamed=reply.status != _CONFLICT)
        except ExchangeError as error:
            outcome = _Outcome(str(error), "late" if error.timed_out else "lost", began=error.connected)
        except WireError as error:
            outcome = _Outcome(f"a wrong answer: {error}", "wrong")
        except Exception as error:
            _log.exception("request %s", request.request_id)
            self._impossible(job, replica, RolloutError(f"{type(error).__name__}: {error}", where=f"the request for {job}"))
            return
        self._failed(job, replica, request, outcome)

    def _succeeded(self, job: _Job, replica: Replica, rollouts: list[Rollout]) -> None:
        placed = [replace(rollout, prompt_index=job.first + rollout.prompt_index) for rollout in rollouts]
        self._on_answer(*replica.key)
        with self._changed:
            replica.under_way -= 1
            job.call.results[job.number] = placed
            self._pump()
            self._changed.notify_all()

    def _impossible(self, job: _Job, replica: Replica, error: PrismError) -> None:
        with self._changed:
            replica.under_way -= 1
            job.call.error = job.call.error or error
            self._pump()
            self._changed.notify_all()

    def _failed(self, job: _Job, replica: Replica, request: GenerateRequest, outcome: _Outcome) -> None:
        """The server is left out from now on, unless it has got other weights meanwhile; the prompts wait for another."""
        with self._changed:
            if self._closed:
                return
            same = replica.update_id == request.update_id
        if same and outcome.blamed:  # before it is left out: who then finds no server must find this told
            self._on_failure(Failure(replica.name, replica.instance, outcome.what))
        _log.warning("%s: %s; %s of call %d will be sent again", replica.name, outcome.what, job, job.call.number)
        with self._changed:
            replica.under_way -= 1
            self._counts["resent_requests"] += 1
            if replica.update_id == request.update_id and self._replicas.get(replica.key) is replica:
                del self._replicas[replica.key]
                self._counts["servers_left_out"] += 1
                self._counts[f"{outcome.kind}_answers"] += 1
            if outcome.began and outcome.blamed:
                job.failures.append(f"{replica.name}: {outcome.what}")
            if len(job.failures) >= _MAX_FAILURES:
                job.call.error = job.call.error or _hopeless(job)
            else:
                self._waiting.appendleft(job)
            self._pump()
            self._changed.notify_all()


def _refusal(reply: Reply, replica: Replica) -> PrismError:
    """The engine's own error: another engine with the same weights would say the same."""
    told = reply.json()
    what, where, remedy = (told.get(key) if isinstance(told.get(key), str) else None for key in ("what", "where", "remedy"))
    return RolloutError(what or reply.problem, where=f"{replica.name}{f', {where}' if where else ''}", remedy=remedy)


def _hopeless(job: _Job) -> RolloutError:
    failures = "\n".join(f"  {failure}" for failure in job.failures)
    return RolloutError(
        f"{job} of a call failed {len(job.failures)} times\n{failures}",
        where="rollout.servers",
        remedy="see the servers' logs; a longer rollout.servers.request_timeout_seconds, where the time was too short",
    )
