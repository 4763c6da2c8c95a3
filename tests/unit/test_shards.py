"""How context-parallel ranks share a row's tokens and its images."""

from __future__ import annotations

import pytest
import torch

from prism_nemo.packing.shards import RowShard, share_out

CPU = torch.device("cpu")


def test_stretches_by_hand() -> None:
    shards = [RowShard.of(8, rank, 2, CPU) for rank in range(2)]
    assert [shard.tokens.tolist() for shard in shards] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    index = torch.tensor([7, 2, 0, 0, 5])
    here, place = shards[0].locate(index)
    assert (here.tolist(), place.tolist()) == ([True, False, True, True, False], [3, 0, 0])
    here, place = shards[1].locate(index)
    assert (here.tolist(), place.tolist()) == ([False, True, False, False, True], [0, 3])


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_gathered_tokens_come_back_in_order(size: int) -> None:
    length = 24 * size
    shards = [RowShard.of(length, rank, size, CPU) for rank in range(size)]
    gathered = torch.cat([shard.tokens for shard in shards])
    for shard in shards:
        assert torch.equal(gathered[shard.row_order], torch.arange(length))
        # causal attention's work: how many tokens each of the rank's tokens sees
        assert int((shard.tokens + 1).sum()) == sum(range(1, length + 1)) // size


def test_images_are_dealt_out_by_cost() -> None:
    assert share_out([4, 16, 8, 4, 8], 2) == [[0, 1], [2, 3, 4]]
    assert share_out([5], 3) == [[0], [], []]
    assert share_out([], 2) == [[], []]
    costs = [(7 * index) % 23 + 1 for index in range(40)]
    shares = share_out(costs, 4)
    assert sorted(item for share in shares for item in share) == list(range(40))
    sums = [sum(costs[item] for item in share) for share in shares]
    assert max(sums) - min(sums) <= max(costs)
