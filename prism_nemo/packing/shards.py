"""How context-parallel ranks share the tokens of one row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RowShard:
    """The tokens of a row of T that one of `size` context-parallel ranks holds.

    The row is cut into 2 x size equal stretches, and rank r takes the r-th from the front and the r-th from the back: under
    causal attention early tokens see little and late ones much, and every rank gets its share of both.

    tokens  int64 [T / size]   the row's tokens that this rank holds, in the row's order
    """

    tokens: Tensor
    row_order: Tensor  # int64 [T]: where token t lies when the ranks' tokens are put one after another
    rank: int
    size: int

    @classmethod
    def of(cls, length: int, rank: int, size: int, device: torch.device) -> RowShard:
        """`length` must divide by 2 x size."""
        assert length % (2 * size) == 0, f"a row of {length} tokens does not divide into {2 * size} stretches"
        stretches = torch.arange(length, device=device).view(2 * size, -1)
        held = [torch.cat([stretches[index], stretches[2 * size - 1 - index]]) for index in range(size)]
        return cls(held[rank], torch.argsort(torch.cat(held)), rank, size)

    def locate(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the row's tokens at `index` int64 [N] are here, bool [N], and where among `tokens` those lie, int64 [n]."""
        place = self.row_order[index] - self.rank * self.tokens.numel()
        here = (place >= 0) & (place < self.tokens.numel())
        return here, place[here]


def share_out(costs: list[int], size: int) -> list[list[int]]:
    """Items dealt out to `size` ranks so that the sums of their costs are alike: the dearest first, each to whom has least.

    Ascending indices for every rank; the same on all ranks.
    """
    shares: list[list[int]] = [[] for _ in range(size)]
    sums = [0] * size
    for item in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
        rank = min(range(size), key=lambda rank: (sums[rank], rank))
        shares[rank].append(item)
        sums[rank] += costs[item]
    return [sorted(share) for share in shares]
