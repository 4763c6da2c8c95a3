"""The planner's sampling memory and log-probability workspace against what the engine's own code allocates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.rows import one_rank
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from prism_nemo.config.schema import ParallelConfig
from prism_nemo.engine import logprobs
from prism_nemo.plan import activations
from prism_nemo.plan.activations import Attention, Cost, Row, logits_workspace
from prism_nemo.plan.decoding import decoding
from prism_nemo.plan.placed import Placed, Settings
from prism_nemo.plan.shapes import Shape, read_shape
from prism_nemo.plan.workload import Workload
from prism_nemo.rollout.cache import DecodeCache, PromptCache

WORK = Workload("rlvr", 100, 50, 40, rollouts=4, global_batch=8, row_tokens=500, max_batch_size=64)
LAYERS, HEADS, GROUPS, DIM = 3, 4, 2, 8


def tiny() -> Shape:
    return replace(read_shape("2B"), num_layers=LAYERS, num_heads=HEADS, num_kv_heads=GROUPS, head_dim=DIM)


def predicted(sequences: int, work: Workload, dtype: torch.dtype) -> float:
    # what the CPU keeps is fp32; bf16 is the GPU's
    cost = Cost(attention=Attention.cpu if dtype is torch.float32 else Attention.gpu)
    return decoding(Placed(tiny(), ParallelConfig(), Settings(cost)), work, sequences).kv_cache


def no_attention(query: torch.Tensor, *_: Any) -> torch.Tensor:
    return query  # the caches keep keys and values whatever it gives


def cached(*caches: PromptCache | DecodeCache) -> int:
    """Bytes of the distinct buffers that the caches hold."""
    tensors = [tensor for cache in caches for tensor in vars(cache).values()]
    layers = [layer for found in tensors if isinstance(found, dict) for layer in found.values()]
    return sum({layer.untyped_storage().data_ptr(): layer.untyped_storage().nbytes() for layer in layers}.values())


def prefilled(prompts: int, length: int, dtype: torch.dtype) -> PromptCache:
    cache = PromptCache([length] * prompts, dtype=dtype, device=torch.device("cpu"))
    cache.expect(range(prompts))
    key = torch.zeros(prompts * length, GROUPS, DIM, dtype=dtype)
    for layer in range(LAYERS):
        cache.attend(layer, key.repeat(1, HEADS // GROUPS, 1), key, key, 1.0, no_attention)  # type: ignore[arg-type]
    return cache


def decode(cache: DecodeCache, sequences: int, steps: int, dtype: torch.dtype) -> None:
    key = torch.zeros(sequences, GROUPS, DIM, dtype=dtype)
    for _ in range(steps):
        for layer in range(LAYERS):
            cache.attend(layer, key.repeat(1, HEADS // GROUPS, 1), key, key, 1.0, None)
        cache.advance()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("length", [20, 50, 64, 100])
def test_caches_are_exactly_as_large(length: int, dtype: torch.dtype) -> None:
    """8 sequences of 2 prompts; buffers for responses double from 32. The last token of a response is never attended to."""
    prompt_cache = prefilled(2, 10, dtype)
    cache = DecodeCache(prompt_cache, torch.arange(2).repeat_interleave(4))
    decode(cache, 8, length - 1, dtype)
    assert cached(prompt_cache, cache) == predicted(8, replace(WORK, prompt_tokens=10, response_tokens=length), dtype)


def test_copies_of_the_prompts_that_are_left_count() -> None:
    """Long prompts, short responses: the worst moment is when prompts have ended and the rest is copied out of the whole."""
    work = replace(WORK, prompt_tokens=100, response_tokens=20, rollouts=2)
    prompt_cache = prefilled(8, 100, torch.float32)
    cache = DecodeCache(prompt_cache, torch.arange(8).repeat_interleave(2))
    decode(cache, 16, 10, torch.float32)
    running = cached(prompt_cache, cache)
    cache.keep(torch.arange(2, 14))  # 12 of 16: as many as compaction leaves at most; two prompts have ended
    left = cached(prompt_cache, cache)
    before = dict(cache._prompt_layers)  # lives on until the next copy is made
    cache.keep(torch.arange(2, 10))
    again = cached(prompt_cache, cache) + sum(tensor.nbytes for tensor in before.values())
    assert running < left < again <= predicted(16, work, torch.float32) < 1.25 * again


# Log-probabilities


class Peak(TorchDispatchMode):
    """The most bytes that tensors made under it held at once, beside those of `given`."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self._given = {tensor.untyped_storage()._cdata for tensor in given}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._given:
                self._alive.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self._alive.values()))
        return result


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)


@pytest.fixture
def alone() -> Any:
    one_rank()
    return torch.distributed.group.WORLD


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("vocabulary", "chunk"), [(4096, 1 << 14), (512, 1 << 18)], ids=["weight", "chunks"])
def test_the_log_probabilities_workspace(
    vocabulary: int, chunk: int, dtype: torch.dtype, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between 5% less and what a token's few numbers add: the weight's gradient summed in fp32 where the weight is large, in
    backward; chunks of logits where they are, in forward."""
    monkeypatch.setattr(logprobs, "_CHUNK_LOGITS", chunk)
    monkeypatch.setattr(activations, "LOGITS_AT_A_TIME", chunk)
    labels, hidden_size = 1024, 64
    hidden = torch.randn(labels, hidden_size, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocabulary, hidden_size, dtype=dtype, requires_grad=True)
    with Peak(hidden, weight) as peak:
        log_probs, _ = logprobs.label_log_probs(hidden, weight, torch.zeros(labels, dtype=torch.int64), alone)
        log_probs.sum().backward()
    shape = replace(read_shape("2B"), vocab_size=vocabulary, hidden_size=hidden_size)
    cost = Cost(value_bytes=dtype.itemsize)
    expected = logits_workspace(shape, Row(labels, 0, labels), ParallelConfig(), cost)
    of_tokens = labels * (hidden_size * dtype.itemsize + 40)  # the gradient of hidden; labels, their mask, normalizers
    assert 0.95 * expected < peak.bytes < expected + of_tokens
