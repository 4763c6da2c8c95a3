"""Layouts that fit a cluster, the quickest first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import gcd

from prism_nemo.config.layout import data_parallel_size
from prism_nemo.config.schema import ParallelConfig
from prism_nemo.errors import LayoutError, PrismError
from prism_nemo.plan.activations import Recompute
from prism_nemo.plan.hardware import ASSUMPTIONS, GIB, GPUS
from prism_nemo.plan.layouts import Layout, about_the_discriminator, check, describe_layout, layout_of
from prism_nemo.plan.memory import Memory, Overhead, stage_memory, stage_needs
from prism_nemo.plan.placed import Placed, Settings
from prism_nemo.plan.shapes import Shape
from prism_nemo.plan.timing import Cluster, StepTime, step_time, update_time
from prism_nemo.plan.workload import Workload, prompts_per_rank

POWERS = (1, 2, 4, 8, 16, 32, 64, 128)
RECOMPUTE = (Recompute.none, Recompute.mlp, Recompute.full)  # attention's own is little on a GPU


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
    def models(self) -> tuple[Shape | None, Shape | None]:
        return self.policy, self.discriminator

    @property
    def shapes(self) -> list[Shape]:
        return [shape for shape in self.models if shape is not None]


@dataclass(frozen=True)
class Plan:
    """One layout with what it needs and how long its step takes."""

    parallel: ParallelConfig
    settings: Settings
    own: Layout | None  # the discriminator's, where it is not cut as the policy is
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

    @property
    def rank(self) -> tuple[bool, float]:
        """For sorting: those that fit first, the quickest first; of those that do not, the least demanding first."""
        return not self.fits, self.time.total if self.fits else -self.spare


def evaluate(job: Job, layout: Layout, own: Layout | None = None) -> Plan:
    """Memory and time of one layout, the discriminator's `own` beside it. Raises LayoutError when it is impossible."""
    if own is None:
        check(job.shapes, layout, job.cluster.world_size)
        policy, discriminator = (layout.of(shape) if shape else None for shape in job.models)
        return _plan(job, layout, None, policy, discriminator)
    assert job.policy is not None and job.discriminator is not None
    check([job.policy], layout, job.cluster.world_size)
    with about_the_discriminator():
        check([job.discriminator], own, job.cluster.world_size)
    return _plan(job, layout, own, layout.of(job.policy), own.of(job.discriminator))


def _plan(job: Job, layout: Layout, own: Layout | None, policy: Placed | None, discriminator: Placed | None) -> Plan:
    """Of layouts that were checked. Raises LayoutError when the batch does not divide."""
    capacity = job.cluster.gpu.memory_gib * GIB
    overhead = Overhead(ASSUMPTIONS.framework_gib * GIB, ASSUMPTIONS.fragmentation)
    memory = stage_memory(policy, discriminator, job.workload, job.cluster.world_size, overhead, capacity=capacity)
    time = step_time(policy, discriminator, job.workload, job.cluster, memory)
    return Plan(layout.parallel, layout.settings, own, memory, time, capacity)


def search(job: Job, own: Layout | None = None) -> list[Plan]:
    """Every layout that is possible, with the best of the discriminator's (`own`, where it is given) where that is another.

    Sorted by `Plan.rank`. The optimizer is offloaded only where nothing fits otherwise. Raises LayoutError when none is possible
    at all.
    """
    if own is not None and job.discriminator is not None:
        with about_the_discriminator():
            check([job.discriminator], own, job.cluster.world_size)
    plans = [plan for round_ in _rounds(job, own) for plan in round_]
    if not plans:
        raise _impossible(job)
    return sorted(plans, key=lambda plan: plan.rank)


def _rounds(job: Job, own: Layout | None) -> Iterator[list[Plan]]:
    plans = list(_evaluate_all(job, own))
    yield plans
    if not job.settings.cost.is_fp32 and not any(plan.fits for plan in plans):
        yield list(_evaluate_all(replace(job, settings=replace(job.settings, cpu_offload=True)), own))


def _evaluate_all(job: Job, own: Layout | None) -> Iterator[Plan]:
    """One plan for every layout of the policy: the better one of the discriminator cut as it is and in another way."""
    apart = _own_layouts(job, own)
    for layout in candidates(job):
        plans = []
        if own is None:
            with suppress(LayoutError):
                plans.append(evaluate(job, layout))
        if apart:
            with suppress(LayoutError):
                plans += _beside(job, layout, apart)
        if plans:
            yield min(plans, key=lambda plan: plan.rank)


def _beside(job: Job, layout: Layout, apart: Sequence[tuple[Layout, Placed]]) -> Iterator[Plan]:
    """The policy cut so, beside the discriminator's layouts, the quickest first, as long as a slower one may be better.

    Raises LayoutError when the policy cannot be cut so.
    """
    assert job.policy is not None
    check([job.policy], layout, job.cluster.world_size)
    policy = layout.of(job.policy)
    prompts = prompts_per_rank(job.workload, layout.parallel, job.cluster.world_size)
    alone = max(needs.state.total + needs.training.total for needs in stage_needs(policy, job.workload, job.cluster.world_size))
    if alone > job.cluster.gpu.memory_gib * GIB:  # there is no room for any: the smallest stands for all
        apart = [min(apart, key=lambda other: _costs(job, other[1])[0])]
    most = min(job.workload.max_batch_size, prompts * job.workload.rollouts)  # decoded together where there is room
    for own, discriminator in apart:
        plan = _plan(job, layout, own, policy, discriminator)
        yield plan
        if plan.fits and plan.memory.decoding is not None and plan.memory.decoding.sequences == most:
            return


def _own_layouts(job: Job, own: Layout | None) -> list[tuple[Layout, Placed]]:
    """The discriminator's layouts beside a policy's (`own` alone, where it is given): none that another beats in memory and in
    time, the quickest first."""
    if job.policy is None or job.discriminator is None:
        return []
    if own is not None:
        return [(own, own.of(job.discriminator))]
    world, experts = job.cluster.world_size, job.discriminator.experts
    tensor = [size for size in POWERS[:4] if size <= job.cluster.gpus_per_node]
    expert = [size for size in POWERS if experts is not None and experts.count % size == 0] or [1]
    kept: list[tuple[tuple[float, ...], Layout, Placed]] = []
    for tp, ep, again in itertools.product(tensor, expert, RECOMPUTE):
        layout = layout_of(job.settings, tp=tp, ep=ep, replicas=world // tp, recompute=again)
        with suppress(LayoutError):
            check([job.discriminator], layout, world)
            placed = layout.of(job.discriminator)
            costs = _costs(job, placed)
            if not any(_beats(other, costs) for other, *_ in kept):
                kept = [entry for entry in kept if not _beats(costs, entry[0])] + [(costs, layout, placed)]
    return [(layout, placed) for _, layout, placed in sorted(kept, key=lambda entry: entry[0][-1])]


def _costs(job: Job, discriminator: Placed) -> tuple[float, ...]:
    needs = stage_needs(discriminator, job.workload, job.cluster.world_size)[0]
    seconds, _ = update_time(discriminator, job.workload, job.cluster)
    return needs.state.total, needs.training.total, needs.state.optimizer_step, seconds


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return all(mine <= its for mine, its in zip(one, other, strict=True))


def candidates(job: Job) -> Iterator[Layout]:
    """Layouts worth a look: tensor parallelism within a machine, always with sequence parallelism and, where there are replicas,
    the distributed optimizer. Whether they are possible is for `check`."""
    world = job.cluster.world_size
    experts = [shape.experts.count for shape in job.shapes if shape.experts is not None]
    tensor = [size for size in POWERS if size <= job.cluster.gpus_per_node]
    pipeline = [size for size in POWERS[:5] if size <= world]
    context = POWERS[:4]
    expert = [size for size in POWERS if size <= world and any(count % size == 0 for count in experts)] if experts else [1]
    chunks = (None, 2)
    for tp, pp, cp, ep, vpp, again in itertools.product(tensor, pipeline, context, expert, chunks, RECOMPUTE):
        if world % (tp * pp * cp) or (vpp and pp == 1):
            continue
        first = _first_stage(job, pp) if vpp is None else None
        replicas = world // (tp * pp)
        yield layout_of(job.settings, tp=tp, pp=pp, cp=cp, ep=ep, vpp=vpp, first=first, replicas=replicas, recompute=again)


def _first_stage(job: Job, pp: int) -> int | None:
    """Layers of the first stage, which has the vision tower too, where they do not divide: what the others leave."""
    layers = job.shapes[0].num_layers
    left = layers - (pp - 1) * -(-layers // pp)
    return left if layers % pp and left > 0 else None


def best(job: Job, own: Layout | None = None) -> list[Plan]:
    """The layouts that fit, the quickest first. Raises PlanError, saying how much is missing and what would help."""
    plans = search(job, own)
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
    return any(plan.fits for plans in _rounds(job, None) for plan in plans)


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
    largest = min(job.cluster.gpus_per_node, job.shapes[0].num_kv_heads)
    needed = world // gcd(world, largest)
    return LayoutError(
        f"no layout of {len(job.shapes)} model(s) divides over {world} GPUs with a global batch of {batch}",
        where="--nodes, --gpus-per-node, --global-batch",
        remedy=f"a global batch that is a multiple of {needed} (tensor parallelism goes up to {largest}), or fewer GPUs",
    )


def describe(plan: Plan) -> str:
    """`tp=2 pp=2 dp=2 sp ...`, leaving out what is 1, and the discriminator's where it is another."""
    said = describe_layout(Layout(plan.parallel, plan.settings))
    return said if plan.own is None else f"{said}; discriminator {describe_layout(plan.own)}"


def data_parallel(plan: Plan, cluster: Cluster) -> int:
    return data_parallel_size(plan.parallel, cluster.world_size)
