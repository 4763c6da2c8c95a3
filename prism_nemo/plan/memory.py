"""Memory of one rank, by what it is for. Everything in bytes.

Nothing here was fitted: every term is what a part of the engine allocates (`engine/optimizer.py`, `engine/logprobs.py`,
`rollout/cache.py`, the modules), and `tools/bench/plan_memory.py` measures how far the sum is from real runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import ceil

from prism_nemo.config.schema import ParallelConfig
from prism_nemo.plan.activations import (
    FP32,
    LOGITS_AT_A_TIME,
    Attention,
    Cost,
    Row,
    layer_workspace,
    logits_workspace,
    saved_bytes,
)
from prism_nemo.plan.parameters import expert_tensor_size, rank_parameters, stage_layers
from prism_nemo.plan.shapes import Shape
from prism_nemo.plan.workload import Workload, discriminator_passes, policy_passes, prompts_per_rank

_FIRST_CAPACITY = 32  # rollout/cache.py
_PREFILL_TOKENS = 8192  # rollout/megatron.py


@dataclass(frozen=True)
class Settings:
    """What changes memory beside shape and layout."""

    cost: Cost = field(default_factory=Cost)
    cpu_offload: bool = False  # optimizer.cpu_offload: its state is on the GPU only while it steps
    fused_adam: bool = False  # from Transformer Engine or apex; torch's keeps one more copy of the second moment for a moment


@dataclass(frozen=True)
class ModelState:
    """What a model keeps through the whole stage."""

    weights: float
    gradients: float
    optimizer: float
    optimizer_step: float  # extra, while the optimizer steps
    own_parameters: float  # whose update is this rank's work: a number, not bytes

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class Pass:
    """What the forward and backward pass of one model adds."""

    activations: float
    vision: float
    logits: float

    @property
    def total(self) -> float:
        return self.activations + self.vision + self.logits


@dataclass(frozen=True)
class Decoding:
    """What sampling adds, for so many sequences at once."""

    sequences: int
    kv_cache: float
    workspace: float

    @property
    def total(self) -> float:
        return self.kv_cache + self.workspace


NOTHING = Pass(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Memory:
    """The rank that needs most; `stage` is its pipeline stage. Absent parts are zero."""

    stage: int
    policy: ModelState | None
    discriminator: ModelState | None
    policy_pass: Pass
    discriminator_pass: Pass
    decoding: Decoding | None
    overhead: float  # the framework's own, and what its allocator cannot use
    phases: dict[str, float] = field(default_factory=dict)  # what each adds to the models' state

    @property
    def state(self) -> float:
        return sum(model.total for model in (self.policy, self.discriminator) if model)

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.phases.__getitem__)

    @property
    def total(self) -> float:
        return self.state + self.phases[self.peak_phase] + self.overhead


def model_state(shape: Shape, parallel: ParallelConfig, world_size: int, settings: Settings, stage: int = 0) -> ModelState:
    """Weights in the model's precision, gradients in fp32, and AdamW's: two moments and, for bf16, master weights, all fp32."""
    b = settings.cost.value_bytes
    held = rank_parameters(shape, parallel, stage)
    trained = held.dense - (0 if settings.cost.vision_is_trained else held.vision)
    of_optimizer = (2 if settings.cost.is_fp32 else 3) * FP32
    dense_copies, expert_copies = replicas(parallel, world_size)
    if not parallel.use_distributed_optimizer:
        dense_copies = expert_copies = 1
    own = trained / dense_copies + held.experts / expert_copies
    return ModelState(
        weights=b * held.total,
        gradients=FP32 * (trained + held.experts),
        optimizer=0.0 if settings.cpu_offload else of_optimizer * own,
        optimizer_step=own * ((of_optimizer if settings.cpu_offload else 0) + (0 if settings.fused_adam else FP32)),
        own_parameters=own,
    )


def replicas(parallel: ParallelConfig, world_size: int) -> tuple[int, int]:
    """Over how many ranks gradients are summed (and the distributed optimizer is spread): of dense weights, of experts."""
    pp = parallel.pipeline_model_parallel_size
    dense = world_size // (parallel.tensor_model_parallel_size * pp)
    experts = world_size // (parallel.expert_model_parallel_size * expert_tensor_size(parallel) * pp)
    return max(1, dense), max(1, experts)


def training_pass(shape: Shape, row: Row, num_rows: int, parallel: ParallelConfig, settings: Settings, stage: int = 0) -> Pass:
    """The rows that are under way at once, and the backward pass's own needs at its worst moment."""
    cost, pp = settings.cost, parallel.pipeline_model_parallel_size
    saved = saved_bytes(shape, row, parallel, cost)
    layers = stage_layers(shape, parallel, stage)
    chunks = parallel.virtual_pipeline_model_parallel_size or 1
    in_flight = _rows_in_flight(stage, pp, chunks, num_rows)
    kept = in_flight * layers * saved.per_layer
    is_first, is_last = stage == 0, stage == pp - 1
    whole = min(pp - stage, num_rows)  # rows whose first or last part is on this stage
    received = cost.value_bytes * row.tokens / parallel.context_parallel_size * shape.hidden_size
    kept += whole * (saved.entry if is_first else received)
    kept += saved.head if is_last else 0.0
    logits = logits_workspace(shape, row, parallel, cost) if is_last else 0.0
    workspace = max(logits, saved.again + layer_workspace(shape, row, parallel, cost), saved.vision_again * is_first)
    return Pass(kept + workspace - logits, whole * saved.vision if is_first else 0.0, logits)


def _rows_in_flight(stage: int, pp: int, chunks: int, num_rows: int) -> float:
    """Rows, in units of a rank's whole share of layers, whose activations wait for their backward pass (1F1B, interleaved)."""
    if chunks == 1:
        return min(pp - stage, num_rows)
    warm_up = (pp - stage - 1) * 2 + (chunks - 1) * pp + 1
    return min(warm_up, num_rows * chunks) / chunks


def decoding(shape: Shape, workload: Workload, sequences: int, parallel: ParallelConfig, cost: Cost, stage: int = 0) -> Decoding:
    """`MegatronEngine`'s caches for so many sequences decoded at once: prompts once, responses in a doubling buffer."""
    layers = stage_layers(shape, parallel, stage)
    tp, b = parallel.tensor_model_parallel_size, FP32 if cost.attention is Attention.cpu else cost.value_bytes
    prompts = ceil(sequences / workload.rollouts)
    capacity = _FIRST_CAPACITY
    while capacity < workload.response_tokens:
        capacity *= 2
    width = shape.key_width / tp
    prompt_layer = 2 * prompts * workload.prompt_tokens * width * b
    own_layer = 2 * sequences * capacity * width * b
    scores = 2 * sequences * shape.num_heads / tp * (workload.prompt_tokens + workload.response_tokens) * FP32
    # keys, then values, as fp32 copies; a layer's buffer stands beside its larger successor while it grows
    casts = 0.0 if b == FP32 else FP32 / b * max(prompt_layer, own_layer) / 2
    logits = 4 * FP32 * LOGITS_AT_A_TIME
    prefill = _prefill(shape, workload, parallel, cost)
    attending = scores + max(casts, own_layer / 2)
    return Decoding(sequences, layers * (prompt_layer + own_layer), max(logits, attending, prefill))


def _prefill(shape: Shape, workload: Workload, parallel: ParallelConfig, cost: Cost) -> float:
    """The widest values of a row of prompts."""
    tokens = max(_PREFILL_TOKENS, workload.prompt_tokens)
    width = 4 * shape.ffn_hidden_size / parallel.tensor_model_parallel_size
    if shape.experts is not None:
        width = 3 * shape.experts.topk * (shape.hidden_size + shape.experts.ffn_hidden_size)
    return tokens * cost.value_bytes * (width + 4 * shape.hidden_size)


@dataclass(frozen=True)
class Overhead:
    """Assumed, not modelled."""

    fixed: float  # CUDA context, libraries' workspaces, NCCL's buffers
    fragmentation: float  # share of everything else that the caching allocator holds and cannot use


def stage_memory(
    policy: Shape | None,
    discriminator: Shape | None,
    workload: Workload,
    parallel: ParallelConfig,
    world_size: int,
    settings: Settings,
    overhead: Overhead,
    *,
    capacity: float | None = None,
) -> Memory:
    """Memory of the rank that needs most.

    With `capacity` (bytes of a GPU) as many sequences are decoded together as leave room, at least one, at most
    `workload.max_batch_size`; without, that many. Raises LayoutError when the batch does not divide over the ranks.
    """
    pp = parallel.pipeline_model_parallel_size
    prompts = prompts_per_rank(workload, parallel, world_size)

    def ranks(work: Workload) -> list[Memory]:
        return [
            _rank_memory(policy, discriminator, work, prompts, parallel, world_size, settings, overhead, capacity, stage)
            for stage in range(pp)
        ]

    found = ranks(workload)
    together = [memory.decoding.sequences for memory in found if memory.decoding]
    if together and min(together) < max(together):  # all stages decode the same sequences
        found = ranks(replace(workload, max_batch_size=min(together)))
    return max(found, key=lambda memory: memory.total)


def _rank_memory(
    policy: Shape | None,
    discriminator: Shape | None,
    workload: Workload,
    prompts: int,
    parallel: ParallelConfig,
    world_size: int,
    settings: Settings,
    overhead: Overhead,
    capacity: float | None,
    stage: int,
) -> Memory:
    states = [model_state(shape, parallel, world_size, settings, stage) if shape else None for shape in (policy, discriminator)]
    phases: dict[str, float] = {}
    passes = {"policy update": NOTHING, "discriminator update": NOTHING}
    for name, shape, pack in (
        ("policy update", policy, policy_passes),
        ("discriminator update", discriminator, discriminator_passes),
    ):
        if shape is not None:
            packed = pack(workload, prompts)
            passes[name] = training_pass(shape, packed.row, packed.num_rows, parallel, settings, stage)
            phases[name] = passes[name].total
    phases["optimizer step"] = max(state.optimizer_step for state in states if state)
    resident = sum(state.total for state in states if state)
    rollout = None
    if policy is not None and workload.samples:
        room = None if capacity is None else (capacity - overhead.fixed) / (1 + overhead.fragmentation) - resident
        rollout = fitting_decoding(policy, workload, prompts, parallel, settings.cost, room, stage)
        phases["rollout"] = rollout.total
    lost = overhead.fixed + overhead.fragmentation * (resident + max(phases.values()))
    return Memory(
        stage,
        policy=states[0],
        discriminator=states[1],
        policy_pass=passes["policy update"],
        discriminator_pass=passes["discriminator update"],
        decoding=rollout,
        overhead=lost,
        phases=phases,
    )


def fitting_decoding(
    shape: Shape,
    workload: Workload,
    prompts: int,
    parallel: ParallelConfig,
    cost: Cost,
    room: float | None,
    stage: int = 0,
) -> Decoding:
    """The largest halving of `max_batch_size` that fits `room` bytes; one sequence where even that does not."""
    sequences = min(workload.max_batch_size, prompts * workload.rollouts)
    while True:
        found = decoding(shape, workload, sequences, parallel, cost, stage)
        if room is None or sequences == 1 or found.total <= room:
            return found
        sequences = max(1, sequences // 2)
