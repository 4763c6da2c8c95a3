"""Memory of sampling with the `megatron` engine: key/value caches and what attends to them, in bytes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil

from prism_nemo.plan.activations import FP32, LOGITS_AT_A_TIME, Attention
from prism_nemo.plan.parameters import stage_layers
from prism_nemo.plan.placed import Placed
from prism_nemo.plan.workload import Workload

_FIRST_CAPACITY = 32  # rollout/cache.py
_PREFILL_TOKENS = 8192  # rollout/megatron.py
_COMPACT_BELOW = 0.75  # the same: share of sequences still running at which the others' caches are dropped


@dataclass(frozen=True)
class Decoding:
    """What sampling adds, for so many sequences at once."""

    sequences: int
    kv_cache: float
    workspace: float

    @property
    def total(self) -> float:
        return self.kv_cache + self.workspace


@lru_cache(4096)
def decoding(model: Placed, workload: Workload, sequences: int, stage: int = 0) -> Decoding:
    """`MegatronEngine`'s caches for so many sequences decoded at once: prompts once, responses in a doubling buffer."""
    shape, cost, tp = model.shape, model.settings.cost, model.parallel.tensor_model_parallel_size
    b = FP32 if cost.attention is Attention.cpu else cost.value_bytes
    prompts = ceil(sequences / workload.rollouts)
    capacity = _FIRST_CAPACITY
    while capacity < workload.response_tokens:
        capacity *= 2
    width = shape.key_width / tp
    prompt_layer = 2 * prompts * workload.prompt_tokens * width * b
    own_layer = 2 * sequences * capacity * width * b
    scores = 2 * sequences * shape.num_heads / tp * (workload.prompt_tokens + workload.response_tokens) * FP32
    # keys, then values, as fp32 copies; a layer's buffer stands beside its larger successor while it grows
    casts = 0.0 if b == FP32 else FP32 / b * max(prompt_layer, own_layer) / 2
    logits = 4 * FP32 * LOGITS_AT_A_TIME
    attending = scores + max(casts, own_layer / 2)
    cached = stage_layers(shape, model.parallel, stage) * _cached(prompt_layer, own_layer, prompts)
    return Decoding(sequences, cached, max(logits, attending, _prefill(model, workload)))


def _cached(prompts: float, own: float, count: int) -> float:
    """At the worst moment: all sequences run; or all those of some prompts have ended, and what is left of the prompts is copied
    out of the whole, once or a second time (the first copy waits for the second)."""
    if count == 1:
        return prompts + own
    once = prompts * (2 - 1 / count) + own * _COMPACT_BELOW
    twice = prompts * (3 - 3 / count) + own * _COMPACT_BELOW**2
    return max(prompts + own, once, twice)


def _prefill(model: Placed, workload: Workload) -> float:
    """The widest values of a row of prompts."""
    shape = model.shape
    tokens = max(_PREFILL_TOKENS, workload.prompt_tokens)
    width = 4 * shape.ffn_hidden_size / model.parallel.tensor_model_parallel_size
    if shape.experts is not None:
        width = 3 * shape.experts.topk * (shape.hidden_size + shape.experts.ffn_hidden_size)
    return tokens * model.settings.cost.value_bytes * (width + 4 * shape.hidden_size)


def fitting_decoding(model: Placed, workload: Workload, prompts: int, room: float | None, stage: int = 0) -> Decoding:
    """The largest halving of `max_batch_size` that fits `room` bytes; one sequence where even that does not."""
    sequences = min(workload.max_batch_size, prompts * workload.rollouts)
    while True:
        found = decoding(model, workload, sequences, stage)
        if room is None or sequences == 1 or found.total <= room:
            return found
        sequences = max(1, sequences // 2)
