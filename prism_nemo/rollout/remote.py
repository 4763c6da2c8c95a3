"""`RolloutEngine` on servers of their own: processes that this run starts on its machine, or servers that it is named.

The main rank looks after the servers and sends them the weights; the leader of each model's ranks sends them prompts, in the
background. What a server gives is checked, and what it fails at is done by another.
"""

from __future__ import annotations

import logging
import math
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import Tensor

from prism_nemo.algorithms.metrics import MetricSums
from prism_nemo.config.compose import dump_config
from prism_nemo.config.enums import Device, Precision, RolloutEngineKind
from prism_nemo.config.rollout import RolloutConfig, ServeSettings
from prism_nemo.config.schema import DataConfig, ModelConfig, ServeConfig
from prism_nemo.config.serving import serving
from prism_nemo.errors import PrismError
from prism_nemo.packing.groups import EncodedPrompt
from prism_nemo.rollout.base import SLICE_SECONDS, PendingGeneration, Rollout, RolloutError, SamplingParams, shared_rollouts
from prism_nemo.rollout.dispatch import Dispatcher, Failure, Replica
from prism_nemo.rollout.fleet import Fleet, ForeignMember, Launch, LocalMember, Member
from prism_nemo.rollout.server import token_from_environment
from prism_nemo.rollout.weight_sync import WeightSender

if TYPE_CHECKING:
    from prism_nemo.models.policy import PolicyModel

_MAX_REQUESTS = 64  # to a server, unless more are asked for: each is a connection, and a thread on both sides
_COUNTS = ("resent_requests", "servers_left_out", "late_answers", "lost_answers", "refused_answers", "wrong_answers")
_log = logging.getLogger(__name__)
T = TypeVar("T")


class RemoteEngine:
    """See `RolloutEngine`. Every rank holds one; those that lead no model only take part in collectives."""

    def __init__(self, config: RolloutConfig, policy: PolicyModel, data: DataConfig, directory: Path | None = None) -> None:
        """Starts the servers, unless they are named, and does not wait for them: the first `update_weights` does. A collective.

        directory   of the servers' configuration and logs; without one, a temporary one
        """
        self._config = config
        self._runtime = policy.runtime
        self._is_leader = policy.runtime.is_leader
        self._version = -1
        self._tensors: Iterable[tuple[str, Tensor]] = ()
        self._settled = False  # all servers were waited for once
        self._restarts = 0
        self._failures: list[Failure] = []  # that the main rank has not been told of
        self._lock = threading.Lock()
        self._fleet: Fleet | None = None
        self._sender: WeightSender | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        servers = config.servers
        several = len(set(self._runtime.gather_objects_over_all(socket.gethostname()))) > 1
        token = token_from_environment() or (None if servers.urls else secrets.token_urlsafe(24))
        self._token: str | None = self._runtime.broadcast_from_main(token)
        if self._runtime.is_main:
            members = self._members(policy, data, directory, several=several)
            self._fleet = Fleet(members, servers.startup_timeout_seconds)
            self._sender = WeightSender(
                bucket_bytes=servers.weight_bucket_mb << 20,
                timeout_seconds=servers.control_timeout_seconds,
                transport=servers.weight_transport,
                device=policy.runtime.device,
            )
        self._dispatcher = Dispatcher(
            requests_per_replica=partial(requests_per_replica, config, policy.runtime.data_parallel_size),
            timeout_seconds=servers.request_timeout_seconds,
            grace_seconds=servers.control_timeout_seconds,
            vocab_size=policy.hf_config["text_config"]["vocab_size"],
            on_failure=self._note_failure,
            on_answer=self._note_answer,
        )

    def _members(self, policy: PolicyModel, data: DataConfig, directory: Path | None, *, several: bool) -> list[Member]:
        """The servers; on `several` machines those that are started must be reached from the others."""
        servers = self._config.servers
        if servers.urls:
            return [ForeignMember(url.rstrip("/"), self._token) for url in servers.urls]
        if directory is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="prism-nemo-servers-")
            directory = Path(self._temporary.name)
        folder = directory / "servers"
        folder.mkdir(parents=True, exist_ok=True)
        config_file = folder / "serve.yaml"
        config_file.write_text(dump_config(server_config(self._config, policy, data, host="0.0.0.0" if several else "127.0.0.1")))
        assert self._token is not None
        launch = Launch(config_file, folder, self._token, servers.startup_timeout_seconds)
        return [LocalMember(index, launch) for index in range(servers.num_replicas)]

    # Weights

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `RolloutEngine.update_weights`. A server that cannot take them does without, until the next update.

        Raises RolloutError, on every rank, when no server takes them within `startup_timeout_seconds`.
        """
        self._tensors = tensors
        self._send(version)

    def restore_weights(self, version: int) -> None:
        self._send(version)

    def _send(self, version: int) -> None:
        """Until at least one server has the weights. A collective of all ranks."""
        self._version = version
        with self._lock:
            failures, self._failures = self._failures, []
        for told in self._runtime.gather_objects_over_all(failures):
            for failure in told:
                if self._fleet is not None:
                    self._fleet.report(failure.name, failure.instance, failure.what)
        began = time.monotonic()
        replicas: list[Replica] = []
        while not replicas:
            while not self._on_main(lambda: self._wait_for_servers(began)):
                pass
            if not self._runtime.is_main:
                for _ in self._tensors:  # the main rank reads them, and to read them is a collective
                    pass
            replicas = self._on_main(lambda: self._send_once(version, began))
        self._settled = True
        if self._is_leader:
            self._dispatcher.serve_with(replicas)

    def _wait_for_servers(self, began: float) -> bool:
        assert self._fleet is not None
        return self._fleet.wait(SLICE_SECONDS, for_all=not self._settled, since=began)

    def _send_once(self, version: int, began: float) -> list[Replica]:
        """The servers that have taken the weights. Raises RolloutError when it is the weights that they do not take."""
        assert self._fleet is not None and self._sender is not None
        receivers = {receiver.name: receiver for receiver in self._fleet.up()}
        sent = self._sender.send(self._tensors, version, list(receivers.values()))
        for name, refusal in sent.refusals.items():
            if refusal.final:
                raise RolloutError(
                    f"a rollout server does not take the weights: {refusal.what}", where=name, remedy=refusal.remedy
                )
            _log.warning("%s did not get the weights of version %d: %s", name, version, refusal.what)
            if refusal.at_fault:
                self._fleet.report(name, receivers[name].instance, refusal.what)
        taken = [receiver for name, receiver in receivers.items() if name not in sent.refusals]
        if not taken and time.monotonic() - began > self._config.servers.startup_timeout_seconds:
            told = "\n".join(f"  {name}: {refusal.what}" for name, refusal in sent.refusals.items())
            raise RolloutError(
                f"no rollout server takes the weights\n{told or self._fleet.describe()}",
                where="rollout.servers",
                remedy="see what each of them says; rollout.servers.control_timeout_seconds is the limit for a bucket of weights",
            )
        return [Replica(one.name, one.instance, one.address, sent.update_id, version) for one in taken]

    def _on_main(self, make: Callable[[], T]) -> T:
        """What `make()` returns on the main rank, on all of them; a PrismError that it raises is raised on all."""
        made: tuple[T | None, PrismError | None] = (None, None)
        if self._runtime.is_main:
            try:
                made = (make(), None)
            except PrismError as error:
                made = (None, error)
        value, problem = self._runtime.broadcast_from_main(made)
        if problem is not None:
            raise problem
        return cast(T, value)

    # Rollouts

    def start(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingParams, *, num_rollouts_per_prompt: int, seeds: Sequence[int]
    ) -> PendingGeneration:
        """See `RolloutEngine.start`: returns at once."""
        assert len(seeds) == len(prompts) * num_rollouts_per_prompt, "one seed per rollout"
        assert self._settled, "update_weights comes first"
        if not self._is_leader:
            return _NotHere()
        per_request = self._config.servers.prompts_per_request
        return self._dispatcher.start(prompts, sampling, num_rollouts_per_prompt, seeds, per_request)

    def generate(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingParams, *, num_rollouts_per_prompt: int, seeds: Sequence[int]
    ) -> list[Rollout]:
        pending = self.start(prompts, sampling, num_rollouts_per_prompt=num_rollouts_per_prompt, seeds=seeds)
        return shared_rollouts(self._runtime, pending.collect, lambda: self.restore_weights(self._version))

    def metrics(self) -> MetricSums:
        """What went wrong since the last call, as sums over data-parallel ranks: how often, of each kind. Nothing on other ranks.

        Restarts of servers are counted by the main rank.
        """
        counts = self._dispatcher.take_counts()
        restarts = 0 if self._fleet is None else self._fleet.restarts()
        counts["restarts"], self._restarts = restarts - self._restarts, restarts
        weight = float(self._runtime.data_parallel_rank == 0)  # one step, however many ranks
        return {name: (float(counts.get(name, 0)), weight) for name in (*_COUNTS, "restarts")}

    def sleep(self) -> bool:
        """Servers have memory of their own, and keep their weights."""
        return True

    def wake_up(self) -> None:
        """They never slept."""

    def close(self) -> None:
        self._dispatcher.close()
        if self._sender is not None:
            self._sender.close()
        if self._fleet is not None:
            self._fleet.close()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _note_failure(self, failure: Failure) -> None:
        if self._fleet is not None:
            self._fleet.report(failure.name, failure.instance, failure.what)
            return
        with self._lock:
            self._failures.append(failure)

    def _note_answer(self, name: str, instance: str) -> None:
        if self._fleet is not None:
            self._fleet.answered(name, instance)


def requests_per_replica(config: RolloutConfig, leaders: int, num_rollouts: int) -> int:
    """Requests of `num_rollouts` that each of `leaders` has under way to a server: what it decodes together, and the next.

    More would wait there, and a slow server would keep what a quick one could have done.
    """
    given = config.servers.requests_per_replica
    if given is not None:
        return given
    if config.engine is not RolloutEngineKind.vllm:
        return 1 + 1  # one after the other
    return min(_MAX_REQUESTS, math.ceil(config.max_batch_size / (leaders * num_rollouts)) + 1)


class _NotHere:
    """On ranks that do not lead."""

    def collect(self) -> list[Rollout]:
        raise AssertionError("the leader collects")


def server_config(config: RolloutConfig, policy: PolicyModel, data: DataConfig, *, host: str) -> ServeConfig:
    """Of a server that this run starts: the policy's model, on the kind of device that the policy is on."""
    dtype = next(iter(policy.chunks[0].parameters())).dtype
    precision = Precision.bf16 if dtype == torch.bfloat16 else Precision.fp32
    model = ModelConfig(path=str(policy.assets.resolve()), precision=precision)
    return serving(model, Device(policy.runtime.device.type), data, config, ServeSettings(host=host, port=0))
