"""Keys and values while decoding: a prompt's once for all of its rollouts, and every rollout's own.

Shape legend: P prompts of the batch, R rollouts a prompt, H query heads, G key/value heads (H = G * J), D head dimension, L the
longest prompt, B sequences that are decoded, T >= B tokens of a row (padding at the end), n tokens generated so far.

The linear layers see a row of exactly the B sequences that are still decoded. Attention sees them as a rectangle of P x R slots,
so that all queries of a prompt meet its keys in one matrix product; where prompts have unequal numbers of sequences left, some
slots repeat a sequence and nothing reads them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from prism_nemo.engine.attention import ImageAttention, RowAttention

_FIRST_CAPACITY = 32  # tokens; doubled whenever they are used up


class PromptCache:
    """Collects the prompts' keys and values as packed rows of prompts, without segments, run through the model."""

    def __init__(self, lengths: list[int], *, dtype: torch.dtype, device: torch.device) -> None:
        self.lengths = torch.tensor(lengths, device=device)
        self.layers: dict[int, Tensor] = {}  # by layer number, each [2 (keys, values), P, G, L, D]; zeros behind a prompt's end
        self._dtype = dtype
        self._prompts = range(0)

    def expect(self, prompts: range) -> None:
        """The next row holds these prompts (their indices among all)."""
        self._prompts = prompts
        lengths = self.lengths[prompts.start : prompts.stop]
        offset = torch.arange(int(lengths.max()), device=lengths.device)
        starts = (lengths.cumsum(0) - lengths).unsqueeze(1)
        self._index = torch.where(offset < lengths.unsqueeze(1), starts + offset, starts)  # [row's prompts, row's longest]

    def attend(
        self,
        layer_number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        attention: RowAttention | ImageAttention | None,
    ) -> Tensor:
        """Attention within the row, [T, H, D]; its keys and values are kept."""
        assert attention is not None
        whole = self.layers.get(layer_number)
        if whole is None:
            shape = (2, self.lengths.numel(), key.shape[1], int(self.lengths.max()), key.shape[2])
            whole = self.layers[layer_number] = torch.zeros(shape, dtype=self._dtype, device=key.device)
        part = whole[:, self._prompts.start : self._prompts.stop, :, : self._index.shape[1]]
        for kept, new in zip(part, (key, value), strict=True):
            kept.copy_(new[self._index].transpose(1, 2))
        return attention(query, key, value, scale)


@dataclass(frozen=True, eq=False)
class _Slots:
    """Where the sequences stand in the rectangle."""

    prompts: int  # P
    rollouts: int  # R
    source: Tensor | None  # int64 [P * R]: the sequence in every slot; None: sequence i is in slot i
    place: Tensor | None  # int64 [B]: the slot of every sequence

    @classmethod
    def arrange(cls, prompt_of: Tensor) -> tuple[_Slots, Tensor]:
        """Slots for sequences whose prompts are int64 [B], those of a prompt together, and which prompts they are, int64 [P]."""
        prompts, counts = torch.unique_consecutive(prompt_of, return_counts=True)
        rollouts = int(counts.max())
        if rollouts * prompts.numel() == prompt_of.numel():
            return cls(prompts.numel(), rollouts, None, None), prompts
        first = counts.cumsum(0) - counts
        offset = torch.arange(rollouts, device=counts.device)
        filled = offset < counts.unsqueeze(1)
        source = torch.where(filled, first.unsqueeze(1) + offset, first.unsqueeze(1))
        return cls(prompts.numel(), rollouts, source.flatten(), filled.flatten().nonzero().flatten()), prompts

    def spread(self, tokens: Tensor, groups: int) -> Tensor:
        """[T, heads, D] -> [P, G, R, heads / G, D]."""
        size = self.prompts * self.rollouts
        slots = tokens[:size] if self.source is None else tokens.index_select(0, self.source)
        return slots.view(self.prompts, self.rollouts, groups, -1, tokens.shape[-1]).transpose(1, 2)

    def collect(self, slots: Tensor) -> Tensor:
        """[P, G, R, J, D] -> [B, H, D]."""
        tokens = slots.transpose(1, 2).reshape(self.prompts * self.rollouts, -1, slots.shape[-1])
        return tokens if self.place is None else tokens.index_select(0, self.place)


class DecodeCache:
    """Attention of one new token a sequence over [its prompt | what it generated before | itself].

    Scores and their softmax are fp32 whatever the model's precision, as in the trainer's attention; `dtype`, in which keys and
    values are kept, decides memory (and on the CPU, where fp32 products are no slower than bf16 ones, speed).
    """

    def __init__(self, prompt_cache: PromptCache, prompt_of: Tensor) -> None:
        """`prompt_of` int64 [B]: the prompt of every sequence, those of a prompt together."""
        self._slots, prompts = _Slots.arrange(prompt_of)
        self._set_prompts(prompt_cache.lengths, prompt_cache.layers, prompts)
        self._prompt_of = torch.unique_consecutive(prompt_of, return_inverse=True)[1]
        self._own: dict[int, Tensor] = {}  # by layer number, each [2, P * G * R, capacity, D]
        self._count = 0  # n

    def _set_prompts(self, lengths: Tensor, layers: dict[int, Tensor], prompts: Tensor) -> None:
        everything = prompts.numel() == lengths.numel()
        self._lengths = lengths[prompts]
        longest = int(self._lengths.max())
        if everything:
            self._prompt_layers = layers
        else:
            self._prompt_layers = {number: layer[:, prompts, :, :longest].contiguous() for number, layer in layers.items()}
        behind = torch.arange(longest, device=lengths.device) >= self._lengths.unsqueeze(1)
        self._behind = behind[:, None] if bool(behind.any()) else None  # bool [P, 1, L]: what no query sees

    def advance(self) -> None:
        """The tokens of the last forward pass count as generated."""
        self._count += 1

    def keep(self, sequences: Tensor) -> None:
        """Drops all but these sequences (int64 [B'], ascending) and the prompts that nobody needs any more."""
        old, old_prompt_of = self._slots, self._prompt_of
        prompt_of = old_prompt_of[sequences]
        slot_of = sequences if old.place is None else old.place[sequences]  # in the old rectangle
        self._slots, prompts = _Slots.arrange(prompt_of)
        slot = slot_of if self._slots.source is None else slot_of[self._slots.source]
        slot = slot.view(-1, 1, self._slots.rollouts)  # [P', 1, R']
        for number, own in self._own.items():
            groups = own.shape[1] // (old.prompts * old.rollouts)
            group = torch.arange(groups, device=slot.device).view(1, -1, 1)
            row = (slot // old.rollouts * groups + group) * old.rollouts + slot % old.rollouts
            self._own[number] = own.index_select(1, row.flatten())
        self._set_prompts(self._lengths, self._prompt_layers, prompts)
        self._prompt_of = torch.unique_consecutive(prompt_of, return_inverse=True)[1]

    def attend(
        self,
        layer_number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        attention: RowAttention | ImageAttention | None,
    ) -> Tensor:
        """[T, H, D]: zeros for padding."""
        slots, prompt = self._slots, self._prompt_layers[layer_number]
        groups, dim = key.shape[1:]
        batch = slots.prompts * groups
        own = self._append(layer_number, slots.spread(key, groups), slots.spread(value, groups))
        longest, count = prompt.shape[3], own.shape[2]
        spread = (slots.spread(query, groups).float() * scale).reshape(batch, -1, dim)  # [P * G, R * J, D]
        apart = (batch * slots.rollouts, -1, dim)  # [P * G * R, J, D]

        scores = torch.empty(batch, spread.shape[1], longest + count, device=query.device)
        torch.bmm(spread, prompt[0].flatten(0, 1).float().transpose(1, 2), out=scores[:, :, :longest])
        if self._behind is not None:
            scores.view(slots.prompts, -1, longest + count)[:, :, :longest].masked_fill_(self._behind, float("-inf"))
        own_scores = torch.bmm(spread.view(apart), own[0].float().transpose(1, 2))  # many and small: slow with a strided `out`
        scores.view(batch * slots.rollouts, -1, longest + count)[:, :, longest:] = own_scores
        weights = scores.softmax(dim=-1)

        out = torch.bmm(weights[:, :, :longest], prompt[1].flatten(0, 1).float()).view(apart)
        own_weights = weights.view(batch * slots.rollouts, -1, longest + count)[:, :, longest:]
        out = torch.baddbmm(out, own_weights, own[1].float())
        result = slots.collect(out.view(slots.prompts, groups, slots.rollouts, -1, dim)).to(query.dtype)
        padding = query.shape[0] - result.shape[0]
        return result if padding == 0 else torch.cat([result, result.new_zeros(padding, *result.shape[1:])])

    def _append(self, layer_number: int, key: Tensor, value: Tensor) -> Tensor:
        """Writes the new token's key and value [P, G, R, 1, D]; all own ones so far, [2, P * G * R, n + 1, D]."""
        own = self._own.get(layer_number)
        rows, dim = key.shape[:3].numel(), key.shape[-1]
        if own is None or own.shape[2] == self._count:
            capacity = max(_FIRST_CAPACITY, 2 * self._count)
            grown = torch.empty(2, rows, capacity, dim, dtype=self._prompt_layers[layer_number].dtype, device=key.device)
            if own is not None:
                grown[:, :, : self._count] = own
            own = self._own[layer_number] = grown
        for kept, new in zip(own, (key, value), strict=True):
            kept[:, self._count] = new.reshape(rows, dim)
        return own[:, :, : self._count + 1]
