"""Plans as text, as JSON, and as a file for conf/parallel."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from prism_nemo.config.layers import GLOBAL_PACKAGE
from prism_nemo.config.layout import data_parallel_size
from prism_nemo.config.schema import ParallelConfig
from prism_nemo.plan.hardware import GIB
from prism_nemo.plan.layouts import Layout, describe_layout
from prism_nemo.plan.memory import Memory, ModelState
from prism_nemo.plan.parameters import model_parameters
from prism_nemo.plan.search import Job, Plan, data_parallel, describe
from prism_nemo.plan.timing import Cluster

UNVERIFIED = "times are estimates from data sheets and assumptions (docs/planning.md), not verified on hardware"


def as_text(job: Job, plans: Sequence[Plan], *, top: int, searched: bool) -> str:
    """The best plan in full and, after a search, the others in a line each."""
    lines = [*_job_lines(job), "", *_plan_lines(job, plans[0])]
    if searched:
        lines += ["", f"{len(plans)} layouts fit{f', the quickest {top}' if len(plans) > top else ''}:"]
        width = max(44, *(len(describe(plan)) for plan in plans[:top]))
        lines += [f"  {'layout':<{width}} {'dp':>4} {'GiB':>7} {'spare':>7} {'s/step':>9} {'tokens/s':>10}"]
        for plan in plans[:top]:
            lines.append(
                f"  {describe(plan):<{width}} {data_parallel(plan, job.cluster):>4} {plan.memory.total / GIB:>7.1f} "
                f"{plan.spare / GIB:>7.1f} {plan.time.total:>9.1f} {plan.time.tokens_per_second:>10,.0f}"
            )
    return "\n".join(lines) + "\n"


def _job_lines(job: Job) -> list[str]:
    work, cluster = job.workload, job.cluster
    models = " with the ".join(shape.name for shape in job.shapes)
    millions = ", ".join(f"{model_parameters(shape).total / 1e9:.2f}B" for shape in job.shapes)
    responses = f" x {work.rollouts} responses" if work.samples else ""
    return [
        f"{work.stage} of {models} ({millions} parameters) on {cluster.nodes} x {cluster.gpus_per_node} "
        f"{cluster.gpu.name} ({cluster.gpu.memory_gib:g} GiB each)",
        f"a step: {work.global_batch} prompts{responses}, {work.prompt_tokens} + {work.response_tokens} tokens "
        f"({work.image_tokens} of images), rows of {work.row_tokens}",
    ]


def _plan_lines(job: Job, plan: Plan) -> list[str]:
    memory, time = plan.memory, plan.time
    verdict = f"fits, {plan.spare / GIB:.1f} GiB to spare" if plan.fits else f"DOES NOT FIT: {-plan.spare / GIB:.1f} GiB too much"
    copies = f"{data_parallel(plan, job.cluster)} data-parallel"
    if plan.own is not None:
        copies += f" ({data_parallel_size(plan.own.parallel, job.cluster.world_size)} the discriminator)"
    lines = [f"layout: {describe(plan)}, {copies}: {verdict}", ""]
    stage = f" (pipeline stage {memory.stage})" if plan.parallel.pipeline_model_parallel_size > 1 else ""
    lines.append(f"memory of the fullest GPU{stage}, GiB")
    lines += [f"  {name:<42} {value / GIB:>8.2f}" for name, value in _state_rows(memory)]
    for phase, added in sorted(memory.phases.items(), key=lambda item: -item[1]):
        peak = "  <- the peak" if phase == memory.peak_phase else ""
        parts = ", ".join(f"{name} {value / GIB:.2f}" for name, value in _phase_parts(memory, phase).items() if value)
        lines.append(f"  + {phase:<40} {added / GIB:>8.2f}  {f'({parts})' if parts else ''}{peak}")
    lines.append(f"  {'framework and allocator (assumed)':<42} {memory.overhead / GIB:>8.2f}")
    lines.append(f"  {'at the peak':<42} {memory.total / GIB:>8.2f}  of {job.cluster.gpu.memory_gib:g}")
    if memory.decoding is not None:
        lines.append(f"  sampling needs rollout.max_batch_size={memory.decoding.sequences}")
    lines += [f"  with {offloaded}" for offloaded in _offloaded(job, plan)]
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in time.phases.items())
    lines += [
        "",
        f"a step, estimated: {time.total:.1f} s ({phases}; {time.communication:.1f} of it communication), "
        f"{time.tokens_per_second:,.0f} tokens/s",
        f"  {UNVERIFIED}",
    ]
    return lines


def _state_rows(memory: Memory) -> list[tuple[str, float]]:
    rows = []
    for name, model in (("policy", memory.policy), ("discriminator", memory.discriminator)):
        if isinstance(model, ModelState):
            rows += [
                (f"{name}: weights", model.weights),
                (f"{name}: gradients", model.gradients),
                (f"{name}: optimizer", model.optimizer),
            ]
    return rows


def _phase_parts(memory: Memory, phase: str) -> dict[str, float]:
    passes = {"policy update": memory.policy_pass, "discriminator update": memory.discriminator_pass}
    if phase in passes:
        found = passes[phase]
        return {"activations": found.activations, "vision": found.vision, "logits": found.logits}
    if phase == "rollout" and memory.decoding is not None:
        return {"KV cache": memory.decoding.kv_cache, "decoding": memory.decoding.workspace}
    return {}


def as_json(job: Job, plans: Sequence[Plan]) -> dict[str, Any]:
    """Memory in bytes, time in seconds."""
    return {
        "models": {shape.name: model_parameters(shape).total for shape in job.shapes},
        "workload": asdict(job.workload),
        "cluster": {"nodes": job.cluster.nodes, "gpus_per_node": job.cluster.gpus_per_node, "gpu": asdict(job.cluster.gpu)},
        "time_is": UNVERIFIED,
        "plans": [_plan_json(job, plan) for plan in plans],
    }


def _plan_json(job: Job, plan: Plan) -> dict[str, Any]:
    memory, time = plan.memory, plan.time
    phases = {phase: {"total": added, **_phase_parts(memory, phase)} for phase, added in memory.phases.items()}
    return {
        "layout": describe(plan),
        "fits": plan.fits,
        "parallel": asdict(plan.parallel),
        "data_parallel_size": data_parallel(plan, job.cluster),
        "recompute": plan.settings.cost.recompute.value,
        "optimizer_cpu_offload": plan.settings.cpu_offload,
        "discriminator": None if plan.own is None else _own_json(plan.own, job.cluster),
        "rollout_max_batch_size": memory.decoding.sequences if memory.decoding else None,
        "memory": {
            "pipeline_stage": memory.stage,
            "state": dict(_state_rows(memory)),
            "phases": phases,
            "peak_phase": memory.peak_phase,
            "overhead": memory.overhead,
            "total": memory.total,
            "capacity": plan.capacity,
        },
        "seconds": {**time.phases, "total": time.total, "communication": time.communication},
        "tokens_per_second": time.tokens_per_second,
    }


def _own_json(own: Layout, cluster: Cluster) -> dict[str, Any]:
    return {
        "layout": describe_layout(own),
        "parallel": asdict(own.parallel),
        "data_parallel_size": data_parallel_size(own.parallel, cluster.world_size),
        "recompute": own.settings.cost.recompute.value,
        "optimizer_cpu_offload": own.settings.cpu_offload,
    }


def as_yaml(job: Job, plan: Plan) -> str:
    """A file for conf/parallel, with what it was planned for in comments."""
    work, cluster = job.workload, job.cluster
    models = " with the ".join(shape.name for shape in job.shapes)
    lines = [
        f"# {work.stage} of {models} on {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}: {describe(plan)}.",
        f"# Planned {plan.memory.total / GIB:.0f} of {cluster.gpu.memory_gib:g} GiB, for rows of {work.row_tokens} tokens.",
    ]
    if plan.memory.decoding is not None:
        lines.append(f"# Sampling needs rollout.max_batch_size={plan.memory.decoding.sequences}.")
    lines += [f"# Needs {offloaded}." for offloaded in _offloaded(job, plan)]
    return file_of(plan, lines)


def _offloaded(job: Job, plan: Plan) -> list[str]:
    """The settings that go with the layout."""
    sections = ["optimizer"] if plan.settings.cpu_offload else []
    if job.policy and job.discriminator and (plan.own or plan).settings.cpu_offload:
        sections.append("discriminator_optimizer")
    return [f"{section}.cpu_offload=true" for section in sections]


def file_of(plan: Plan, comments: Sequence[str]) -> str:
    """A file for conf/parallel: the keys of `parallel`, or both sections where the discriminator's layout is another."""
    if plan.own is None:
        return "\n".join(comments) + "\n" + layout_yaml(plan.parallel)
    sections = {
        "parallel": layout_yaml(plan.parallel),
        "discriminator_parallel": "as_policy: false\n" + layout_yaml(plan.own.parallel),
    }
    text = "".join(f"{section}:\n{textwrap.indent(keys, '  ')}" for section, keys in sections.items())
    return "\n".join([GLOBAL_PACKAGE, *comments]) + "\n" + text


_ALWAYS_SAID = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "expert_model_parallel_size",
    "sequence_parallel",
    "use_distributed_optimizer",
)


def layout_yaml(parallel: ParallelConfig) -> str:
    """The layout's keys: the sizes, and whatever else is not as it is by default."""
    default = ParallelConfig()
    said = {field.name: getattr(parallel, field.name) for field in fields(ParallelConfig)}
    said = {name: value for name, value in said.items() if name in _ALWAYS_SAID or value != getattr(default, name)}
    return "".join(f"{name}: {_yaml_value(value)}\n" for name, value in said.items())


def _yaml_value(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml_value, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
