"""What the modules keep for the backward pass of one packed row, in bytes: term by term what `models/qwen3_vl` saves.

Legend: b bytes of a value; T tokens of the row on this rank (1/CP of them); S the same, or T/TP with sequence parallelism;
P vision patches. "x32" is the copy that RMSNorm makes of its input in fp32; where the model itself is in fp32 there is no copy,
but the input itself is kept, which is as much.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import ceil

from prism_nemo.config.schema import ParallelConfig
from prism_nemo.plan.parameters import expert_tensor_size
from prism_nemo.plan.shapes import Shape

FP32 = 4
LOGITS_AT_A_TIME = 1 << 24  # engine/logprobs.py


class Recompute(StrEnum):
    """What backward computes again, in every layer of language model and tower, instead of keeping it."""

    none = "none"
    core_attn = "core_attn"  # attention without its projections
    mlp = "mlp"  # the norm and the MLP, or the experts with router and dispatch
    both = "core_attn+mlp"
    full = "full"  # everything: only the layer's input is kept

    @property
    def covers_core(self) -> bool:
        return self in (Recompute.core_attn, Recompute.both)

    @property
    def covers_mlp(self) -> bool:
        return self in (Recompute.mlp, Recompute.both)


class Attention(StrEnum):
    gpu = "gpu"  # FlexAttention keeps the rotated queries and keys, the values, the output and a number a head
    cpu = "cpu"  # the batches of engine/attention.py keep gathered copies


@dataclass(frozen=True)
class Row:
    """One micro-batch of one data-parallel rank."""

    tokens: int
    visual_tokens: int
    labels: int  # tokens whose log-probability is asked for
    images: int = 1  # that the visual tokens are of, all alike; context-parallel ranks share them, whole ones
    attended_tokens: int = 0  # keys over which the CPU's batches of segments run, prefixes repeated; 0: as many as tokens

    @property
    def keys(self) -> int:
        return self.attended_tokens or self.tokens

    def vision_share(self, parallel: ParallelConfig) -> float:
        """Of the row's images, what the context-parallel rank with most of them sees."""
        return ceil(self.images / parallel.context_parallel_size) / max(1, self.images)


@dataclass(frozen=True)
class Cost:
    """How values are stored."""

    value_bytes: int = 2  # bf16; 4: fp32
    recompute: Recompute = Recompute.none
    attention: Attention = Attention.gpu
    vision_is_trained: bool = True
    expert_imbalance: float = 1.0  # the busiest rank's routed tokens over the mean

    @property
    def is_fp32(self) -> bool:
        return self.value_bytes == FP32


@dataclass(frozen=True)
class Saved:
    """Bytes that one row keeps on one rank until its backward pass."""

    per_layer: float
    again: float  # what recomputing one language layer brings back, one layer at a time
    vision: float
    vision_again: float  # the same of the tower's layers
    entry: float  # the row itself, rotary tables, what puts visual tokens in
    head: float  # final norm and the hidden states that log-probabilities are taken of


@dataclass(frozen=True)
class _Layer:
    """One layer's bytes by what recomputing can leave out."""

    input: float  # what a recomputed part starts from
    outer: float  # norm, projections
    core: float
    core_inputs: float  # what attention starts from
    mlp: float  # with its norm

    def kept(self, recompute: Recompute) -> float:
        if recompute is Recompute.full:
            return self.input
        core = self.core_inputs if recompute.covers_core else self.core
        return self.outer + core + (self.input if recompute.covers_mlp else self.mlp)

    def again(self, recompute: Recompute) -> float:
        """Of one layer while its backward pass runs; of two recomputed parts the larger, for they come one after the other."""
        if recompute is Recompute.full:
            return self.kept(Recompute.none)
        return max(self.core if recompute.covers_core else 0.0, self.mlp if recompute.covers_mlp else 0.0)


def saved_bytes(shape: Shape, row: Row, parallel: ParallelConfig, cost: Cost) -> Saved:
    """Everything of one row."""
    b = cost.value_bytes
    tokens = row.tokens / parallel.context_parallel_size
    layer = _language_layer(shape, row, parallel, cost)
    labels = row.labels / parallel.context_parallel_size * shape.hidden_size * b
    rotary = 2 * b * tokens * shape.head_dim
    pixels = row.visual_tokens * shape.vision.patches_per_token * shape.vision.patch_width * FP32
    inserted = row.visual_tokens / parallel.context_parallel_size * shape.hidden_size * b * (1 + shape.vision.num_deepstack)
    vision, vision_again = _vision(shape, row, parallel, cost)
    return Saved(
        per_layer=layer.kept(cost.recompute),
        again=layer.again(cost.recompute),
        vision=vision,
        vision_again=vision_again,
        entry=rotary + pixels + inserted * cost.vision_is_trained,
        head=_local_tokens(shape, row, parallel) * ((FP32 + b) * shape.hidden_size + FP32) + labels,
    )


def _local_tokens(shape: Shape, row: Row, parallel: ParallelConfig) -> float:
    tokens = row.tokens / parallel.context_parallel_size
    return tokens / parallel.tensor_model_parallel_size if is_sequence_parallel(shape, parallel) else tokens


def _language_layer(shape: Shape, row: Row, parallel: ParallelConfig, cost: Cost) -> _Layer:
    b, local = cost.value_bytes, _local_tokens(shape, row, parallel)
    tokens = row.tokens / parallel.context_parallel_size
    # x32, the normed value, and the output, which the next linear layer keeps
    norm = local * ((2 * FP32 + b if cost.is_fp32 else FP32 + 2 * b) * shape.hidden_size + FP32)
    mlp = _mlp(shape, tokens, parallel, cost) if shape.experts is None else _experts(shape, local, parallel, cost)
    head_norms, core, core_inputs, out = _attention(shape, row, parallel, cost)
    return _Layer(
        input=b * local * shape.hidden_size, outer=norm + head_norms + out, core=core, core_inputs=core_inputs, mlp=norm + mlp
    )


def is_sequence_parallel(shape: Shape, parallel: ParallelConfig) -> bool:
    """Experts under tensor parallelism always are."""
    return parallel.tensor_model_parallel_size > 1 and (parallel.sequence_parallel or shape.experts is not None)


def _attention(shape: Shape, row: Row, parallel: ParallelConfig, cost: Cost) -> tuple[float, float, float, float]:
    """Of the head norms; of attention itself; of its inputs alone; of its output, which the projection keeps."""
    b, tp, cp = cost.value_bytes, parallel.tensor_model_parallel_size, parallel.context_parallel_size
    tokens, keys = row.tokens / cp, row.keys
    query, key = shape.query_width / tp, shape.key_width / tp
    heads, groups = shape.num_heads / tp, shape.num_kv_heads / tp
    joint = b * (query + 2 * key)  # what the qkv layer gave; a view of it, such as the values, keeps all of it
    normed = b * (query + key) + FP32 * (heads + groups)
    if cost.is_fp32:
        head_norms = tokens * (normed + b * query + joint)  # the key's x32 is a view of the joint output
    else:
        head_norms = tokens * (normed + FP32 * (query + key))
    inputs = tokens * (b * (query + key) + (0.0 if cost.is_fp32 else joint))
    statistics, out = tokens * FP32 * heads, tokens * b * query
    if cost.attention is Attention.cpu:
        core = tokens * b * query + 2 * keys * b * key + out + statistics  # gathered copies, the batches' own output
    elif cp > 1:
        core = tokens * b * query + row.tokens * 2 * b * key + statistics  # keys and values of the whole row, gathered
    else:
        core = inputs + statistics
    return head_norms, core, inputs, out


def _mlp(shape: Shape, tokens: float, parallel: ParallelConfig, cost: Cost) -> float:
    """Gate and up, silu(gate), a copy of up, their product."""
    return 5 * cost.value_bytes * tokens * shape.ffn_hidden_size / parallel.tensor_model_parallel_size


def _experts(shape: Shape, local: float, parallel: ParallelConfig, cost: Cost) -> float:
    """Router, the tokens sorted by expert, and of every chosen expert what an MLP keeps, with the product before its weight."""
    assert shape.experts is not None
    b, etp = cost.value_bytes, expert_tensor_size(parallel)
    routed = local * shape.experts.topk * etp * cost.expert_imbalance
    router = local * shape.experts.count * (FP32 + 1) + local * shape.experts.topk * 28
    return router + routed * (b * (shape.hidden_size + 6 * shape.experts.ffn_hidden_size / etp) + 2 * FP32)


def _vision(shape: Shape, row: Row, parallel: ParallelConfig, cost: Cost) -> tuple[float, float]:
    """The trained tower, and what recomputing one of its layers brings back. A frozen one keeps nothing."""
    if not cost.vision_is_trained or not row.visual_tokens:
        return 0.0, 0.0
    vision, b, tp = shape.vision, cost.value_bytes, parallel.tensor_model_parallel_size
    patches = row.visual_tokens * vision.patches_per_token * row.vision_share(parallel)
    hidden, own = b * vision.hidden_size, b * vision.hidden_size / tp
    layer = _Layer(
        input=patches * hidden,
        outer=patches * (2 * hidden + own + 2 * FP32),  # norm: input, output; the gathered output of attention
        core=patches * (4 * own + FP32 * vision.num_heads / tp),  # queries, keys, values, output
        core_inputs=patches * 3 * own,
        mlp=patches * (2 * hidden + 2 * b * vision.ffn_hidden_size / tp + 2 * FP32),
    )
    mergers = (1 + vision.num_deepstack) * (hidden + 2 * own) + hidden
    # fp32 pixels are the row's own, or a copy of some of them
    patch = 0 if cost.is_fp32 and parallel.context_parallel_size == 1 else b * vision.patch_width
    position = 4 * (8 + FP32)  # four table entries and weights a patch
    rotary = 2 * FP32 * vision.hidden_size / vision.num_heads
    around = patches * (mergers + patch + position + rotary)
    return vision.depth * layer.kept(cost.recompute) + around, layer.again(cost.recompute)


def logits_workspace(shape: Shape, row: Row, parallel: ParallelConfig, cost: Cost) -> float:
    """Bytes that exist for a moment while log-probabilities are taken and differentiated: chunks of logits, and the gradient of
    the output weight, summed over the chunks in fp32."""
    if shape.is_discriminator:
        return 0.0
    weight = shape.vocab_size * shape.hidden_size / parallel.tensor_model_parallel_size
    of_chunk = FP32 if cost.is_fp32 else FP32 + cost.value_bytes  # one chunk's product and, in bf16, its copy in fp32
    chunk = min(LOGITS_AT_A_TIME, row.labels * shape.vocab_size / parallel.tensor_model_parallel_size)
    forward = (4 * FP32 + 1) * chunk
    backward = (2 * FP32 + cost.value_bytes) * chunk + (FP32 + of_chunk) * weight
    return max(forward, backward)


def layer_workspace(shape: Shape, row: Row, parallel: ParallelConfig, cost: Cost) -> float:
    """Bytes that exist for a moment in the backward pass of one layer: gradients of its widest values and of one weight."""
    b, tp, etp = cost.value_bytes, parallel.tensor_model_parallel_size, expert_tensor_size(parallel)
    tokens = row.tokens / parallel.context_parallel_size
    if shape.experts is None:
        width, weight = shape.ffn_hidden_size / tp, 2 * shape.hidden_size * shape.ffn_hidden_size / tp
    else:
        width = shape.experts.topk * shape.hidden_size / (tp if is_sequence_parallel(shape, parallel) else 1)
        weight = 2 * shape.hidden_size * shape.experts.ffn_hidden_size / etp
    return b * (tokens * (2 * width + 2 * shape.hidden_size) + weight)
