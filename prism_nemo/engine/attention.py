"""Attention over packed rows: one mask, two exact implementations.

On the CPU ("split"): stretches of tokens causal on their own (a prefix; a prefix with its only segment) run as one padded
causal batch without a mask; the segments that share a prefix run as one batch over [prefix keys | own keys]. On a GPU the same
mask goes to FlexAttention as a block mask. Both equal running every `prefix + segment` alone.

Under context parallelism every rank holds a part of the row's tokens: keys and values are gathered, and each rank's own queries
see them under the same mask.

Shape legend: T tokens of a row, H query heads, G key/value heads, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from prism_nemo.packing.rows import RowLayout
from prism_nemo.packing.shards import RowShard

_MAX_MASK_ELEMENTS = 1 << 26  # one batch of segments; larger ones are cut, which changes nothing but memory


@dataclass(frozen=True)
class _Batch:
    """Stretches of tokens run as one padded batch: which row token stands at every (member, position), and what it may see."""

    query_index: Tensor  # int64 [B, L], padding repeats token 0
    key_index: Tensor  # int64 [B, K]
    mask: Tensor | None  # bool [B, 1, L, K]; None: causal
    valid: Tensor  # bool [B, L]

    def run(self, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, scale: float) -> Tensor:
        """The outputs, padding included, [B * L, H, D]."""
        batch, length = self.query_index.shape
        heads, groups = query_THD.shape[1], key_TGD.shape[1]
        query = query_THD.index_select(0, self.query_index.flatten()).view(batch, length, heads, -1).transpose(1, 2)
        key = key_TGD.index_select(0, self.key_index.flatten()).view(batch, -1, groups, query.shape[-1]).transpose(1, 2)
        value = value_TGD.index_select(0, self.key_index.flatten()).view(batch, -1, groups, query.shape[-1]).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=self.mask, is_causal=self.mask is None, scale=scale, enable_gqa=heads != groups
        )
        return out.transpose(1, 2).flatten(0, 1)


def _ranges(starts: list[int], lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Token indices [members, longest] of stretches, and which of them are real. Padding points at token 0."""
    longest = max(lengths)
    offset = torch.arange(longest).unsqueeze(0)
    start, length = torch.tensor(starts).unsqueeze(1), torch.tensor(lengths).unsqueeze(1)
    valid = offset < length
    return torch.where(valid, start + offset, 0), valid


@dataclass(frozen=True, eq=False)
class RowAttention:
    """The attention pattern of one packed row. Built once a row, used by every layer.

    With a `shard` the queries, keys and values are those of its tokens, and `cp_group` are the ranks that hold the others.
    """

    layout: RowLayout
    device: torch.device
    shard: RowShard | None = None
    cp_group: dist.ProcessGroup | None = None

    @cached_property
    def _plan(self) -> tuple[list[_Batch], Tensor]:
        """Batches, and for every row token its place in their concatenated outputs (padding: one past the end)."""
        causal_starts, causal_lengths, shared = [], [], []
        cursor = 0
        for group in self.layout.groups:
            if len(group.segments) <= 1:
                causal_starts.append(cursor)
                causal_lengths.append(group.length)
            else:
                causal_starts.append(cursor)
                causal_lengths.append(group.prefix)
                start = cursor + group.prefix
                for length in group.segments:
                    shared.append((start, length, cursor, group.prefix))
                    start += length
            cursor += group.length
        batches = [self._causal_batch(causal_starts, causal_lengths)] if causal_starts else []
        batches += [self._segment_batch(chunk) for chunk in _chunks(shared)]
        place = torch.full((self.layout.length,), sum(batch.valid.numel() for batch in batches))
        offset = 0
        for batch in batches:
            place[batch.query_index[batch.valid]] = offset + batch.valid.flatten().nonzero().flatten()
            offset += batch.valid.numel()
        return [_to(batch, self.device) for batch in batches], place.to(self.device)

    @staticmethod
    def _causal_batch(starts: list[int], lengths: list[int]) -> _Batch:
        index, valid = _ranges(starts, lengths)
        return _Batch(index, index, None, valid)

    @staticmethod
    def _segment_batch(members: list[tuple[int, int, int, int]]) -> _Batch:
        starts, lengths, prefix_starts, prefix_lengths = (list(column) for column in zip(*members, strict=True))
        query_index, valid = _ranges(starts, lengths)
        prefix_index, prefix_valid = _ranges(prefix_starts, prefix_lengths)
        longest = query_index.shape[1]
        own = torch.ones(longest, longest, dtype=torch.bool).tril().expand(len(members), 1, -1, -1)
        prefix = prefix_valid[:, None, None, :].expand(-1, 1, longest, -1)
        return _Batch(query_index, torch.cat([prefix_index, query_index], dim=1), torch.cat([prefix, own], dim=-1), valid)

    def mask_function(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Whether a query token may see a key token, bool, for indices (batch, head, query, key) as FlexAttention asks."""
        group, segment = self.layout.token_group.to(self.device), self.layout.token_segment.to(self.device)

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            same = (group[query] == group[key]) & ((segment[query] == segment[key]) | (segment[key] < 0))
            return same & (query >= key)

        return visible

    @cached_property
    def _block_mask(self) -> Any:
        """The same pattern for FlexAttention."""
        from torch.nn.attention.flex_attention import create_block_mask

        visible, length = self.mask_function(), self.layout.length
        if self.shard is None:
            return create_block_mask(visible, None, None, length, length, device=str(self.device))
        tokens = self.shard.tokens

        def visible_from_shard(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return visible(batch, head, tokens[query], key)

        return create_block_mask(visible_from_shard, None, None, tokens.numel(), length, device=str(self.device))

    def __call__(self, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, scale: float) -> Tensor:
        """Attention output [T, H, D], T: this rank's tokens. Nothing reads padding tokens; they get zeros or see one another."""
        if self.shard is not None:
            key_TGD, value_TGD = self._gather(torch.cat([key_TGD, value_TGD], dim=-1)).chunk(2, dim=-1)
        if query_THD.is_cuda:
            return self._flex(query_THD, key_TGD, value_TGD, scale)
        if self.shard is not None:
            return self._masked(query_THD, key_TGD, value_TGD, scale)
        batches, place = self._plan
        outputs = [batch.run(query_THD, key_TGD, value_TGD, scale) for batch in batches]
        if self.layout.padding:
            outputs.append(query_THD.new_zeros(1, *query_THD.shape[1:]))
        return torch.cat(outputs).index_select(0, place)

    def _gather(self, tensor: Tensor) -> Tensor:
        """[T / ranks, ...] of this rank's tokens -> [T, ...] in the row's order; gradients are summed over the ranks."""
        assert self.shard is not None
        return gather_from_sequence_parallel_region(tensor, group=self.cp_group).index_select(0, self.shard.row_order)

    def _masked(self, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, scale: float) -> Tensor:
        """The shard's queries against the whole row, under the mask written out; a bounded number of queries at a time."""
        assert self.shard is not None
        visible, zero = self.mask_function(), torch.zeros((), dtype=torch.int64)
        keys = torch.arange(self.layout.length, device=self.device)
        key, value = key_TGD.transpose(0, 1).unsqueeze(0), value_TGD.transpose(0, 1).unsqueeze(0)
        size = max(1, _MAX_MASK_ELEMENTS // self.layout.length)
        outputs = []
        for tokens, query in zip(self.shard.tokens.split(size), query_THD.split(size), strict=True):
            mask = visible(zero, zero, tokens.unsqueeze(1), keys.unsqueeze(0))
            out = F.scaled_dot_product_attention(
                query.transpose(0, 1).unsqueeze(0),
                key,
                value,
                attn_mask=mask,
                scale=scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            outputs.append(out.squeeze(0).transpose(0, 1))
        return torch.cat(outputs)

    def _flex(self, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, scale: float) -> Tensor:
        query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (query_THD, key_TGD, value_TGD))
        out = _flex_attention()(
            query, key, value, block_mask=self._block_mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        return out.squeeze(0).transpose(0, 1)


def _chunks(members: list[tuple[int, int, int, int]]) -> list[list[tuple[int, int, int, int]]]:
    """Segments sorted by length (less padding) and cut so that one batch's mask stays below the limit."""
    chunks: list[list[tuple[int, int, int, int]]] = []
    longest = widest = 0
    for member in sorted(members, key=lambda item: (item[1], item[0])):
        longest, widest = max(longest, member[1]), max(widest, member[3])
        if not chunks or (len(chunks[-1]) + 1) * longest * (longest + widest) > _MAX_MASK_ELEMENTS:
            chunks.append([])
            longest, widest = member[1], member[3]
        chunks[-1].append(member)
    return chunks


def _to(batch: _Batch, device: torch.device) -> _Batch:
    mask = batch.mask.to(device) if batch.mask is not None else None
    return _Batch(batch.query_index.to(device), batch.key_index.to(device), mask, batch.valid.to(device))


_compiled_flex: Any = None


def _flex_attention() -> Any:
    """FlexAttention, compiled once a process: uncompiled it materialises all scores."""
    global _compiled_flex
    if _compiled_flex is None:
        from torch.nn.attention.flex_attention import flex_attention

        _compiled_flex = torch.compile(flex_attention, dynamic=True)
    return _compiled_flex


@dataclass(frozen=True, eq=False)
class ImageAttention:
    """Bidirectional attention within every image (every frame), images of one size as one batch."""

    lengths: tuple[int, ...]
    device: torch.device

    @cached_property
    def _plan(self) -> tuple[list[Tensor], Tensor]:
        starts = torch.tensor([0, *self.lengths]).cumsum(0)
        by_length: dict[int, list[int]] = {}
        for image, length in enumerate(self.lengths):
            by_length.setdefault(length, []).append(int(starts[image]))
        indices = [torch.tensor(s).unsqueeze(1) + torch.arange(length) for length, s in by_length.items()]
        order = torch.cat([index.flatten() for index in indices])
        return [index.to(self.device) for index in indices], torch.argsort(order).to(self.device)

    def __call__(self, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, scale: float) -> Tensor:
        """Attention output [T, H, D]."""
        indices, place = self._plan
        outputs = []
        for index in indices:
            query, key, value = (tensor[index].transpose(1, 2) for tensor in (query_THD, key_TGD, value_TGD))
            out = F.scaled_dot_product_attention(query, key, value, scale=scale)
            outputs.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, place)
