"""The exact rollout engine: samples from the very model that is trained, on whatever device and layout it is trained on.

Prompts run through the network once, as packed rows; then all sequences of a batch are decoded together, one token each a
forward pass, the finished ones dropped as they go.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from prism_nemo.engine.attention import RowAttention
from prism_nemo.engine.chunks import Chunks, chunks_of
from prism_nemo.engine.step import run_stages
from prism_nemo.models.context import RowContext
from prism_nemo.models.qwen3_vl.language import gather_rows
from prism_nemo.models.qwen3_vl.model import Qwen3VLModel
from prism_nemo.packing.groups import EncodedPrompt, Group
from prism_nemo.packing.rows import PackedRow, RowLayout, make_row
from prism_nemo.rollout.base import InProcessEngine, Rollout, RolloutError, SamplingParams
from prism_nemo.rollout.cache import DecodeCache, PromptCache
from prism_nemo.rollout.sampling import Sampler, uniforms
from prism_nemo.rollout.stopping import TextStops

_PROMPT_TOKENS_PER_ROW = 8192  # prompts that run together; a longer one runs alone
_COMPACT_BELOW = 0.75  # share of sequences still decoded under which the finished ones are dropped from the batch
_MAX_LOGITS = 1 << 24  # logits sampled from at a time (fp32: 64 MiB, and a few times that while sampling)


@dataclass(frozen=True, eq=False)
class _Prefilled:
    """Prompts that have run through the network."""

    cache: PromptCache
    hidden: Tensor | None  # [P, hidden] of every prompt's last token, on the last pipeline stage
    next_position: Tensor  # int64 [P]


@dataclass(frozen=True, eq=False)
class _Sampled:
    """What a batch of sequences became."""

    tokens: Tensor  # int64 [B, max_new_tokens]
    log_probs: Tensor  # float32 [B, max_new_tokens]
    lengths: np.ndarray  # int64 [B]
    stopped: np.ndarray  # bool [B]


class MegatronEngine(InProcessEngine):
    """`RolloutEngine` over an unwrapped model that this process holds together with the ranks it is cut over.

    The model is shared, not copied: an optimizer step is seen at once. Data-parallel ranks each generate for their own prompts;
    where they share experts, every rank must call `generate`, with prompts or without, for they wait for one another. Pipeline
    stages take turns at every token, and context-parallel ranks all do the same: right everywhere, fast without either.
    """

    def __init__(
        self, model: Chunks, *, device: torch.device, max_batch_size: int, decode: Callable[[Sequence[int]], str] | None = None
    ) -> None:
        """`max_batch_size`: sequences decoded together; `decode`: the text of tokens, for `SamplingParams.stop_texts`."""
        self._text_of = decode
        self._chunks: Sequence[Qwen3VLModel] = chunks_of(model)
        model = self._model = self._chunks[-1]  # on the last pipeline stage the one with the output weight
        self._device = device
        self._max_batch_size = max_batch_size
        self._tp = model.pg_collection.tp
        self._row_multiple = self._tp.size() if model.config.sequence_parallel else 1
        # bf16 products are no faster than fp32 ones on a CPU at these shapes, and would be cast each time
        self._cache_dtype = torch.float32 if device.type == "cpu" else model.config.params_dtype
        self._weights_version = -1  # none was noted yet
        self._deadline: float | None = None  # of the call, on time.monotonic()
        self._asleep = False
        idle = make_row([], pad_multiple=self._row_multiple, patch_size=model.shape.vision.patch_width)
        self._idle_row = idle.to(device)  # padding only, without images

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Notes the version. The weights are the trained model's own: `tensors` is not read, not even iterated; pass `()`.

        (An iterable that gathers tensors over ranks would therefore do nothing, on every rank alike.)
        """
        assert version >= self._weights_version, f"weights went from version {self._weights_version} back to {version}"
        self._weights_version = version

    def sleep(self) -> bool:
        """Caches live only within `generate`, so there is nothing to give back."""
        self._asleep = True
        return True

    def wake_up(self) -> None:
        self._asleep = False

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[EncodedPrompt], sampling: SamplingParams, *, num_rollouts_per_prompt: int, seeds: Sequence[int]
    ) -> list[Rollout]:
        """See `RolloutEngine.generate`. The model is in eval mode meanwhile. Raises RolloutError when logits are not finite."""
        assert not self._asleep, "generate() while asleep"
        assert len(seeds) == len(prompts) * num_rollouts_per_prompt, "one seed per rollout"
        sampler = Sampler(sampling, self._device)
        self._deadline = None if sampling.time_limit_seconds is None else time.monotonic() + sampling.time_limit_seconds
        all_seeds = np.asarray(seeds, dtype=np.uint64)
        prompts_at_once = max(1, self._max_batch_size // num_rollouts_per_prompt)
        rollouts: list[Rollout] = []
        with _eval_mode(self._chunks):
            for first in range(0, len(prompts), prompts_at_once):
                prefilled = self._prefill(prompts[first : first + prompts_at_once])
                prompt_of = np.arange(prefilled.next_position.numel()).repeat(num_rollouts_per_prompt)
                for start in range(0, len(prompt_of), self._max_batch_size):
                    batch = prompt_of[start : start + self._max_batch_size]
                    offset = first * num_rollouts_per_prompt + start
                    sampled = self._decode(prefilled, batch, sampler, all_seeds[offset : offset + len(batch)])
                    rollouts += self._rollouts(sampled, first + batch)
            self._wait_for_expert_ranks()
        return rollouts

    def _prefill(self, prompts: Sequence[EncodedPrompt]) -> _Prefilled:
        """Every prompt once, in as few rows as the limit allows."""
        cache = PromptCache([len(prompt) for prompt in prompts], dtype=self._cache_dtype, device=self._device)
        last_hidden = []
        for members in _row_ranges([len(prompt) for prompt in prompts]):
            groups = [Group(prompts[index]) for index in members]
            row = make_row(groups, pad_multiple=self._row_multiple).to(self._device)
            cache.expect(members)
            context = RowContext(attention=RowAttention(row.layout, self._device), cache=cache)
            ends = cache.lengths[members.start : members.stop].cumsum(0) - 1
            hidden = self._forward(row, context)
            if hidden is not None:
                last_hidden.append(gather_rows(hidden, ends, self._model.config, self._tp))
        positions = torch.tensor([prompt.next_position for prompt in prompts], device=self._device)
        return _Prefilled(cache, torch.cat(last_hidden) if last_hidden else None, positions)

    def _decode(self, prefilled: _Prefilled, prompt_of: np.ndarray, sampler: Sampler, seeds: np.ndarray) -> _Sampled:
        """Samples until every sequence has ended; `prompt_of` int64 [B], non-decreasing, is each one's prompt."""
        limit, end = sampler.sampling.max_new_tokens, sampler.sampling.end_token_id
        size = len(prompt_of)
        result = _Sampled(
            torch.zeros(size, limit, dtype=torch.int64), torch.zeros(size, limit), np.zeros(size, np.int64), np.zeros(size, bool)
        )
        stops = self._stops(sampler.sampling)
        prompt_index = torch.from_numpy(prompt_of).to(self._device)
        cache = DecodeCache(prefilled.cache, prompt_index)
        hidden = None if prefilled.hidden is None else prefilled.hidden[prompt_index]
        position = prefilled.next_position[prompt_index]
        in_batch = np.arange(size)  # the sequences in the forward pass, finished ones among them
        running = np.ones(size, bool)  # of those in the batch, which have not ended
        for step in range(limit):
            tokens, log_probs, time_is_up = self._sample(hidden, sampler, torch.from_numpy(uniforms(seeds[in_batch], step)))
            host_tokens = tokens.cpu()
            rows = torch.from_numpy(in_batch)
            result.tokens[rows, step], result.log_probs[rows, step] = host_tokens, log_probs.cpu()
            result.lengths[in_batch[running]] = step + 1
            ended = running & ((host_tokens.numpy() == end) | stops.ended(result.tokens[rows, : step + 1]))
            result.stopped[in_batch[ended]] = True
            running &= ~ended
            if step + 1 == limit or not running.any() or time_is_up:
                break
            if running.sum() < _COMPACT_BELOW * len(running):
                kept = torch.from_numpy(running.nonzero()[0]).to(self._device)
                cache.keep(kept)
                tokens, position = tokens[kept], position[kept]
                in_batch, running = in_batch[running], running[running]
            row = self._decode_row(tokens, position + step)
            output = self._forward(row, RowContext(attention=None, cache=cache))
            cache.advance()
            if output is not None:
                hidden = gather_rows(output, torch.arange(len(in_batch), device=self._device), self._model.config, self._tp)
        _check_finite(result)
        return result

    def _stops(self, sampling: SamplingParams) -> TextStops:
        if sampling.stop_texts and self._text_of is None:
            raise RolloutError("the engine has no tokenizer, and there are texts to stop at", where="rollout.stop")
        return TextStops(sampling.stop_texts, self._text_of or str)

    def _decode_row(self, tokens: Tensor, positions: Tensor) -> PackedRow:
        """One token a sequence, each at its own position; int64 [B] both."""
        padding = -len(tokens) % self._row_multiple
        if padding:
            tokens, positions = (torch.nn.functional.pad(tensor, (0, padding)) for tensor in (tokens, positions))
        layout = RowLayout((), len(tokens))  # the cache knows what belongs together
        return replace(self._idle_row, layout=layout, input_ids=tokens, position_ids=positions.expand(3, -1))

    def _sample(self, hidden: Tensor | None, sampler: Sampler, uniform: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Tokens int64 [B] and log-probabilities float32 [B] after hidden states [B, hidden], and whether time is up.

        One rank draws and looks at the clock for all that share the sequences, so that neither rounding nor waiting can ever tell
        them apart: on the last pipeline stage (the others have no hidden states) the first tensor-parallel and context-parallel
        one.
        """
        drawn = torch.empty(2, uniform.numel() + 1, dtype=torch.float64, device=self._device)  # exact for both
        if hidden is not None:
            self._draw(drawn, hidden, sampler, uniform.to(self._device))
        groups = self._model.pg_collection
        for group, source in ((groups.cp, 0), (groups.pp, groups.pp.size() - 1)):
            if group.size() > 1:
                dist.broadcast(drawn, group=group, group_src=source)
        time_is_up = self._deadline is not None and bool(drawn[0, -1])
        return drawn[0, :-1].long(), drawn[1, :-1].float(), time_is_up

    def _draw(self, drawn: Tensor, hidden: Tensor, sampler: Sampler, uniform: Tensor) -> None:
        """Fills `drawn` with tokens and log-probabilities, on every tensor-parallel rank; its last column says if time is up."""
        drawn[:, -1] = float(self._deadline is not None and time.monotonic() >= self._deadline)
        weight = self._model.language_model.output_weight
        chunk = max(1, _MAX_LOGITS // (weight.shape[0] * self._tp.size()))
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, min(start + chunk, hidden.shape[0]))
            logits = self._gather_vocabulary((hidden[rows] @ weight.t()).float())
            if logits is not None:
                drawn[0, rows], drawn[1, rows] = sampler(logits, uniform[rows])
        if self._tp.size() > 1:
            dist.broadcast(drawn, group=self._tp, group_src=0)

    def _gather_vocabulary(self, logits: Tensor) -> Tensor | None:
        """[B, V] from every rank's [B, V / TP], on the first tensor-parallel rank."""
        if self._tp.size() == 1:
            return logits
        parts = [torch.empty_like(logits) for _ in range(self._tp.size())] if self._tp.rank() == 0 else None
        dist.gather(logits, parts, group=self._tp, group_dst=0)
        return None if parts is None else torch.cat(parts, dim=1)

    def _forward(self, row: PackedRow, context: RowContext) -> Tensor | None:
        """One forward pass, at which ranks that share experts take part together; hidden states on the last pipeline stage."""
        self._any_expert_rank_works(True)
        return self._run(row, context)

    def _run(self, row: PackedRow, context: RowContext) -> Tensor | None:
        return run_stages(self._chunks, lambda chunk: chunk.hidden_states(row, context), self._device)

    def _any_expert_rank_works(self, here: bool) -> bool:
        if self._model.config.expert_model_parallel_size == 1:
            return here
        works = torch.tensor(here, dtype=torch.int32, device=self._device)
        dist.all_reduce(works, op=dist.ReduceOp.MAX, group=self._model.pg_collection.ep)
        return bool(works)

    def _wait_for_expert_ranks(self) -> None:
        """Takes part in the other ranks' passes, with padding, until none has work left: a pass is a collective over experts."""
        context = RowContext(attention=RowAttention(self._idle_row.layout, self._device))
        while self._any_expert_rank_works(False):
            self._run(self._idle_row, context)

    def _rollouts(self, sampled: _Sampled, prompt_index: np.ndarray) -> list[Rollout]:
        return [
            Rollout(
                prompt_index=int(prompt),
                tokens=sampled.tokens[row, :length].clone(),
                log_probs=sampled.log_probs[row, :length].clone(),
                finish_reason="stop" if sampled.stopped[row] else "length" if length == sampled.tokens.shape[1] else "timeout",
                weights_version=self._weights_version,
            )
            for row, (prompt, length) in enumerate(zip(prompt_index, sampled.lengths.tolist(), strict=True))
        ]


def _row_ranges(lengths: Sequence[int]) -> Iterator[range]:
    """Consecutive prompts, cut into rows."""
    first = used = 0
    for index, length in enumerate(lengths):
        if index > first and used + length > _PROMPT_TOKENS_PER_ROW:
            yield range(first, index)
            first, used = index, 0
        used += length
    yield range(first, len(lengths))


def _check_finite(sampled: _Sampled) -> None:
    generated = torch.arange(sampled.log_probs.shape[1]) < torch.from_numpy(sampled.lengths).unsqueeze(1)
    if not bool(sampled.log_probs[generated].isfinite().all()):
        raise RolloutError(
            "the policy's logits are not finite: there is nothing to sample from",
            where="rollout",
            remedy="look at the loss and gradient norm of the steps before; a lower optimizer.lr or clip_grad helps",
        )


@contextmanager
def _eval_mode(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    training = [module for chunk in chunks for module in chunk.modules() if module.training]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
