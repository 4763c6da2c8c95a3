"""Memory of one rank, by what it is for. Everything in bytes.

Nothing here was fitted: every term is what a part of the engine allocates (`engine/optimizer.py`, `engine/logprobs.py`,
`rollout/cache.py`, the modules), and `tools/bench/plan_memory.py` measures how far the sum is from real runs.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import lru_cache
from math import lcm

from prism_nemo.config.schema import ParallelConfig
from prism_nemo.plan.activations import FP32, Row, layer_workspace, logits_workspace, saved_bytes
from prism_nemo.plan.decoding import Decoding, fitting_decoding
from prism_nemo.plan.parameters import expert_tensor_size, rank_parameters, stage_layers
from prism_nemo.plan.placed import Placed, Settings
from prism_nemo.plan.shapes import Shape
from prism_nemo.plan.workload import Workload, prompts_per_rank


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


NOTHING = Pass(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Memory:
    """The rank that needs most; `stage` is its pipeline stage, of the policy where there is one. Absent parts are zero."""

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


@dataclass(frozen=True)
class Overhead:
    """Assumed, not modelled."""

    fixed: float  # CUDA context, libraries' workspaces, NCCL's buffers
    fragmentation: float  # share of everything else that the caching allocator holds and cannot use


@dataclass(frozen=True)
class Needs:
    """What one model needs on the ranks of one of its pipeline stages."""

    state: ModelState
    training: Pass


@lru_cache(1024)
def stage_needs(model: Placed, workload: Workload, world_size: int) -> tuple[Needs, ...]:
    """By pipeline stage."""
    packed = model.passes(workload, world_size)
    return tuple(
        Needs(
            model_state(model.shape, model.parallel, world_size, model.settings, stage),
            training_pass(model.shape, packed.row, packed.num_rows, model.parallel, model.settings, stage),
        )
        for stage in range(model.parallel.pipeline_model_parallel_size)
    )


def stage_memory(
    policy: Placed | None,
    discriminator: Placed | None,
    workload: Workload,
    world_size: int,
    overhead: Overhead,
    *,
    capacity: float | None = None,
) -> Memory:
    """Memory of the rank that needs most.

    With `capacity` (bytes of a GPU) as many sequences are decoded together as leave room, at least one, at most
    `workload.max_batch_size`; without, that many. Raises LayoutError when the batch does not divide over the ranks.
    """
    main = policy or discriminator
    assert main is not None
    prompts = prompts_per_rank(workload, main.parallel, world_size)
    stages = [model.parallel.pipeline_model_parallel_size for model in (policy, discriminator) if model]
    parts = lcm(*stages)  # ranks go through the stages in order, whatever the layout
    places = sorted({tuple(part * count // parts for count in stages) for part in range(parts)})

    def ranks(work: Workload) -> list[Memory]:
        return [_rank_memory(policy, discriminator, work, prompts, world_size, overhead, capacity, place) for place in places]

    found = ranks(workload)
    together = [memory.decoding.sequences for memory in found if memory.decoding]
    if together and min(together) < max(together):  # all stages decode the same sequences
        found = ranks(replace(workload, max_batch_size=min(together)))
    return max(found, key=lambda memory: memory.total)


def _rank_memory(
    policy: Placed | None,
    discriminator: Placed | None,
    workload: Workload,
    prompts: int,
    world_size: int,
    overhead: Overhead,
    capacity: float | None,
    place: tuple[int, ...],
) -> Memory:
    """Of a rank that is in stage `place[0]` of the first of the models and in `place[-1]` of the last."""
    of_policy = stage_needs(policy, workload, world_size)[place[0]] if policy else None
    of_discriminator = stage_needs(discriminator, workload, world_size)[place[-1]] if discriminator else None
    needs = {"policy update": of_policy, "discriminator update": of_discriminator}
    phases = {name: need.training.total for name, need in needs.items() if need}
    phases["optimizer step"] = max(need.state.optimizer_step for need in needs.values() if need)
    resident = sum(need.state.total for need in needs.values() if need)
    rollout = None
    if policy is not None and workload.samples:
        room = None if capacity is None else (capacity - overhead.fixed) / (1 + overhead.fragmentation) - resident
        rollout = fitting_decoding(policy, workload, prompts, room, place[0])
        phases["rollout"] = rollout.total
    return Memory(
        place[0],
        policy=of_policy.state if of_policy else None,
        discriminator=of_discriminator.state if of_discriminator else None,
        policy_pass=of_policy.training if of_policy else NOTHING,
        discriminator_pass=of_discriminator.training if of_discriminator else NOTHING,
        decoding=rollout,
        overhead=overhead.fixed + overhead.fragmentation * (resident + max(phases.values())),
        phases=phases,
    )
