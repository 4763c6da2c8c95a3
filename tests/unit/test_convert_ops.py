"""Row orders worked out by hand, exact inverses, and cuts over tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from helpers.qwen3_vl_configs import OFFICIAL, official_config
from torch import Tensor

from prism_nemo.convert.ops import (
    Column,
    Copy,
    ExpertMatrix,
    GatedColumn,
    GateUp,
    MergeQKV,
    Op,
    PadRows,
    Replicated,
    Row,
    RowRun,
    Sharding,
    VisionQKV,
)
from prism_nemo.convert.pieces import rows_to_hf
from prism_nemo.convert.qwen3_vl import ExpertLayout, mappings
from prism_nemo.errors import LayoutError


def rows(*values: float) -> Tensor:
    """A [len, 2] matrix whose row i is (v_i, -v_i)."""
    column = torch.tensor(values)
    return torch.stack([column, -column], dim=1)


def test_qkv_rows_go_group_by_group() -> None:
    # 4 query heads of 1 dimension, 2 key-value heads: group 0 is q0 q1 k0 v0, group 1 is q2 q3 k1 v1.
    op = MergeQKV(num_heads=4, num_kv_heads=2, head_dim=1)
    merged = op.to_megatron(rows(1, 2, 3, 4), rows(10, 20), rows(100, 200))
    assert torch.equal(merged, rows(1, 2, 10, 100, 3, 4, 20, 200))
    query, key, value = op.to_hf(merged)
    assert torch.equal(query, rows(1, 2, 3, 4))
    assert torch.equal(key, rows(10, 20))
    assert torch.equal(value, rows(100, 200))


def test_qkv_keeps_the_rows_of_a_head_together() -> None:
    op = MergeQKV(num_heads=2, num_kv_heads=1, head_dim=2)
    assert op.to_megatron(torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6]), torch.tensor([7, 8])).tolist() == [
        1,
        2,
        3,
        4,
        5,
        6,
        7,
        8,
    ]
    assert op.rows_per_group == 8


def test_vision_qkv_rows_go_head_by_head() -> None:
    # Two heads of two dimensions: HuggingFace has q0 q1 k0 k1 v0 v1 (two rows each), Megatron q0 k0 v0 q1 k1 v1.
    op = VisionQKV(num_heads=2, head_dim=2)
    hf = torch.tensor([0, 1, 10, 11, 100, 101, 110, 111, 200, 201, 210, 211])
    megatron = torch.tensor([0, 1, 100, 101, 200, 201, 10, 11, 110, 111, 210, 211])
    assert torch.equal(op.to_megatron(hf), megatron)
    assert torch.equal(op.to_hf(megatron)[0], hf)


def test_gate_comes_before_up() -> None:
    assert torch.equal(GateUp().to_megatron(rows(1, 2), rows(3, 4)), rows(1, 2, 3, 4))


def test_an_expert_of_the_hub_is_transposed_and_one_of_transformers_5_is_not() -> None:
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    assert ExpertMatrix(transposed=True).to_megatron(weight).tolist() == [[1, 4], [2, 5], [3, 6]]
    assert ExpertMatrix(transposed=False).to_megatron(weight).tolist() == weight.tolist()


def test_vocabulary_padding_is_zero_and_is_dropped_again() -> None:
    op = PadRows(rows=3, padded_rows=4)
    padded = op.to_megatron(rows(1, 2, 3))
    assert torch.equal(padded, rows(1, 2, 3, 0))
    padded[3] = 7.0  # whatever training left there
    assert torch.equal(op.to_hf(padded)[0], rows(1, 2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tail", [(), (5,)])
@pytest.mark.parametrize(
    ("op", "lengths"),
    [
        (Copy(), (6,)),
        (PadRows(6, 8), (6,)),
        (MergeQKV(6, 3, 4), (24, 12, 12)),
        (VisionQKV(3, 4), (36,)),
        (GateUp(), (6, 6)),
    ],
)
def test_both_ways_lose_no_bit(op: Op, lengths: tuple[int, ...], tail: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(length, *tail).to(dtype) for length in lengths]
    back = op.to_hf(op.to_megatron(*tensors))
    assert len(back) == len(tensors)
    assert all(torch.equal(one, other) and one.dtype == other.dtype for one, other in zip(back, tensors, strict=True))


def in_order(runs: Sequence[RowRun], tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensors[run.source][run.start : run.start + run.count] for run in runs])


def test_row_orders_are_what_the_ops_do_for_every_official_model() -> None:
    """Row numbers through each op that a model of any size has, both ways, against the order that it states."""
    ops = {
        (mapping.op, mapping.hf_shapes, mapping.fused)
        for size in OFFICIAL
        for layout in ExpertLayout
        for mapping in mappings(official_config(size), layout=layout)
    }
    assert {type(op) for op, _, _ in ops} == {Copy, PadRows, MergeQKV, VisionQKV, GateUp, ExpertMatrix}
    moved = 0
    for op, shapes, fused in ops:
        shapes = tuple(shape[1:] for shape in shapes) if fused else shapes
        meta = [torch.empty(shape, device="meta") for shape in shapes]
        assert op.megatron_shape(*shapes) == tuple(op.to_megatron(*meta).shape)
        rows = tuple(shape[0] for shape in shapes)
        order = op.row_order(*rows)
        if order is None:
            assert op == ExpertMatrix(transposed=True)
            continue
        numbers = list(torch.arange(sum(rows)).split(rows))
        merged = op.to_megatron(*numbers)
        assert torch.equal(in_order(order, numbers), merged)
        back = rows_to_hf(op, rows)
        assert all(torch.equal(in_order(runs, [merged]), part) for runs, part in zip(back, op.to_hf(merged), strict=True))
        moved += len(order) > 1
    assert moved > 10


@pytest.mark.parametrize(
    ("op", "order"),
    [
        (MergeQKV(2, 1, 4), (RowRun(0, 0, 8), RowRun(1, 0, 4), RowRun(2, 0, 4))),
        (VisionQKV(1, 4), (RowRun(0, 0, 12),)),  # one head: nothing moves
        (PadRows(6, 8), None),
        (PadRows(6, 6), (RowRun(0, 0, 6),)),
    ],
)
def test_row_orders_at_the_edges(op: Op, order: tuple[RowRun, ...] | None) -> None:
    rows = {MergeQKV: (8, 4, 4), VisionQKV: (12,), PadRows: (6,)}[type(op)]
    assert op.row_order(*rows) == order
    assert op.megatron_shape(*((count, 5) for count in rows)) == op.to_megatron(*(torch.empty(n, 5) for n in rows)).shape


def test_column_cuts_rows_and_row_cuts_columns() -> None:
    full = torch.arange(16).view(4, 4)
    assert Column().shard(full, 1, 2).tolist() == [[8, 9, 10, 11], [12, 13, 14, 15]]
    assert Row().shard(full, 1, 2).tolist() == [[2, 3], [6, 7], [10, 11], [14, 15]]
    assert torch.equal(Replicated().shard(full, 1, 2), full)
    assert Column().shard(torch.arange(4), 3, 4).tolist() == [3]


def test_each_rank_holds_its_own_gate_and_up() -> None:
    full = rows(1, 2, 3, 4, 10, 20, 30, 40)  # gate 1 2 3 4, up 10 20 30 40
    assert torch.equal(GatedColumn().shard(full, 0, 2), rows(1, 2, 10, 20))
    assert torch.equal(GatedColumn().shard(full, 1, 2), rows(3, 4, 30, 40))
    assert torch.equal(GatedColumn().unshard([rows(1, 2, 10, 20), rows(3, 4, 30, 40)]), full)


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("sharding", [Replicated(), Column(), Column(4), Row(), Row(2), GatedColumn()])
def test_shards_of_all_ranks_make_the_whole(sharding: Sharding, tp_size: int) -> None:
    full = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    shards = [sharding.shard(full, rank, tp_size) for rank in range(tp_size)]
    assert len({shard.shape for shard in shards}) == 1
    assert sum(shard.numel() for shard in shards) == full.numel() * (tp_size if sharding == Replicated() else 1)
    assert torch.equal(sharding.unshard(shards), full)


def test_a_cut_through_a_unit_is_refused() -> None:
    full = torch.zeros(12, 12)  # 12 rows are divisible by 4, but 2 groups of 6 are not
    with pytest.raises(LayoutError, match="2 units of 6"):
        Column(6).shard(full, 0, 4)
    with pytest.raises(LayoutError, match="cannot be cut over 8"):
        Row().shard(full, 0, 8)
    with pytest.raises(LayoutError):
        GatedColumn().shard(full, 0, 4)  # halves of 6
