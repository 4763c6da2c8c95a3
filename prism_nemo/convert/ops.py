"""The invertible pieces of which the HuggingFace <-> Megatron mapping is made.

An `Op` says how one full Megatron tensor is made of HuggingFace tensors and taken apart again. A `Sharding` says how that full
tensor is cut over tensor-parallel ranks (for experts: expert-tensor-parallel ranks). Both work on weights and biases, in any
dtype, and lose no bit. What they return may share memory with what they were given.

Most ops only move whole rows, and say in which order (`row_order`): all that a conversion from file to file needs, and no torch,
which takes a second to import. A test holds every op to its order.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from prism_nemo.errors import LayoutError

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class RowRun:
    """`count` rows from row `start` on of the `source`-th tensor."""

    source: int
    start: int
    count: int


def joined_runs(runs: Sequence[RowRun]) -> tuple[RowRun, ...]:
    """The same rows in as few runs as there can be."""
    result: list[RowRun] = []
    for run in runs:
        last = result[-1] if result else None
        if last is not None and (last.source, last.start + last.count) == (run.source, run.start):
            result[-1] = RowRun(last.source, last.start, last.count + run.count)
        else:
            result.append(run)
    return tuple(result)


class Op(Hashable, Protocol):
    """How a full Megatron tensor is made of HuggingFace tensors. `to_hf` is the exact inverse of `to_megatron`."""

    def to_megatron(self, *tensors: Tensor) -> Tensor: ...

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]: ...

    def megatron_shape(self, *shapes: Shape) -> Shape:
        """The shape of the Megatron tensor that HuggingFace tensors of these shapes make."""

    def row_order(self, *rows: int) -> tuple[RowRun, ...] | None:
        """Where the Megatron tensor's rows come from; `rows` counts those of each HuggingFace tensor. None: values change places
        within rows, or are added."""


class _MovesRows:
    """What ops have in common that keep every row of every tensor."""

    def megatron_shape(self, *shapes: Shape) -> Shape:
        return (sum(shape[0] for shape in shapes), *shapes[0][1:])


@dataclass(frozen=True)
class Copy(_MovesRows):
    """The same tensor on both sides."""

    def to_megatron(self, *tensors: Tensor) -> Tensor:
        (tensor,) = tensors
        return tensor

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor,)

    def row_order(self, *rows: int) -> tuple[RowRun, ...]:
        return (RowRun(0, 0, rows[0]),)


@dataclass(frozen=True)
class PadRows:
    """A vocabulary matrix [rows, ...], padded with zero rows to [padded_rows, ...] so that ranks share it evenly."""

    rows: int
    padded_rows: int

    def to_megatron(self, *tensors: Tensor) -> Tensor:
        import torch

        (tensor,) = tensors
        if self.padded_rows == self.rows:
            return tensor
        return torch.cat([tensor, tensor.new_zeros(self.padded_rows - self.rows, *tensor.shape[1:])])

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor[: self.rows],)

    def megatron_shape(self, *shapes: Shape) -> Shape:
        return (self.padded_rows, *shapes[0][1:])

    def row_order(self, *rows: int) -> tuple[RowRun, ...] | None:
        return (RowRun(0, 0, self.rows),) if self.padded_rows == self.rows else None


@dataclass(frozen=True)
class MergeQKV(_MovesRows):
    """Language attention: q [heads * head_dim, ...], k and v [kv_heads * head_dim, ...] <-> one tensor.

    Its rows go key-value group by key-value group: the heads / kv_heads query heads of the group, its key head, its value head.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def rows_per_group(self) -> int:
        """Rows of one key-value group: what no tensor-parallel cut may split."""
        return (self.num_heads // self.num_kv_heads + 2) * self.head_dim

    def to_megatron(self, *tensors: Tensor) -> Tensor:
        import torch

        query, key, value = (tensor.unflatten(0, (self.num_kv_heads, -1)) for tensor in tensors)
        return torch.cat([query, key, value], dim=1).flatten(0, 1)

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        groups = tensor.unflatten(0, (self.num_kv_heads, -1))
        parts = groups.split([self.rows_per_group - 2 * self.head_dim, self.head_dim, self.head_dim], dim=1)
        return tuple(part.flatten(0, 1) for part in parts)

    def row_order(self, *rows: int) -> tuple[RowRun, ...]:
        counts = [count // self.num_kv_heads for count in rows]  # of a group
        groups = range(self.num_kv_heads)
        return joined_runs([RowRun(at, group * count, count) for group in groups for at, count in enumerate(counts)])


@dataclass(frozen=True)
class VisionQKV(_MovesRows):
    """Vision attention: fused rows ordered [3, heads, head_dim] <-> [heads, 3, head_dim]."""

    num_heads: int
    head_dim: int

    @property
    def rows_per_group(self) -> int:
        """Rows of one head's query, key and value: what no tensor-parallel cut may split."""
        return 3 * self.head_dim

    def to_megatron(self, *tensors: Tensor) -> Tensor:
        (tensor,) = tensors
        return tensor.unflatten(0, (3, self.num_heads, self.head_dim)).transpose(0, 1).flatten(0, 2)

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor.unflatten(0, (self.num_heads, 3, self.head_dim)).transpose(0, 1).flatten(0, 2),)

    def row_order(self, *rows: int) -> tuple[RowRun, ...]:
        starts = ((part * self.num_heads + head) * self.head_dim for head in range(self.num_heads) for part in range(3))
        return joined_runs([RowRun(0, start, self.head_dim) for start in starts])


@dataclass(frozen=True)
class GateUp(_MovesRows):
    """The gated MLP's first layer: gate [width, hidden] and up [width, hidden] <-> [2 * width, hidden], gate first."""

    def to_megatron(self, *tensors: Tensor) -> Tensor:
        import torch

        gate, up = tensors
        return torch.cat([gate, up])

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        gate, up = tensor.chunk(2)
        return gate, up

    def row_order(self, *rows: int) -> tuple[RowRun, ...]:
        return tuple(RowRun(source, 0, count) for source, count in enumerate(rows))


@dataclass(frozen=True)
class ExpertMatrix:
    """One expert's slice of a fused HuggingFace tensor [experts, ...] <-> that expert's Megatron weight [out, in].

    The Hub's layout keeps slices as [in, out], transformers 5's as [out, in]. The first layer's outputs are gate, then up.
    """

    transposed: bool

    def to_megatron(self, *tensors: Tensor) -> Tensor:
        (tensor,) = tensors
        return tensor.T.contiguous() if self.transposed else tensor

    def to_hf(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor.T.contiguous() if self.transposed else tensor,)

    def megatron_shape(self, *shapes: Shape) -> Shape:
        return shapes[0][::-1] if self.transposed else shapes[0]

    def row_order(self, *rows: int) -> tuple[RowRun, ...] | None:
        return None if self.transposed else (RowRun(0, 0, rows[0]),)


class Sharding(Protocol):
    """How a full Megatron tensor is cut; LayoutError where a cut does not fit. `unshard` takes the shards in rank order."""

    def shard(self, full: Tensor, tp_rank: int, tp_size: int) -> Tensor: ...

    def unshard(self, shards: Sequence[Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class Replicated:
    """Every rank holds the whole tensor."""

    def shard(self, full: Tensor, tp_rank: int, tp_size: int) -> Tensor:
        return full

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        return shards[0]


@dataclass(frozen=True)
class Column:
    """Rank i holds the i-th part of the rows (outputs; the bias alike), cut between runs of `unit` rows."""

    unit: int = 1

    def shard(self, full: Tensor, tp_rank: int, tp_size: int) -> Tensor:
        return _part(full, 0, tp_rank, tp_size, self.unit)

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        import torch

        return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim=0)


@dataclass(frozen=True)
class Row:
    """Rank i holds the i-th part of the columns (inputs), cut between runs of `unit` columns."""

    unit: int = 1

    def shard(self, full: Tensor, tp_rank: int, tp_size: int) -> Tensor:
        return _part(full, 1, tp_rank, tp_size, self.unit)

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        import torch

        return shards[0] if len(shards) == 1 else torch.cat(list(shards), dim=1)


@dataclass(frozen=True)
class GatedColumn:
    """The full tensor is [gate; up]; rank i holds [gate_i; up_i], so that each rank gates what it computed itself."""

    def shard(self, full: Tensor, tp_rank: int, tp_size: int) -> Tensor:
        import torch

        if tp_size == 1:
            return full
        return torch.cat([_part(half, 0, tp_rank, tp_size, 1) for half in full.chunk(2)])

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        import torch

        if len(shards) == 1:
            return shards[0]
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])


def _part(full: Tensor, dim: int, rank: int, size: int, unit: int) -> Tensor:
    """The `rank`-th of `size` equal parts of a dimension, a view. LayoutError if a cut would fall inside a unit."""
    units, remainder = divmod(full.shape[dim], unit)
    assert remainder == 0, f"{full.shape[dim]} is not a multiple of {unit}"
    if units % size:
        raise LayoutError(
            f"a tensor of {units} units of {unit} along dimension {dim} cannot be cut over {size} tensor-parallel ranks",
            where="parallel.tensor_model_parallel_size",
            remedy="a size that divides the attention heads, the key-value heads, the MLP width and the padded vocabulary",
        )
    return full.narrow(dim, units // size * rank * unit, units // size * unit)
