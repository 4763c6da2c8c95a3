"""Layouts that fit a cluster, the quickest first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import gcd

from prism_nemo.config.layout import ModelSizes, check_model, check_parallel, data_parallel_size, model_sizes
from prism_nemo.config.schema import ParallelConfig, RecomputeGranularity, RecomputeModule
from prism_nemo.errors import LayoutError, PrismError
from prism_nemo.plan.activations import Recompute
from prism_nemo.plan.hardware import ASSUMPTIONS, GIB, GPUS
from prism_nemo.plan.memory import Memory, Overhead, Settings, stage_memory
from prism_nemo.plan.shapes import Shape
from prism_nemo.plan.timing import Cluster, StepTime, step_time
from prism_nemo.plan.workload import Workload

POWERS = (1, 2, 4, 8, 16, 32, 64, 128)


class PlanError(PrismError):
    """Nothing fits."""


@dataclass(frozen=True)
class Job:
    """What is to run where. At least one of the models is there; `settings` is the starting point of a search."""

    policy: Shape | None
    discriminator: Shape | None
    workload: Workload
    cluster: Cluster
    settings: Settings

    @property
    def shapes(self) -> list[Shape]:
        return [shape for shape in (self.policy, self.discriminator) if shape is not None]


@dataclass(frozen=True)
class Plan:
    """One layout with what it needs and how long its step takes."""

    parallel: ParallelConfig
    settings: Settings
    memory: Memory
    time: StepTime
    capacity: float  # bytes of a GPU

    @property
    def spare(self) -> float:
        """Bytes left on the fullest GPU; negative when it does not fit."""
        return self.capacity - self.memory.total

    @property
    def fits(self) -> bool:
        return self.spare >= 0


def sizes_of(shape: Shape) -> ModelSizes:
    """What `config.layout` checks a layout against."""
    sizes = model_sizes(dict(shape.config), shape.name)
    if shape.is_discriminator and shape.experts is not None:
        sizes = replace(sizes, num_experts=shape.experts.count, moe_ffn_hidden_size=shape.experts.ffn_hidden_size)
    return sizes


def evaluate(job: Job, parallel: ParallelConfig, settings: Settings) -> Plan:
    """Memory and time of one layout. Raises LayoutError when it is impossible."""
    check_parallel(parallel, job.cluster.world_size)
    for shape in job.shapes:
        check_model(sizes_of(shape), parallel)
    if settings.cpu_offload and settings.cost.is_fp32:
        raise LayoutError("only a bf16 model's optimizer can be offloaded", where="--layout: offload", remedy="--precision bf16")
    capacity = job.cluster.gpu.memory_gib * GIB
    overhead = Overhead(ASSUMPTIONS.framework_gib * GIB, ASSUMPTIONS.fragmentation)
    memory = stage_memory(
        job.policy,
        job.discriminator,
        job.workload,
        parallel,
        job.cluster.world_size,
        settings,
        overhead,
        capacity=capacity,
    )
    time = step_time(job.policy, job.discriminator, job.workload, parallel, job.cluster, settings, memory)
    return Plan(parallel, settings, memory, time, capacity)


def search(job: Job) -> list[Plan]:
    """Every layout that is possible, those that fit first, the quickest first; of those that do not, the least demanding first.

    The optimizer is offloaded only where nothing fits otherwise. Raises LayoutError when none is possible at all.
    """
    plans = list(_evaluate_all(job, job.settings))
    if not job.settings.cost.is_fp32 and not any(plan.fits for plan in plans):
        plans += _evaluate_all(job, replace(job.settings, cpu_offload=True))
    if not plans:
        raise _impossible(job)
    return sorted(plans, key=lambda plan: (not plan.fits, plan.time.total if plan.fits else -plan.spare))


def _evaluate_all(job: Job, settings: Settings) -> Iterator[Plan]:
    for parallel, recompute in candidates(job):
        chosen = replace(settings, cost=replace(settings.cost, recompute=recompute))
        try:
            yield evaluate(job, parallel, chosen)
        except LayoutError:
            continue


def candidates(job: Job) -> Iterator[tuple[ParallelConfig, Recompute]]:
    """Layouts worth a look: tensor parallelism within a machine, always with sequence parallelism and, where there are replicas,
    the distributed optimizer. Whether they are possible is for `evaluate`."""
    world = job.cluster.world_size
    experts = [shape.experts.count for shape in job.shapes if shape.experts is not None]
    tensor = [size for size in POWERS if size <= job.cluster.gpus_per_node]
    pipeline = [size for size in POWERS[:5] if size <= world]
    context = POWERS[:4]
    expert = [size for size in POWERS if size <= world and all(count % size == 0 for count in experts)] if experts else [1]
    chunks = (None, 2)
    recompute = (Recompute.none, Recompute.mlp, Recompute.full)  # attention's own is little on a GPU
    for tp, pp, cp, ep, vpp, again in itertools.product(tensor, pipeline, context, expert, chunks, recompute):
        if world % (tp * pp * cp) or (vpp and pp == 1):
            continue
        first = _first_stage(job, pp) if vpp is None else None
        yield layout(tp=tp, pp=pp, cp=cp, ep=ep, vpp=vpp, first=first, replicas=world // (tp * pp), recompute=again), again


def _first_stage(job: Job, pp: int) -> int | None:
    """Layers of the first stage, which has the vision tower too, where they do not divide: what the others leave."""
    layers = job.shapes[0].num_layers
    left = layers - (pp - 1) * -(-layers // pp)
    return left if layers % pp and left > 0 else None


def layout(
    *,
    tp: int,
    pp: int,
    cp: int,
    ep: int,
    vpp: int | None,
    first: int | None,
    replicas: int,
    recompute: Recompute = Recompute.none,
) -> ParallelConfig:
    """The configuration, with what goes with it."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        num_layers_in_first_pipeline_stage=first,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        sequence_parallel=tp > 1,
        use_distributed_optimizer=replicas > 1,
    )
    return with_recompute(parallel, recompute)


def with_recompute(parallel: ParallelConfig, recompute: Recompute) -> ParallelConfig:
    """The configuration's keys for it."""
    if recompute is Recompute.none:
        return replace(parallel, recompute_granularity=None)
    if recompute is Recompute.full:
        return replace(parallel, recompute_granularity=RecomputeGranularity.full)
    modules = [RecomputeModule(name) for name in recompute.value.split("+")]
    return replace(parallel, recompute_granularity=RecomputeGranularity.selective, recompute_modules=modules)


def best(job: Job) -> list[Plan]:
    """The layouts that fit, the quickest first. Raises PlanError, saying how much is missing and what would help."""
    plans = search(job)
    fitting = [plan for plan in plans if plan.fits]
    if fitting:
        return fitting
    raise _nothing_fits(job, plans[0])


def does_not_fit(job: Job, plan: Plan) -> PlanError:
    """The error of one layout that was given."""
    fitting = [other for other in search(job) if other.fits]
    remedy = f"this one does: {describe(fitting[0])}" if fitting else _what_would_help(job)
    return PlanError(f"the layout does not fit: {_missing(plan)}", where=_where(job), remedy=remedy)


def _nothing_fits(job: Job, closest: Plan) -> PlanError:
    what = f"nothing fits: of the least demanding layout ({describe(closest)}), {_missing(closest)}"
    return PlanError(what, where=_where(job), remedy=_what_would_help(job))


def _missing(plan: Plan) -> str:
    memory = plan.memory
    return (
        f"the fullest GPU needs {memory.total / GIB:.1f} GiB ({memory.state / GIB:.1f} for the models' state, "
        f"{memory.phases[memory.peak_phase] / GIB:.1f} for the {memory.peak_phase}), {-plan.spare / GIB:.1f} GiB more than it has"
    )


def _where(job: Job) -> str:
    cluster = job.cluster
    return f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name} with {cluster.gpu.memory_gib:g} GiB each"


def _what_would_help(job: Job) -> str:
    """Changes after which something fits, each tried."""
    found = [f"more machines: --nodes {nodes}" for nodes in _enough_nodes(job)]
    found += [f"GPUs with more memory: --gpu {name}" for name in _larger_gpus(job)]
    shorter = _shorter_rows(job)
    if shorter:
        found.append(f"shorter rows: trainer.max_tokens_per_row={shorter}, with texts that fit it")
    if job.settings.cost.vision_is_trained and _fits(replace(job, settings=_frozen(job.settings))):
        found.append("a frozen vision tower: --freeze-vision")
    return "; or ".join(found) if found else "a smaller model: up to 64 nodes do not hold this one"


def _fits(job: Job) -> bool:
    try:
        return any(plan.fits for plan in search(job))
    except LayoutError:
        return False


def _enough_nodes(job: Job) -> list[int]:
    for nodes in POWERS[:7]:
        if nodes > job.cluster.nodes and _fits(replace(job, cluster=replace(job.cluster, nodes=nodes))):
            return [nodes]
    return []


def _larger_gpus(job: Job) -> list[str]:
    larger = sorted((gpu for gpu in GPUS.values() if gpu.memory_gib > job.cluster.gpu.memory_gib), key=lambda gpu: gpu.memory_gib)
    return [gpu.name for gpu in larger if _fits(replace(job, cluster=replace(job.cluster, gpu=gpu)))][:1]


def _shorter_rows(job: Job) -> int | None:
    """Half, a quarter, an eighth of the row, with the texts in it."""
    work = job.workload
    for parts in (2, 4, 8):
        cut = replace(
            work,
            row_tokens=work.row_tokens // parts,
            prompt_tokens=work.prompt_tokens // parts,
            response_tokens=work.response_tokens // parts,
            image_tokens=work.image_tokens // parts,
        )
        if cut.prompt_tokens and cut.response_tokens and _fits(replace(job, workload=cut)):
            return cut.row_tokens
    return None


def _frozen(settings: Settings) -> Settings:
    return replace(settings, cost=replace(settings.cost, vision_is_trained=False))


def _impossible(job: Job) -> LayoutError:
    """No layout passes the checks: nearly always the batch does not divide."""
    world, batch = job.cluster.world_size, job.workload.global_batch
    largest = min(job.cluster.gpus_per_node, gcd(*(shape.num_kv_heads for shape in job.shapes)))
    needed = world // gcd(world, largest)
    return LayoutError(
        f"no layout of {len(job.shapes)} model(s) divides over {world} GPUs with a global batch of {batch}",
        where="--nodes, --gpus-per-node, --global-batch",
        remedy=f"a global batch that is a multiple of {needed} (tensor parallelism goes up to {largest}), or fewer GPUs",
    )


def describe(plan: Plan) -> str:
    """`tp=2 pp=2 dp=2 sp ...`, leaving out what is 1."""
    parallel = plan.parallel
    sizes = {
        "tp": parallel.tensor_model_parallel_size,
        "pp": parallel.pipeline_model_parallel_size,
        "vpp": parallel.virtual_pipeline_model_parallel_size or 1,
        "first": parallel.num_layers_in_first_pipeline_stage or 1,
        "last": parallel.num_layers_in_last_pipeline_stage or 1,
        "cp": parallel.context_parallel_size,
        "ep": parallel.expert_model_parallel_size,
        "etp": parallel.expert_tensor_parallel_size or 1,
    }
    parts = [f"{name}={size}" for name, size in sizes.items() if size > 1]
    parts += ["sp"] if parallel.sequence_parallel else []
    recompute = plan.settings.cost.recompute
    parts += [f"recompute={recompute}"] if recompute is not Recompute.none else []
    parts += ["offload"] if plan.settings.cpu_offload else []
    return " ".join(parts) or "data-parallel only"


def data_parallel(plan: Plan, cluster: Cluster) -> int:
    return data_parallel_size(plan.parallel, cluster.world_size)
