"""What the modules keep for the backward pass of one packed row, in bytes: term by term what `models/qwen3_vl` saves.

Legend: b bytes of a value; T tokens of the row on this rank (1/CP of them); S the same, or T/TP with sequence parallelism;
P vision patches. "x32" is the copy that RMSNorm makes of its input in fp32; where the model itself is in fp32 there is no copy,
but the input itself is kept, which is as much.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from prism_nemo.config.schema import ParallelConfig
from prism_nemo.plan.parameters import expert_tensor_size
from prism_nemo.plan.shapes import Shape

FP32 = 4
LOGITS_AT_A_TIME = 1 << 24  # engine/logprobs.py


class Recompute(StrEnum):
    none = "none"  # everything is kept
    selective = "selective"  # attention's own inner values are computed again
    full = "full"  # only every layer's input is kept


class Attention(StrEnum):
    gpu = "gpu"  # FlexAttention keeps the rotated queries and keys, the values, the output and a number a head
    cpu = "cpu"  # the batches of engine/attention.py keep gathered copies


@dataclass(frozen=True)
class Row:
    """One micro-batch of one data-parallel rank."""

    tokens: int
    visual_tokens: int
    labels: int  # tokens whose log-probability is asked for
    attended_tokens: int = 0  # keys over which the CPU's batches of segments run, prefixes repeated; 0: as many as tokens

    @property
    def keys(self) -> int:
        return self.attended_tokens or self.tokens


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
    layer_input: float  # what full recompute keeps of a layer instead
    vision: float
    entry: float  # the row itself, rotary tables, what puts visual tokens in
    head: float  # final norm and the hidden states that log-probabilities are taken of


def saved_bytes(shape: Shape, row: Row, parallel: ParallelConfig, cost: Cost) -> Saved:
    """Everything of one row. A layer's figure is without recompute; `memory.py` decides how many layers keep it."""
    b = cost.value_bytes
    tokens = row.tokens / parallel.context_parallel_size
    local = tokens / parallel.tensor_model_parallel_size if is_sequence_parallel(shape, parallel) else tokens
    norm = 2 * FP32 + b if cost.is_fp32 else FP32 + 2 * b  # x32, the normed value, the output (which the next layer keeps)
    mlp = _mlp(shape, tokens, parallel, cost) if shape.experts is None else _experts(shape, local, parallel, cost)
    per_layer = 2 * local * (norm * shape.hidden_size + FP32) + _attention(shape, row, parallel, cost) + mlp
    labels = row.labels * shape.hidden_size * b
    rotary = 2 * b * row.tokens * shape.head_dim
    pixels = row.visual_tokens * shape.vision.patches_per_token * shape.vision.patch_width * FP32
    inserted = row.visual_tokens * shape.hidden_size * b * (1 + shape.vision.num_deepstack) * cost.vision_is_trained
    return Saved(
        per_layer=per_layer,
        layer_input=b * local * shape.hidden_size,
        vision=_vision(shape, row, parallel, cost),
        entry=rotary + pixels + inserted,
        head=local * ((FP32 + b) * shape.hidden_size + FP32) + labels,
    )


def is_sequence_parallel(shape: Shape, parallel: ParallelConfig) -> bool:
    """Experts under tensor parallelism always are."""
    return parallel.tensor_model_parallel_size > 1 and (parallel.sequence_parallel or shape.experts is not None)


def _attention(shape: Shape, row: Row, parallel: ParallelConfig, cost: Cost) -> float:
    """Head norms, rotated queries and keys, values, output; the input and its norm are counted with the layer."""
    b, tp, cp = cost.value_bytes, parallel.tensor_model_parallel_size, parallel.context_parallel_size
    tokens, keys = row.tokens / cp, row.keys
    query, key = shape.query_width / tp, shape.key_width / tp
    heads, groups = shape.num_heads / tp, shape.num_kv_heads / tp
    joint = b * (query + 2 * key)  # what the qkv layer gave; a view of it keeps all of it
    normed = b * (query + key) + FP32 * (heads + groups)
    if cost.is_fp32:
        head_norms = tokens * (normed + b * query + joint)  # the key's x32 is a view of the joint output
    else:
        head_norms = tokens * (normed + FP32 * (query + key))
    statistics = tokens * FP32 * heads
    out = tokens * b * query
    if cost.attention is Attention.cpu:
        core = tokens * b * query + 2 * keys / cp * b * key + out + statistics  # gathered copies, the batches' own output
    else:
        values = 0.0 if cost.is_fp32 else tokens * joint
        rotated = tokens * b * (query + key) + (b * 2 * key * (row.tokens - tokens))  # keys and values of the other CP ranks
        core = rotated + values + statistics
    return head_norms + core + out


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


def _vision(shape: Shape, row: Row, parallel: ParallelConfig, cost: Cost) -> float:
    """The trained tower. A frozen one keeps nothing."""
    if not cost.vision_is_trained or not row.visual_tokens:
        return 0.0
    vision, b, tp = shape.vision, cost.value_bytes, parallel.tensor_model_parallel_size
    patches = row.visual_tokens * vision.patches_per_token
    hidden = vision.hidden_size
    # two norms' inputs and outputs whole; queries, keys, values, output and its gathered copy, and the MLP's two, cut
    block = b * (4 * hidden + (5 * hidden + 2 * vision.ffn_hidden_size) / tp) + FP32 * (vision.num_heads / tp + 4)
    mergers = (1 + vision.num_deepstack) * b * (hidden + 2 * hidden / tp) + b * hidden
    patch = 0 if cost.is_fp32 else b * vision.patch_width  # fp32 pixels are the row's own
    position = 4 * (8 + FP32)  # four table entries and weights a patch
    rotary = 2 * FP32 * hidden / vision.num_heads
    return patches * (vision.depth * block + mergers + patch + position + rotary)


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
