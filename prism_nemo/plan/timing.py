"""How long a step takes: an estimate from operations, bytes and the assumptions in `hardware.py`. Not verified on hardware.

Forward costs 2 operations a parameter and token, backward twice that; full recompute adds a forward. Work over ranks adds up with
what they say to one another: no overlap is counted, the engine asks for none.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from math import ceil

from prism_nemo.config.layout import data_parallel_size
from prism_nemo.config.schema import ParallelConfig
from prism_nemo.plan.activations import FP32, Attention, Recompute, is_sequence_parallel, saved_bytes
from prism_nemo.plan.hardware import ASSUMPTIONS as A
from prism_nemo.plan.hardware import GPU
from prism_nemo.plan.memory import Memory, ModelState, replicas, stage_needs
from prism_nemo.plan.parameters import (
    expert_parameters,
    expert_tensor_size,
    layer_parameters,
    rank_parameters,
    stage_layers,
    vision_parameters,
)
from prism_nemo.plan.placed import Placed, Settings
from prism_nemo.plan.shapes import Shape
from prism_nemo.plan.workload import Passes, Workload, prompts_per_rank

GIGA, TERA, MICRO = 1e9, 1e12, 1e-6
_LOGITS_PASSES = 4  # forward, again in backward, and the gradients of both factors


@dataclass(frozen=True)
class Cluster:
    gpu: GPU
    nodes: int
    gpus_per_node: int

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node

    def link(self, ranks: int) -> float:
        """Bytes a second out of one GPU to others of a group of neighbouring ranks."""
        inside = ranks <= self.gpus_per_node
        gpu = self.gpu
        return (gpu.nvlink_gb_s * A.nvlink_share if inside else gpu.network_gb_s * A.network_share) * GIGA

    @property
    def memory_bytes_s(self) -> float:
        return self.gpu.memory_tb_s * A.memory_share * TERA

    def matmul_ops_s(self, settings: Settings) -> float:
        """Of the data sheet, before any share."""
        return (self.gpu.fp32_tflops if settings.cost.is_fp32 else self.gpu.bf16_tflops) * TERA


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by phase, communication among them. `tokens` ran through the trained model, on all ranks."""

    phases: dict[str, float]
    communication: float
    tokens: int

    @property
    def total(self) -> float:
        return sum(self.phases.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.total


def step_time(
    policy: Placed | None, discriminator: Placed | None, workload: Workload, cluster: Cluster, memory: Memory
) -> StepTime:
    """One step of a stage whose memory is known."""
    phases: dict[str, float] = {}
    communication = 0.0
    if policy is not None and memory.decoding is not None:
        phases["rollout"], said = rollout_time(policy, workload, cluster, memory.decoding.sequences)
        communication += said
    for name, model in (("discriminator", discriminator), ("policy", policy)):
        if model is not None:
            phases[name], said = update_time(model, workload, cluster)
            communication += said
    trained = policy or discriminator
    assert trained is not None
    world_size = cluster.world_size
    tokens = trained.passes(workload, world_size).tokens * trained.data_parallel_size(world_size)
    return StepTime(phases, communication, tokens)


@lru_cache(1024)
def update_time(model: Placed, workload: Workload, cluster: Cluster) -> tuple[float, float]:
    """Seconds of one model's forward and backward passes and its optimizer step, and those of talk in them."""
    shape, parallel, settings = model.shape, model.parallel, model.settings
    work, said = _update(shape, model.passes(workload, cluster.world_size), parallel, cluster, settings)
    reducing = _reduce_gradients(shape, parallel, cluster, settings)
    state = max(
        (needs.state for needs in stage_needs(model, workload, cluster.world_size)), key=lambda state: state.own_parameters
    )
    return work + said + reducing + _optimizer(state, cluster, settings), said + reducing


def _update(shape: Shape, passes: Passes, parallel: ParallelConfig, cluster: Cluster, settings: Settings) -> tuple[float, float]:
    """Seconds of work and of talk in forward and backward of all rows of a rank, the pipeline's idle time in the first."""
    tp, pp, cp = (
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
    )
    recompute = settings.cost.recompute
    of_rest = 3 + (recompute is Recompute.full)
    of_mlp = of_rest + recompute.covers_mlp
    peak, ranks = cluster.matmul_ops_s(settings), tp * pp * cp
    mlp = 3 * shape.hidden_size * shape.ffn_hidden_size if shape.experts is None else 0
    per_token = of_rest * (layer_parameters(shape).split - mlp) + of_mlp * mlp
    dense = 2 * shape.num_layers * per_token * passes.tokens
    head = 0 if shape.is_discriminator else 2 * _LOGITS_PASSES * shape.vocab_size * shape.hidden_size * passes.labels
    experts = 0.0
    if shape.experts is not None:
        routed = shape.experts.topk * expert_parameters(shape) * shape.num_layers * passes.tokens
        experts = 2 * of_mlp * routed * A.expert_imbalance
    pairs = passes.num_groups * (passes.prefix**2 / 2 + passes.segments * passes.segment * (passes.prefix + passes.segment / 2))
    attention = 4 * shape.query_width * shape.num_layers * pairs * (3.5 + (recompute is Recompute.full or recompute.covers_core))
    language = dense / A.matmul_share + experts / A.expert_matmul_share + attention / A.attention_share + head / A.matmul_share
    local_layers = max(stage_layers(shape, parallel, stage) for stage in range(pp))
    seconds = language / peak / ranks * (local_layers * pp / shape.num_layers)
    everything = replace(settings.cost, recompute=Recompute.none)
    saved = saved_bytes(shape, passes.row, parallel, everything)
    seconds += passes.num_rows * local_layers * saved.per_layer * A.elementwise_passes / cluster.memory_bytes_s
    kernels = of_rest * A.layer_kernels + of_mlp * _local_experts(shape, parallel) * A.expert_kernels
    seconds = max(seconds, passes.num_rows * local_layers * kernels * A.launch_us * MICRO)
    seconds += _vision(shape, passes, settings) * passes.row.vision_share(parallel) / peak / tp / A.vision_share
    idle = (pp - 1) / (passes.num_rows * (parallel.virtual_pipeline_model_parallel_size or 1))
    rounds = (of_rest + of_mlp) / 2 - 1  # half of a layer's talk is its MLP's
    said = passes.num_rows * _talk(shape, passes.row.tokens, parallel, cluster, settings, rounds=rounds)
    return seconds * (1 + idle), said


def _vision(shape: Shape, passes: Passes, settings: Settings) -> float:
    """Operations of the tower for all images of a rank; every prompt's image is one."""
    vision = shape.vision
    patches = passes.visual_tokens * vision.patches_per_token
    products = 2 * vision_parameters(vision).split * patches + 4 * vision.hidden_size * vision.depth * patches**2
    return passes.num_groups * products * (3 if settings.cost.vision_is_trained else 1)


def _talk(shape: Shape, tokens: float, parallel: ParallelConfig, cluster: Cluster, settings: Settings, *, rounds: float) -> float:
    """Seconds of collectives for one row: `rounds` passes through all layers of a stage (forward and backward: 2)."""
    tp, cp, ep = parallel.tensor_model_parallel_size, parallel.context_parallel_size, parallel.expert_model_parallel_size
    b, layers = settings.cost.value_bytes, shape.num_layers / parallel.pipeline_model_parallel_size
    hidden = b * shape.hidden_size * tokens / cp
    latency = A.collective_us * MICRO
    seconds = 0.0
    if tp > 1:  # two reductions over the ranks a layer, or as much in halves with sequence parallelism
        seconds += 2 * layers * (2 * hidden * (tp - 1) / tp / cluster.link(tp) + latency)
    if cp > 1:
        keys = 2 * b * shape.key_width / tp * tokens * (cp - 1) / cp
        seconds += layers * (keys / cluster.link(tp * cp) + latency)
    if shape.experts is not None and ep > 1:
        local = hidden / tp if is_sequence_parallel(shape, parallel) else hidden
        sent = local * shape.experts.topk * (ep - 1) / ep * A.expert_imbalance
        seconds += 2 * layers * (sent / cluster.link(ep * expert_tensor_size(parallel)) + latency)
    if parallel.pipeline_model_parallel_size > 1:
        chunks = parallel.virtual_pipeline_model_parallel_size or 1
        seconds += chunks * (hidden / cluster.link(cluster.world_size) + latency)
    return rounds * seconds


def _reduce_gradients(shape: Shape, parallel: ParallelConfig, cluster: Cluster, settings: Settings) -> float:
    """Summing fp32 gradients over the replicas; with the distributed optimizer half of it, and weights gathered after."""
    held = rank_parameters(shape, parallel)
    seconds = 0.0
    for count, copies in zip((held.dense, held.experts), replicas(parallel, cluster.world_size), strict=True):
        if copies > 1 and count:
            each = FP32 + settings.cost.value_bytes if parallel.use_distributed_optimizer else 2 * FP32
            seconds += count * each * (copies - 1) / copies / cluster.link(cluster.world_size)
    return seconds


def _optimizer(state: ModelState, cluster: Cluster, settings: Settings) -> float:
    seconds = state.own_parameters * A.optimizer_bytes / cluster.memory_bytes_s
    if settings.cpu_offload:  # its state comes and goes
        seconds += 2 * 3 * FP32 * state.own_parameters / (A.host_gb_s * GIGA)
    return seconds


@lru_cache(4096)
def rollout_time(model: Placed, workload: Workload, cluster: Cluster, at_once: int) -> tuple[float, float]:
    """Seconds of sampling, and of the talk in it: every response has the given length, sequences come in waves of `at_once`."""
    shape, parallel, settings = model.shape, model.parallel, model.settings
    prompts = prompts_per_rank(workload, parallel, cluster.world_size)
    tp, b = parallel.tensor_model_parallel_size, settings.cost.value_bytes
    waves = ceil(prompts * workload.rollouts / at_once)
    peak = cluster.matmul_ops_s(settings) * A.matmul_share
    products = 2 * _touched(shape, 1) / tp
    prefill = products * prompts * workload.prompt_tokens / peak
    local_experts = _local_experts(shape, parallel)
    held = rank_parameters(shape, parallel)
    read = b * (shape.num_layers * layer_parameters(shape).split / tp + shape.vocab_size * shape.hidden_size / tp)
    if shape.experts is not None and held.experts:
        choices = at_once * shape.experts.topk * data_parallel_size(parallel, cluster.world_size)
        share = 1 - (1 - 1 / shape.experts.count) ** choices  # of the experts that some token chose
        read += b * held.experts * parallel.pipeline_model_parallel_size * share
    cached = ceil(at_once / workload.rollouts) * workload.prompt_tokens + at_once * workload.response_tokens / 2
    copies = 1 if settings.cost.is_fp32 or settings.cost.attention is Attention.cpu else 1 + 2 * FP32 / b
    read += cached * 2 * shape.key_width / tp * b * shape.num_layers * copies
    launch = shape.num_layers * (A.layer_kernels + local_experts * A.expert_kernels) * A.launch_us * MICRO
    step = max(read / cluster.memory_bytes_s + products * at_once / peak, launch)
    # one stage works at a time: every token waits for all layers
    said = _talk(shape, at_once, parallel, cluster, settings, rounds=parallel.pipeline_model_parallel_size)
    steps = waves * workload.response_tokens
    return prefill + steps * (step + said), steps * said


def _local_experts(shape: Shape, parallel: ParallelConfig) -> int:
    return shape.experts.count // parallel.expert_model_parallel_size if shape.experts else 0


def _touched(shape: Shape, tokens: int) -> float:
    """Parameters that so many tokens are multiplied with, the output weight included."""
    per_layer = layer_parameters(shape).split
    if shape.experts is not None:
        per_layer += shape.experts.topk * expert_parameters(shape)
    return tokens * (shape.num_layers * per_layer + shape.vocab_size * shape.hidden_size)
