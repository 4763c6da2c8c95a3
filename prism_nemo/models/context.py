"""What a layer needs to know about the row that runs through it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from prism_nemo.engine.attention import ImageAttention, RowAttention
from prism_nemo.packing.groups import SegmentKind
from prism_nemo.packing.rows import PackedRow
from prism_nemo.packing.shards import RowShard

PROMPT = -1  # token kinds below SegmentKind's
PADDING = -2
KIND_NAMES = {PROMPT: "prompt", **{int(kind): kind.name.lower() for kind in SegmentKind}}


class KeyValueCache(Protocol):
    """Keys and values of decoded sequences; `rollout/megatron.py` has the implementation."""

    def attend(
        self,
        layer_number: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        attention: RowAttention | ImageAttention | None,
    ) -> Tensor: ...


@dataclass
class RouterStatistics:
    """What routers saw in the rows of a step; sums, so that they add up over micro-batches and ranks.

    load maps (kind) -> how often its tokens chose each expert, fp64 [experts]. balance is the token-weighted sum of the
    load-balancing loss without its coefficient; tokens how many (token, layer) pairs it covers.
    """

    load: dict[int, Tensor] = field(default_factory=dict)
    balance: float = 0.0
    tokens: float = 0.0


@dataclass
class RoutingContext:
    """What the experts' router needs: which group and kind every token has, and how the balancing loss is scaled."""

    token_group: Tensor  # int64 [T], of the tokens of this context-parallel rank; -1 padding
    token_kind: Tensor  # int64 [T]; SegmentKind, PROMPT or PADDING
    num_groups: int
    balance_coefficient: float = 0.0
    global_tokens: float = 1.0  # tokens of the whole batch, over micro-batches and ranks
    dedicated: bool = False  # a segment's tokens may reach only the expert pool of their kind
    statistics: RouterStatistics | None = None
    cp_group: dist.ProcessGroup | None = None  # the ranks that hold the row's other tokens
    counted: set[int] = field(default_factory=set)  # layers in `statistics`: recomputed activations must not count twice

    def of_shard(self, shard: RowShard, cp_group: dist.ProcessGroup) -> RoutingContext:
        """What the router on one context-parallel rank needs: its own tokens, and whom to ask about the others."""
        group, kind = self.token_group[shard.tokens], self.token_kind[shard.tokens]
        return replace(self, token_group=group, token_kind=kind, cp_group=cp_group)


@dataclass
class RowContext:
    """Travels through Megatron's layers as `packed_seq_params`."""

    attention: RowAttention | ImageAttention | None
    routing: RoutingContext | None = None
    cache: KeyValueCache | None = None
    shard: RowShard | None = None  # the tokens that this context-parallel rank holds; None: all
    fp8: bool = False  # an FP8 model runs in FP8; not so where lengths are any: prompts and decoded tokens of rollouts


def token_kinds(row: PackedRow) -> Tensor:
    """The kind of every token of a row, int64 [T]."""
    segment = row.layout.token_segment.to(row.segment_kind.device)
    kinds = torch.cat([row.segment_kind, torch.tensor([PROMPT], device=row.segment_kind.device)])[segment]
    if row.layout.padding:
        kinds[-row.layout.padding :] = PADDING
    return kinds
