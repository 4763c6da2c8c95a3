"""The decoding cache against attention written out for every sequence alone, while sequences and prompts drop out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from prism_nemo.engine.attention import RowAttention
from prism_nemo.packing.rows import GroupLayout, RowLayout
from prism_nemo.rollout.cache import DecodeCache, PromptCache

CPU = torch.device("cpu")
HEADS, GROUPS, DIM, LAYERS = 6, 2, 8, 2
SCALE = 0.3


def attend_alone(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One query [H, D] over keys and values [n, G, D], in float64."""
    out = torch.empty_like(query, dtype=torch.float64)
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        weight = (keys[:, group].double() @ query[head].double() * SCALE).softmax(dim=0)
        out[head] = weight @ values[:, group].double()
    return out


class Case:
    """Random keys and values, kept per sequence in plain lists beside the cache."""

    def __init__(
        self, lengths: list[int], prompt_of: list[int], rows: list[range], dtype: torch.dtype, kept: torch.dtype
    ) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.dtype = dtype
        self.prompts = PromptCache(lengths, dtype=kept, device=CPU)
        stores: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(LAYERS)]
        for members in rows:
            own = [lengths[index] for index in members]
            attention = RowAttention(RowLayout(tuple(GroupLayout(length, ()) for length in own), padding=3), CPU)
            self.prompts.expect(members)
            for layer in range(LAYERS):
                query, key, value = (self.random(sum(own) + 3, heads) for heads in (HEADS, GROUPS, GROUPS))
                out = self.prompts.attend(layer + 1, query, key, value, SCALE, attention)
                torch.testing.assert_close(out, attention(query, key, value, SCALE))
                stores[layer] += zip(key[: sum(own)].split(own), value[: sum(own)].split(own), strict=True)
        self.keys = [[store[prompt][0] for prompt in prompt_of] for store in stores]
        self.values = [[store[prompt][1] for prompt in prompt_of] for store in stores]
        self.cache = DecodeCache(self.prompts, torch.tensor(prompt_of))

    def random(self, tokens: int, heads: int) -> Tensor:
        return torch.randn(tokens, heads, DIM, generator=self.generator).to(self.dtype)

    def keep(self, sequences: list[int]) -> None:
        self.cache.keep(torch.tensor(sequences))
        self.keys, self.values = (
            [[layer[index] for index in sequences] for layer in store] for store in (self.keys, self.values)
        )

    def step(self, tolerance: float, padding: int = 0) -> None:
        size = len(self.keys[0])
        for layer in range(LAYERS):
            query, key, value = (self.random(size + padding, heads) for heads in (HEADS, GROUPS, GROUPS))
            out = self.cache.attend(layer + 1, query, key, value, SCALE, None)
            assert out.dtype == self.dtype
            assert (out[size:] == 0).all()
            for index in range(size):
                self.keys[layer][index] = torch.cat([self.keys[layer][index], key[index : index + 1]])
                self.values[layer][index] = torch.cat([self.values[layer][index], value[index : index + 1]])
                expected = attend_alone(query[index], self.keys[layer][index], self.values[layer][index])
                torch.testing.assert_close(out[index].double(), expected, atol=tolerance, rtol=tolerance)
        self.cache.advance()


LENGTHS = [5, 9, 1, 7]
PROMPT_OF = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
FULL_PRECISION = (torch.float32, torch.float32, 1e-5)
MIXED = (torch.bfloat16, torch.float32, 4e-3)  # bf16's rounding of the result is all that is left
HALF = (torch.bfloat16, torch.bfloat16, 4e-3)


@pytest.mark.parametrize(("dtype", "kept", "tolerance"), [FULL_PRECISION, MIXED, HALF])
def test_sequences_and_prompts_drop_out(dtype: torch.dtype, kept: torch.dtype, tolerance: float) -> None:
    case = Case(LENGTHS, PROMPT_OF, [range(3), range(3, 4)], dtype, kept)
    case.step(tolerance)
    case.step(tolerance, padding=2)
    case.keep([0, 2, 3, 4, 5, 9, 11])  # two of prompt 0, all of prompt 1, none of prompt 2 (the shortest), two of prompt 3
    case.step(tolerance)
    case.step(tolerance, padding=1)
    case.keep([0, 2, 4, 6])  # prompts 0, 1, 1, 3
    case.step(tolerance)
    case.keep([0, 3])  # one of prompt 0 and one of prompt 3: a full rectangle again, without the longest prompt
    case.step(tolerance)
    case.keep([1])
    case.step(tolerance)


def test_more_tokens_than_the_first_buffer_holds() -> None:
    case = Case([3, 2], [0, 0, 1], [range(2)], torch.float32, torch.float32)
    for step in range(70):
        if step == 40:
            case.keep([1, 2])
        case.step(1e-5)


def test_dropping_out_before_the_first_token_and_unequal_numbers_from_the_start() -> None:
    case = Case(LENGTHS, [0, 1, 1, 1, 3], [range(4)], torch.float32, torch.float32)
    case.keep([1, 3, 4])
    case.step(1e-5)
