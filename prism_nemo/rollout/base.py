"""Rollout engines: prompts -> responses with the sampler's log-probabilities. What every engine takes, gives and promises."""

from __future__ import annotations

import hashlib
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from prism_nemo.algorithms.metrics import MetricSums
from prism_nemo.config.enums import RolloutEngineKind, RolloutPlacement
from prism_nemo.config.rollout import RolloutConfig, check_rollout
from prism_nemo.config.schema import DataConfig
from prism_nemo.config.serve_python import vllm_is_installed
from prism_nemo.errors import PrismError
from prism_nemo.packing.groups import EncodedPrompt

if TYPE_CHECKING:
    from prism_nemo.engine.runtime import Runtime
    from prism_nemo.models.policy import PolicyModel


SLICE_SECONDS = 20.0  # of waiting for servers, far below the limit that collectives have
T = TypeVar("T")
_log = logging.getLogger(__name__)
FinishReason = Literal["stop", "length", "timeout"]
"""The end token was sampled, or a text to stop at is complete; `max_new_tokens` were sampled; or time was up, and the tokens are
what there was by then."""


class RolloutError(PrismError):
    """A policy that cannot be sampled from."""


@dataclass(frozen=True)
class SamplingParams:
    """How a token is drawn: banned tokens out, divided by the temperature, top-k, then top-p of what is left."""

    temperature: float  # 0: the likeliest token
    top_p: float  # smallest set of likeliest tokens with this probability; 1: all
    top_k: int  # tokens at least as likely as the k-th likeliest; 0: all
    max_new_tokens: int
    end_token_id: int  # ends a response and is its last token
    banned_token_ids: tuple[int, ...]  # never sampled: image placeholders, which nothing downstream could place
    stop_texts: tuple[str, ...] = ()  # end a response too, with the token that completes one
    time_limit_seconds: float | None = None  # for a call; then responses end as they are, each with one token at least

    def __post_init__(self) -> None:
        assert self.temperature >= 0 and 0 < self.top_p <= 1 and self.top_k >= 0 and self.max_new_tokens > 0, self


@dataclass(frozen=True, eq=False)
class Rollout:
    """One response to the prompt at `prompt_index` of the call, on the CPU.

    tokens     int64   [n]  the end token included when it was sampled
    log_probs  float32 [n]  of every token under the distribution that it was drawn from

    That distribution is the one after temperature and ban, and renormalised over what top-k and top-p left: with either in use it
    is not the distribution whose log-probabilities the trainer computes, and the difference shows in rollout correction. With
    temperature 0 it is the one at temperature 1 after the ban.
    """

    prompt_index: int
    tokens: Tensor
    log_probs: Tensor
    finish_reason: FinishReason
    weights_version: int  # of the last `update_weights` before it was sampled


class WeightsLostError(PrismError):
    """No replica has the weights any more; `RolloutEngine.restore_weights` gives them back, and then `collect` goes on."""


class PendingGeneration(Protocol):
    """A `generate` that was started."""

    def collect(self) -> list[Rollout]:
        """Waits for the rollouts. For the leader of a model's ranks alone, from any thread: it is no collective.

        Raises WeightsLostError as often as that happens; it may be called again. What was generated before is not lost.
        """
        ...


@dataclass(frozen=True, eq=False)
class Generated:
    """What an engine gives that generates at once: the rollouts, on every rank."""

    rollouts: list[Rollout]

    def collect(self) -> list[Rollout]:
        return self.rollouts


class RolloutEngine(Protocol):
    """Every rank of a model calls every method, with the same arguments."""

    def start(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingParams, *, num_rollouts_per_prompt: int, seeds: Sequence[int]
    ) -> PendingGeneration:
        """`generate`, in the background where the engine runs in other processes; else it is done when this returns.

        The rollouts are of the weights of now: `update_weights` may be called only when all that was started is collected.
        """
        ...

    def generate(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingParams, *, num_rollouts_per_prompt: int, seeds: Sequence[int]
    ) -> list[Rollout]:
        """`num_rollouts_per_prompt` responses to every prompt, those of a prompt together, prompts in order; as many seeds.

        A rollout depends on its prompt, its seed and the weights, not on what else is in the call (but for floating-point
        rounding, by which a batch's shape may move a log-probability).
        """
        ...

    def restore_weights(self, version: int) -> None:
        """Sends the tensors of the last `update_weights` again, as they are by now, as `version`."""
        ...

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """From now on sample from these weights ((HuggingFace name, full tensor) of all of them), called `version`.

        `tensors` can be iterated again, until the next update: to iterate is a collective of the ranks that hold the weights.
        """
        ...

    def sleep(self) -> bool:
        """Gives back the memory that only generation needs; whether the weights are kept. No `generate` until `wake_up`.

        Weights that are not kept are updated before the next `generate`.
        """
        ...

    def wake_up(self) -> None: ...

    def metrics(self) -> MetricSums:
        """What went wrong with servers since the last call, as sums over data-parallel ranks; empty where there are none."""
        ...

    def close(self) -> None:
        """Ends what the engine started. Safe to call twice."""
        ...


class OngoingGeneration(Protocol):
    """A `generate` whose responses an engine decodes beside those of others."""

    @property
    def done(self) -> bool: ...

    def rollouts(self) -> list[Rollout]:
        """Once it is done. Raises what went wrong with this one alone, as `generate` does."""
        ...


G = TypeVar("G", bound=OngoingGeneration)


@runtime_checkable
class ContinuousEngine(Protocol[G]):
    """An engine that takes more while it generates. One thread calls it, for any number of generations."""

    def add(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingParams, *, num_rollouts_per_prompt: int, seeds: Sequence[int]
    ) -> G:
        """A `generate` that `step` brings on. Its time begins now. Raises what `generate` raises; then nothing was added."""
        ...

    def step(self) -> None:
        """A token more of all that was added, as far as there is room.

        Raises what the engine as a whole fails at: then all that was added is gone.
        """
        ...

    def drop(self, generation: G) -> None:
        """Nobody wants it any more. Safe for one that is done."""
        ...


class InProcessEngine(ABC):
    """What the engines have in common that run in the training processes: they generate at once, and never lose their weights."""

    def start(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingParams, *, num_rollouts_per_prompt: int, seeds: Sequence[int]
    ) -> Generated:
        return Generated(self.generate(prompts, sampling, num_rollouts_per_prompt=num_rollouts_per_prompt, seeds=seeds))

    @abstractmethod
    def generate(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingParams, *, num_rollouts_per_prompt: int, seeds: Sequence[int]
    ) -> list[Rollout]: ...

    def restore_weights(self, version: int) -> None:
        raise AssertionError("weights in this process are not lost")

    def metrics(self) -> MetricSums:
        """Nothing: there are no servers."""
        return {}

    def close(self) -> None:  # noqa: B027  (most have nothing to end)
        """There is nothing to end."""


def shared_rollouts(
    runtime: Runtime, collect: Callable[[], T], restore: Callable[[], None], retry: Callable[[], None] = lambda: None
) -> T:
    """What `collect()` gives on the leader of a model's ranks, on all of them. A collective over all ranks.

    It may take longer than collectives are waited for: no rank waits in one for more than a slice of that time. When it raises
    WeightsLostError on any leader, `restore()` is called on all ranks and gives the engine its weights back, and `retry()` on the
    leaders that lost them before they collect again.
    """

    def attempt() -> T | None:
        try:
            return collect()
        except WeightsLostError:
            return None

    leads = runtime.is_leader  # a collective: not for some of the ranks alone
    while True:
        found = _in_slices(runtime, leads, attempt)
        lost = found is None
        if not runtime.max_over_all(int(lost)):
            assert found is not None
            return found
        restore()
        if lost and leads:
            retry()


def _in_slices(runtime: Runtime, leads: bool, make: Callable[[], T]) -> T:
    """`runtime.share_from_leader` of something that takes long, which is made in a thread meanwhile."""
    if runtime.world_size == 1:
        return make()
    made: Future[T] = Future()

    def work() -> None:
        try:
            made.set_result(make())
        except BaseException as error:
            made.set_exception(error)

    if leads:
        threading.Thread(target=work, name="collect", daemon=True).start()  # of no concern to a process that ends
    else:
        made.set_exception(AssertionError("the leader collects"))
    while runtime.max_over_all(int(not wait([made], timeout=SLICE_SECONDS).done)):
        pass
    return runtime.share_from_leader(made.result)


def rollout_seed(run_seed: int, step: int, prompt_key: str, index: int) -> int:
    """The seed, 63 bits, of rollout `index` of a prompt at a training step; the same on every machine and at every rank count."""
    digest = hashlib.blake2b(f"{run_seed} {step} {index} {prompt_key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def with_engine(config: RolloutConfig, device: torch.device, world_size: int) -> RolloutConfig:
    """The settings with an engine by name: `auto` is vLLM on a GPU where it is installed, otherwise the Megatron engine."""
    if config.engine is not RolloutEngineKind.auto:
        return config
    separate = config.placement is RolloutPlacement.separate
    fast = device.type == "cuda" and vllm_is_installed(for_servers=separate)
    config = replace(config, engine=RolloutEngineKind.vllm if fast else RolloutEngineKind.megatron)
    _log.info("rollout.engine=auto on %s: %s", device.type, config.engine)
    check_rollout(config, world_size, ahead=True)
    return config


def build_engine(config: RolloutConfig, policy: PolicyModel, data: DataConfig, directory: Path | None = None) -> RolloutEngine:
    """The engine that the configuration names. It has no weights before the first `update_weights`. A collective of all ranks.

    directory   of the run: servers that it starts write their logs below it
    """
    config = with_engine(config, policy.runtime.device, policy.runtime.world_size)
    if config.placement is RolloutPlacement.separate:
        from prism_nemo.rollout.remote import RemoteEngine

        return RemoteEngine(config, policy, data, directory)
    if config.engine is RolloutEngineKind.vllm:
        from prism_nemo.rollout.vllm import ServedModel, VLLMEngine

        return VLLMEngine(config, ServedModel.of(policy, data.max_prompt_length + data.max_response_length))
    from prism_nemo.rollout.megatron import MegatronEngine
    from prism_nemo.rollout.stopping import Tokenizer

    return MegatronEngine(
        policy.chunks,
        device=policy.runtime.device,
        max_batch_size=config.max_batch_size,
        decode=Tokenizer(policy.assets).decode,
    )
