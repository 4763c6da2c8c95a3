"""Rollouts by vLLM in the training processes: an engine a rank, or one over several, with the policy's weights after every step.

Prompts reach it as they reach the policy: image tokens expanded, patches as they are. vLLM sees no image and tokenizes no text,
so that the two can only differ in how they compute. What is worth knowing about the library stands where it is dealt with.
"""

from __future__ import annotations

import gc
import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from prism_nemo.config.enums import Draws
from prism_nemo.config.rollout import RolloutConfig
from prism_nemo.convert.qwen3_vl import hf_shapes
from prism_nemo.engine.runtime import rng_state, set_rng_state
from prism_nemo.packing.groups import EncodedPrompt
from prism_nemo.rollout.base import FinishReason, InProcessEngine, Rollout, RolloutError, SamplingParams
from prism_nemo.rollout.sampling import Sampler, uniforms

# Read as vLLM is imported. One process: the weights are handed over as Python objects.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # ranks share the cores
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # or the first log-probabilities compile C++ for up to a minute

import vllm
import vllm._custom_ops
import vllm.v1.engine.core
from vllm.inputs.engine import mm_input, tokens_input
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.interface import MoveDirectionality

if TYPE_CHECKING:
    from prism_nemo.models.policy import PolicyModel

_CPU_CACHE_GB = 1.0
_CPU_BLOCK = 32  # tokens: prompts are shared in whole blocks, and vLLM's own default of 128 is longer than many
_LEAST_BIAS = -100.0  # vLLM's; a token with it has a probability below 1e-40
_DRAW = "prism_draw"
_engines: list[Any] = []  # taking one apart would take the process groups with it: they live as long as the process


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


@dataclass(eq=False)
class _Request:
    """One response that is being generated."""

    number: int  # of the rollout in the call
    prompt_index: int
    prompt: EncodedPrompt
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None


class VLLMEngine(InProcessEngine):
    """`RolloutEngine`. The ranks that hold one model deal its prompts to their engines, and then share the rollouts.

    The library's engine lives on until the process ends: to end it would end the process groups, which are the training's.
    """

    def __init__(self, config: RolloutConfig, model: ServedModel) -> None:
        """Starts the engine, without weights. A collective of all ranks. Raises RolloutError when vLLM does not start."""
        self._config = config
        self._model = model
        self._merge = model.config["vision_config"]["spatial_merge_size"] ** 2
        self._names = frozenset(hf_shapes(model.config))
        self._weights_version: int | None = None  # None: there are none, or parts of two
        self._asleep = False
        self._calls = 0
        size = config.vllm.tensor_model_parallel_size
        ranks = 1 if model.group is None else model.group.size()
        if ranks % size:
            raise RolloutError(
                f"{ranks} ranks hold one model, which do not divide into engines of {size}",
                where="rollout.vllm.tensor_model_parallel_size",
                remedy="choose a divisor of tensor x pipeline x context parallel size",
            )
        with _random_state_kept():
            self._llm = _start(config, model)
        _engines.append(self._llm)
        place = 0 if model.group is None else model.group.rank()
        self._num_engines, self._number, self._speaks = ranks // size, place // size, place % size == 0

    # Weights

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `RolloutEngine.update_weights`. Raises RolloutError for missing or unknown tensors; then there are no weights."""
        self._weights_version = None
        if self._asleep:
            self._llm.wake_up(tags=["weights"])
        seen: set[str] = set()

        def noted() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tensors:
                seen.add(name)
                yield name, tensor

        (unfilled,) = set(self._llm.collective_rpc("load_prism_weights", args=(noted(),)))
        if unfilled or seen != self._names:
            wrong = sorted(seen ^ self._names) or sorted(unfilled)
            raise RolloutError(
                f"{len(wrong)} tensors are missing or unknown, {wrong[0]} among them",
                where="rollout.engine",
                remedy="the engine must be of the policy's own model",
            )
        # All that was computed by the old weights: keys and values, features of images.
        self._llm.reset_prefix_cache()
        self._llm.reset_mm_cache()
        self._llm.llm_engine.reset_encoder_cache()
        self._weights_version = version

    def sleep(self) -> bool:
        """Gives the GPU's memory back, weights included: they must be updated before more is generated. Nothing on a CPU."""
        if self._model.device.type == "cpu":
            return True
        self._llm.sleep(level=2)
        self._asleep, self._weights_version = True, None
        return False

    def wake_up(self) -> None:
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False

    # Generation

    def generate(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingParams, *, num_rollouts_per_prompt: int, seeds: Sequence[int]
    ) -> list[Rollout]:
        """See `RolloutEngine.generate`.

        Raises RolloutError when logits are not finite, for a prompt whose image tokens are not those of its images, for one that
        is too long, and without weights.
        """
        assert len(seeds) == len(prompts) * num_rollouts_per_prompt, "one seed per rollout"
        if self._weights_version is None:
            raise RolloutError("the engine has no weights", where="rollout", remedy="call update_weights first")
        numbers = [
            index * num_rollouts_per_prompt + member
            for index in range(self._number, len(prompts), self._num_engines)
            for member in range(num_rollouts_per_prompt)
        ]
        inputs = {index: self._input(prompts[index], sampling) for index in {n // num_rollouts_per_prompt for n in numbers}}
        requests = [_Request(n, n // num_rollouts_per_prompt, prompts[n // num_rollouts_per_prompt]) for n in numbers]
        self._run(requests, inputs, sampling, seeds)
        return self._share([(request.number, self._rollout(request)) for request in requests])

    def _run(self, requests: Sequence[_Request], inputs: dict[int, Any], sampling: SamplingParams, seeds: Sequence[int]) -> None:
        """Generates until every response has ended or time is up."""
        engine = self._llm.llm_engine
        self._calls += 1
        shared = self._config.vllm.draws is Draws.shared
        running = {}
        for request in requests:
            identifier = f"{self._calls}-{request.number}"
            parameters = self._parameters(sampling, seeds[request.number], request.number if shared else None)
            engine.add_request(identifier, inputs[request.prompt_index], parameters)
            running[identifier] = request
        limit = sampling.time_limit_seconds
        deadline = float("inf") if limit is None else time.monotonic() + limit
        try:
            while running and (time.monotonic() < deadline or not all(request.tokens for request in running.values())):
                for output in engine.step():
                    if _take(running[output.request_id], output):
                        del running[output.request_id]
        except BaseException:
            engine.abort_request(list(running))
            raise
        if running:
            engine.abort_request(list(running))
            for request in running.values():
                request.finish_reason = "timeout"
        if shared:
            drawn = self._llm.collective_rpc("take_prism_log_probs")[0]
            for request in requests:
                request.log_probs = drawn.get(request.number, [])[: len(request.tokens)]

    def _parameters(self, sampling: SamplingParams, seed: int, draw: int | None) -> Any:
        common: dict[str, Any] = {
            "max_tokens": sampling.max_new_tokens,
            "stop_token_ids": [sampling.end_token_id],
            "ignore_eos": True,
            "detokenize": False,
            "output_kind": RequestOutputKind.DELTA,
        }
        if draw is not None:
            return vllm.SamplingParams(temperature=0.0, extra_args={_DRAW: (draw, seed, sampling)}, **common)
        return vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=seed,
            logprobs=0,
            logit_bias=dict.fromkeys(sampling.banned_token_ids, _LEAST_BIAS) or None,
            **common,
        )

    def _input(self, prompt: EncodedPrompt, sampling: SamplingParams) -> Any:
        """A prompt in vLLM's own words. Videos are their frames: what makes one patch in time is an image."""
        ids = prompt.input_ids.tolist()
        if len(ids) + sampling.max_new_tokens > self._model.max_length:
            raise RolloutError(
                f"a prompt of {len(ids)} tokens and {sampling.max_new_tokens} more do not fit into {self._model.max_length}",
                where="data.max_prompt_length, data.max_response_length",
            )
        patches = prompt.image_grid_thw.prod(dim=1).tolist()
        ranges = _image_ranges(prompt, [count // self._merge for count in patches])
        if not ranges:
            return tokens_input(ids)
        fields = {
            "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", torch.tensor(patches)),
            "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }
        data = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
        hashes = [
            hashlib.blake2b(f"{grid} {pixels.numel()}".encode() + pixels.numpy().tobytes(), digest_size=16).hexdigest()
            for grid, pixels in zip(prompt.image_grid_thw.tolist(), prompt.pixel_values.split(patches), strict=True)
        ]
        return mm_input(ids, MultiModalKwargsItems.from_hf_inputs(data, fields), {"image": hashes}, {"image": ranges})

    def _rollout(self, request: _Request) -> Rollout:
        log_probs = torch.tensor(request.log_probs, dtype=torch.float32)
        if not bool(log_probs.isfinite().all()):
            raise RolloutError(
                "the policy's logits are not finite: there is nothing to sample from",
                where="rollout",
                remedy="look at the loss and gradient norm of the steps before; a lower optimizer.lr or clip_grad helps",
            )
        assert request.finish_reason is not None and len(log_probs) == len(request.tokens)
        assert self._weights_version is not None
        tokens = torch.tensor(request.tokens, dtype=torch.int64)
        return Rollout(request.prompt_index, tokens, log_probs, request.finish_reason, self._weights_version)

    def _share(self, mine: list[tuple[int, Rollout]]) -> list[Rollout]:
        """All rollouts in order, on every rank of the model."""
        parts = [mine]
        if self._model.group is not None:
            parts *= self._model.group.size()
            dist.all_gather_object(parts, mine if self._speaks else [], group=self._model.group)
        return [rollout for _, rollout in sorted((pair for part in parts for pair in part), key=lambda pair: pair[0])]


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
    if settings.draws is Draws.shared:
        options["logits_processors"] = [SharedDraws]
    if dist.is_initialized() and dist.get_world_size() > 1:
        options["distributed_executor_backend"] = "external_launcher"
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
        logprobs_mode="processed_logprobs",
        worker_extension_cls=f"{__name__}.WorkerExtension",
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


@contextmanager
def _random_state_kept() -> Iterator[None]:
    """vLLM seeds every generator as it starts, and exempts all that is alive from garbage collection."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)
        gc.unfreeze()


def _take(request: _Request, output: Any) -> bool:
    """Adds what a step of the engine gave; whether the response has ended."""
    if output.prompt_token_ids is not None and list(output.prompt_token_ids) != request.prompt.input_ids.tolist():
        raise RolloutError(f"vLLM sampled after other tokens than those of prompt {request.prompt_index}", where="rollout.engine")
    (completion,) = output.outputs
    tokens = list(completion.token_ids)
    request.tokens += tokens
    if completion.logprobs is not None:
        request.log_probs += [found[token].logprob for token, found in zip(tokens, completion.logprobs, strict=True)]
    if not output.finished:
        return False
    if completion.finish_reason not in ("stop", "length"):
        raise RolloutError(f"vLLM ended a response for the reason {completion.finish_reason!r}", where="rollout.engine")
    request.finish_reason = completion.finish_reason
    return True


def _image_ranges(prompt: EncodedPrompt, lengths: Sequence[int]) -> list[Any]:
    """Where the tokens of every image stand.

    Raises RolloutError when there are more or fewer than its patches make: vLLM would take them without a word.
    """
    places = prompt.image_mask.nonzero().flatten().tolist()
    ranges, first = [], 0
    for length in lengths:
        own = places[first : first + length]
        if len(own) != length or own[-1] - own[0] != length - 1:
            break
        ranges.append(PlaceholderRange(offset=own[0], length=length))
        first += length
    if first != len(places) or len(ranges) != len(lengths):
        raise RolloutError(
            f"the prompt has {len(places)} image tokens, its images make {', '.join(map(str, lengths)) or 'none'}",
            where="rollout",
            remedy="expand every image token exactly once (data/chat.py does)",
        )
    return ranges


class WorkerExtension:
    """Methods that vLLM adds to its worker, which holds the model."""

    model_runner: Any

    def load_prism_weights(self, tensors: Iterator[tuple[str, Tensor]]) -> frozenset[str]:
        """Fills the model from HuggingFace's tensors; the parameters that were not."""
        model = self.model_runner.get_model()
        expected = {name for name, _ in model.named_parameters()}
        packs_experts = [module for module in model.modules() if hasattr(getattr(module, "quant_method", None), "moe_kernel")]
        if current_platform.is_cpu() and not packs_experts:
            with torch.no_grad():
                return frozenset(expected - model.load_weights(tensors))  # in place: see `_start`
        if current_platform.is_cpu():  # experts are packed only as their kernel is made
            for module in packs_experts:
                module.quant_method.moe_kernel = None
        initialize_layerwise_reload(model)
        try:
            loaded = model.load_weights(tensors)
        finally:  # or what was not loaded stays without storage
            finalize_layerwise_reload(model, self.model_runner.model_config)
        return frozenset(expected - loaded)

    def take_prism_log_probs(self) -> dict[int, list[float]]:
        """By rollout, what `SharedDraws` drew since the last time."""
        found = [one for one in self.model_runner.input_batch.logitsprocs.all if isinstance(one, SharedDraws)]
        return found[0].take()


class SharedDraws(LogitsProcessor):
    """Draws tokens from logits as the Megatron engine does: the same seeds give the same rollouts on either.

    The token drawn is all that it leaves possible, so that vLLM takes it; the log-probabilities are its own.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._device = device
        self._rows: dict[int, tuple[tuple[int, int, SamplingParams], list[int]]] = {}
        self._log_probs: dict[int, list[float]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Keeps track of which request is in which row."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._rows.pop(row, None)
        for row, parameters, _, output in batch_update.added:
            self._rows.pop(row, None)
            draw = (parameters.extra_args or {}).get(_DRAW)
            if draw is not None:
                self._rows[row] = draw, output
        for source, target, kind in batch_update.moved:
            moved, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if replaced is not None and kind is MoveDirectionality.SWAP:
                self._rows[source] = replaced

    def apply(self, logits: Tensor) -> Tensor:
        """logits float32 [B, V]: -inf but at the token that is drawn."""
        rows = [row for row in self._rows if row < logits.shape[0]]
        if not rows:
            return logits
        sampling = self._rows[rows[0]][0][2]  # one call, one way to sample
        seeds = np.array([self._rows[row][0][1] for row in rows], dtype=np.uint64)
        steps = np.array([len(self._rows[row][1]) for row in rows])
        uniform = torch.from_numpy(uniforms(seeds, steps)).to(self._device)
        tokens, log_probs = Sampler(sampling, self._device)(logits[rows], uniform)
        for row, step, value in zip(rows, steps.tolist(), log_probs.tolist(), strict=True):
            known = self._log_probs.setdefault(self._rows[row][0][0], [])
            known[step:] = [value]  # a token of a response that was put back is drawn again
        logits[rows] = float("-inf")
        logits[rows, tokens] = 0.0
        return logits

    def take(self) -> dict[int, list[float]]:
        taken, self._log_probs = self._log_probs, {}
        return taken
