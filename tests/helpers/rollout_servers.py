"""Rollout servers in threads of this process, over real HTTP: sound ones, and some that do one thing wrong."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from helpers.rows import CPU, one_rank
from helpers.tiny import IMAGE_TOKEN, VIDEO_TOKEN, TinyModel, make_prompt

from prism_nemo.config.enums import Precision, RolloutPlacement
from prism_nemo.config.rollout import RolloutConfig, RolloutServersConfig
from prism_nemo.config.schema import DataConfig, ModelConfig, ParallelConfig
from prism_nemo.models.policy import PolicyModel
from prism_nemo.models.qwen3_vl.config import Qwen3VLShape
from prism_nemo.models.qwen3_vl.model import Qwen3VLModel
from prism_nemo.packing.groups import EncodedPrompt
from prism_nemo.rollout.base import Rollout, SamplingParams
from prism_nemo.rollout.fleet import LocalMember
from prism_nemo.rollout.loading import ServedMegatronEngine
from prism_nemo.rollout.megatron import MegatronEngine
from prism_nemo.rollout.remote import RemoteEngine
from prism_nemo.rollout.server import EngineHost, RolloutServer
from prism_nemo.rollout.wire import GenerateRequest

PROMPTS = (
    make_prompt([(4, 6), (8, 4)], seed=1),
    make_prompt([(6, 4)], seed=2, text_length=2),
    make_prompt([], seed=3, text_length=11),
    make_prompt([(2, 2), (4, 4), (2, 8)], seed=4, text_length=3),
    make_prompt([], seed=5, text_length=1),
    make_prompt([(4, 4)], seed=6),
)
SAMPLING = SamplingParams(0.9, 0.97, 90, 24, 5, (IMAGE_TOKEN, VIDEO_TOKEN, 7))
COUNT = 3


def policy_of(tiny: TinyModel) -> PolicyModel:
    return PolicyModel(ModelConfig(path=str(tiny.directory), precision=Precision.fp32), ParallelConfig(), one_rank())


_idle: dict[str, list[ServedMegatronEngine]] = {}  # engines of servers that are gone; their weights will be other ones


def served_engine(tiny: TinyModel) -> ServedMegatronEngine:
    """An engine with a model of its own, without weights that anyone may count on."""
    one_rank()
    idle = _idle.setdefault(str(tiny.directory), [])
    if idle:
        return idle.pop()
    model = Qwen3VLModel(Qwen3VLShape.from_hf(tiny.config), ParallelConfig(), Precision.fp32)
    return ServedMegatronEngine(model, tiny.config, device=CPU, max_batch_size=256)


class Host(EngineHost):
    """`spoil(answer, request, number)`, for request number 1, 2, …, makes of the right answer what is sent."""

    def __init__(self, tiny: TinyModel, spoil: Callable[[bytes, GenerateRequest, int], bytes] | None = None) -> None:
        self.served = served_engine(tiny)
        super().__init__(self.served, name="megatron", busy_seconds=5.0)
        self.directory = str(tiny.directory)
        self.spoil = spoil
        self.asked = 0

    def generate(self, request: GenerateRequest, wanted: Callable[[], bool]) -> bytes:
        self.asked += 1
        number = self.asked
        answer = super().generate(request, wanted)
        return answer if self.spoil is None else self.spoil(answer, request, number)


@contextmanager
def serving(host: EngineHost, *, token: str | None = None, max_body_bytes: int = 1 << 28) -> Iterator[str]:
    """The host's address."""
    server = RolloutServer(host, ("127.0.0.1", 0), token=token, max_body_bytes=max_body_bytes)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        if host.close(5.0) and isinstance(host, Host):
            _idle[host.directory].append(host.served)


def remote_config(urls: Sequence[str] = (), **servers: Any) -> RolloutConfig:
    given = {"urls": list(urls), "startup_timeout_seconds": 120.0, "weight_bucket_mb": 1, "control_timeout_seconds": 60.0}
    return RolloutConfig(placement=RolloutPlacement.separate, servers=RolloutServersConfig(**(given | servers)))


@contextmanager
def remote_engine(
    policy: PolicyModel, urls: Sequence[str] = (), directory: Path | None = None, **servers: Any
) -> Iterator[RemoteEngine]:
    engine = RemoteEngine(remote_config(urls, **servers), policy, DataConfig(), directory)
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def engine_over(policy: PolicyModel, hosts: Sequence[EngineHost], **servers: Any) -> Iterator[RemoteEngine]:
    """An engine over servers of these hosts, with the policy's weights as version 3."""
    with ExitStack() as stack:
        urls = [stack.enter_context(serving(host)) for host in hosts]
        engine = stack.enter_context(remote_engine(policy, urls, **servers))
        engine.update_weights(policy.hf_tensors(), 3)
        yield engine


def in_process(
    policy: PolicyModel,
    prompts: Sequence[EncodedPrompt],
    sampling: SamplingParams,
    count: int,
    *,
    version: int = 3,
    at_once: int = 1,
) -> list[Rollout]:
    """What an undisturbed engine in this process gives, `at_once` prompts a call as they are sent."""
    engine = MegatronEngine(policy.chunks, device=CPU, max_batch_size=256)
    engine.update_weights((), version)
    rollouts: list[Rollout] = []
    for first in range(0, len(prompts), at_once):
        chunk = prompts[first : first + at_once]
        seeds = range(first * count, (first + len(chunk)) * count)
        found = engine.generate(chunk, sampling, num_rollouts_per_prompt=count, seeds=seeds)
        rollouts += [replace(rollout, prompt_index=first + rollout.prompt_index) for rollout in found]
    return rollouts


def generate(engine: Any, sampling: SamplingParams = SAMPLING) -> Any:
    return engine.generate(PROMPTS, sampling, num_rollouts_per_prompt=COUNT, seeds=range(COUNT * len(PROMPTS)))


def assert_bit_equal(found: Sequence[Rollout], expected: Sequence[Rollout]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.tokens.equal(other.tokens)
        assert one.log_probs.equal(other.log_probs)
        assert (one.prompt_index, one.finish_reason) == (other.prompt_index, other.finish_reason)
        assert one.weights_version == other.weights_version


def until(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    """Waits for something that comes soon; the limit is only so that a mistake ends."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def members(engine: RemoteEngine) -> list[LocalMember]:
    assert engine._fleet is not None
    return [member for member in engine._fleet._members.values() if isinstance(member, LocalMember)]


def pid_of(member: LocalMember) -> int:
    return member._process.process.pid
