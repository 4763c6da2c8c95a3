"""How vLLM's engine is started: the settings under which it computes what the trainer computes, and can be given new weights."""

from __future__ import annotations

import gc
import hashlib
import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import vllm
import vllm._custom_ops
import vllm.v1.engine.core
from vllm.distributed import parallel_state
from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

from prism_nemo.config.enums import Draws
from prism_nemo.config.rollout import RolloutConfig
from prism_nemo.engine.runtime import rng_state, set_rng_state
from prism_nemo.rollout.vllm.experts import keep_experts_unpacked
from prism_nemo.rollout.vllm.worker import SharedDraws, WorkerExtension

if TYPE_CHECKING:
    from prism_nemo.models.policy import PolicyModel

_CPU_CACHE_GB = 1.0
_CPU_BLOCK = 32  # tokens: prompts are shared in whole blocks, and vLLM's own default of 128 is longer than many
_shared_memory_name = _CPUSHMDistributed.make_group_name
_engines: list[Any] = []  # taking one apart would take the process groups with it: they live as long as the process
_idle: dict[str, list[Any]] = {}  # of them, by what they were started with, those that nobody uses


@dataclass(frozen=True, eq=False)
class ServedModel:
    """What an engine is built for.

    directory    config, tokenizer and image processor in HuggingFace's layout; no weights are read
    max_length   tokens of a prompt and its response
    group        of the ranks that share prompts, each with an engine or a part of one; None: this rank alone
    """

    directory: Path
    config: dict[str, Any]
    dtype: torch.dtype
    device: torch.device
    max_length: int
    group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, policy: PolicyModel, max_length: int) -> ServedModel:
        return cls(
            directory=policy.assets,
            config=dict(policy.hf_config),
            dtype=next(iter(policy.chunks[0].parameters())).dtype,
            device=policy.runtime.device,
            max_length=max_length,
            group=policy.runtime.layout.model_group,
        )


def start_engine(config: RolloutConfig, model: ServedModel) -> Any:
    """A `vllm.LLM` without weights that count: one that was given back, where there is one alike. A collective of all ranks."""
    idle = _idle.get(_kind(config, model))
    if idle:
        return idle.pop()
    with _random_state_kept():
        llm = _start(config, model)
    _engines.append(llm)
    return llm


def give_back(llm: Any, config: RolloutConfig, model: ServedModel) -> None:
    """The next stage of this process may use it: it has nothing to do, and its memory is given back."""
    _idle.setdefault(_kind(config, model), []).append(llm)


def _kind(config: RolloutConfig, model: ServedModel) -> str:
    """Engines of one kind are the same but for weights."""
    group = None if model.group is None else dist.get_process_group_ranks(model.group)
    tokenizer = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(model.directory.glob("*token*.json"))]
    settings = asdict(config.vllm), config.max_batch_size
    return json.dumps([model.config, str(model.dtype), str(model.device), model.max_length, group, tokenizer, settings])


def _start(config: RolloutConfig, model: ServedModel) -> Any:
    settings = config.vllm
    options: dict[str, Any] = {}
    cpu = model.device.type == "cpu"
    cache_gb = settings.kv_cache_gb or (_CPU_CACHE_GB if cpu else None)
    if cache_gb is not None:
        options["kv_cache_memory_bytes"] = int(cache_gb * 2**30)
    if cpu:
        options["block_size"] = _CPU_BLOCK
        # Matrices stay as they are: packed ones would have to be packed at every update, which takes ten times as long as the
        # copy, and a tied output head would keep its old copy without a word.
        vllm._custom_ops._supports_onednn = False
        keep_experts_unpacked()
    if settings.draws is Draws.shared:
        options["logits_processors"] = [SharedDraws]
    if dist.is_initialized() and dist.get_world_size() > 1:
        options["distributed_executor_backend"] = "external_launcher"
        if cpu:
            _name_shared_memory_apart()
    if _engines and "num_experts" in model.config["text_config"]:
        _make_group_of_experts(settings.tensor_model_parallel_size)
    vllm.v1.engine.core.cleanup_dist_env_and_memory = lambda *_, **__: None  # the process groups are the training's
    return vllm.LLM(
        str(model.directory),
        load_format="dummy",  # the weights come with the first update
        dtype=str(model.dtype).removeprefix("torch."),
        max_model_len=model.max_length,
        max_num_seqs=config.max_batch_size,
        max_num_batched_tokens=max(settings.max_num_batched_tokens, model.max_length),
        tensor_parallel_size=settings.tensor_model_parallel_size,
        gpu_memory_utilization=settings.gpu_memory_utilization,
        enforce_eager=settings.enforce_eager or cpu,
        enable_prefix_caching=settings.enable_prefix_caching,
        enable_sleep_mode=not cpu,
        async_scheduling=False,  # a step computed ahead would go on with responses that have been ended
        logprobs_mode="processed_logprobs",
        worker_extension_cls=f"{WorkerExtension.__module__}.{WorkerExtension.__name__}",
        limit_mm_per_prompt={"image": 1, "video": 0},  # for what the start reserves; it does not limit prompts
        skip_mm_profiling=cpu,
        mm_processor_cache_gb=0,  # nothing is processed
        mm_device_do_normalize=False,  # patches are normalised already; by default it does that once more
        generation_config="vllm",  # not the model's own: it would change the distribution
        disable_log_stats=True,
        trust_remote_code=False,
        seed=0,
        **options,
    )


def _make_group_of_experts(size: int) -> None:
    """vLLM makes its groups with the first engine of a process, and that for experts only where it has some.

    A collective of all ranks; nothing where there is one.
    """
    if parallel_state._EP is None:
        world = parallel_state.get_world_group()
        parallel_state._EP = parallel_state.init_model_parallel_group(
            [list(range(first, first + size)) for first in range(0, world.world_size, size)],
            world.local_rank,
            dist.get_backend(world.device_group),
            group_name="ep",
        )


def _name_shared_memory_apart() -> None:
    """vLLM names the memory that ranks share alike in every job of a machine, and a job that was killed leaves its own behind.

    A collective of all ranks.
    """
    token = [secrets.token_hex(8)]
    dist.broadcast_object_list(token, src=0)

    def name(communicator: Any) -> str:
        return token[0] + _shared_memory_name(communicator).strip("/")  # they are not allowed within

    _CPUSHMDistributed.make_group_name = staticmethod(name)


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """vLLM seeds every generator as it starts, and exempts all that is alive from garbage collection."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
        gc.unfreeze()
