"""The layouts that conf/parallel ships for each official size: planned, written and held to the plan from this one table.

python -m prism_nemo.plan.recommended        writes conf/parallel/qwen3_vl_*.yaml anew
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from prism_nemo.config.layers import conf_root
from prism_nemo.plan.command import add_arguments, layout_of_given, parse_layout, read_job
from prism_nemo.plan.hardware import GIB
from prism_nemo.plan.report import file_of
from prism_nemo.plan.search import Job, Plan, describe, evaluate


@dataclass(frozen=True)
class Recommendation:
    """One file: a size on a cluster of eight-GPU machines, one layout for all the stages named."""

    size: str
    nodes: int
    gpu: str
    layout: str  # as `prism-nemo plan --layout` takes it
    stages: tuple[str, ...]
    own: str | None = None  # the discriminator's (2B with 4 experts), where it is cut differently: a file for align alone

    @property
    def name(self) -> str:
        size = self.size.lower().replace("-", "_")
        return f"qwen3_vl_{size}{'' if self.own is None else '_align'}_{self.nodes}x8_{self.gpu}"


ALL = ("sft", "align", "rlvr")
NO_GAME = ("sft", "rlvr")  # experts over more ranks than the discriminator has experts
GAME = ("align",)

RECOMMENDED = (
    Recommendation("2B", 1, "h100", "tp=4,sp", ALL),
    Recommendation("2B", 1, "h200", "tp=2,sp", ALL),
    Recommendation("2B", 2, "h100", "tp=4,sp", ALL),
    Recommendation("4B", 1, "h100", "tp=4,sp", ALL),
    Recommendation("4B", 1, "h200", "tp=2,sp", ALL),
    Recommendation("4B", 2, "h100", "tp=4,sp", ALL),
    Recommendation("8B", 1, "h100", "tp=8,sp", ALL),
    Recommendation("8B", 1, "h200", "tp=4,sp", ALL),
    Recommendation("8B", 2, "h100", "tp=4,sp", ALL),
    Recommendation("32B", 1, "h200", "tp=8,sp,recompute=mlp", ALL),
    Recommendation("32B", 2, "h100", "tp=8,sp,recompute=full", ALL),
    Recommendation("32B", 2, "h200", "tp=8,sp", ALL),
    Recommendation("30B-A3B", 1, "h200", "tp=4,ep=8,sp", NO_GAME),
    Recommendation("30B-A3B", 2, "h100", "tp=4,ep=16,sp,recompute=mlp", NO_GAME),
    Recommendation("30B-A3B", 2, "h200", "tp=4,ep=16,sp", NO_GAME),
    Recommendation("235B-A22B", 8, "h200", "tp=4,ep=64,sp,recompute=mlp", NO_GAME),
    Recommendation("235B-A22B", 16, "h100", "tp=4,cp=2,ep=128,sp,recompute=mlp", NO_GAME),
    Recommendation("235B-A22B", 16, "h200", "tp=4,cp=2,ep=128,sp", NO_GAME),
    Recommendation("30B-A3B", 1, "h200", "tp=4,ep=8,sp", GAME, "tp=4,sp"),
    Recommendation("30B-A3B", 2, "h100", "tp=4,ep=16,sp,recompute=mlp", GAME, "tp=8,sp"),
    Recommendation("30B-A3B", 2, "h200", "tp=4,ep=16,sp", GAME, "tp=4,sp"),
    Recommendation("235B-A22B", 8, "h200", "tp=4,cp=4,ep=64,sp", GAME, "tp=8,sp"),
    Recommendation("235B-A22B", 16, "h100", "tp=4,cp=8,ep=128,sp,recompute=mlp", GAME, "tp=8,sp"),
    Recommendation("235B-A22B", 16, "h200", "tp=4,cp=8,ep=128,sp", GAME, "tp=8,sp"),
)


def plan_stage(recommended: Recommendation, stage: str) -> tuple[Job, Plan]:
    """The plan of one of its stages, with the stage's shipped settings. Raises LayoutError when it is impossible."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = ["--model", recommended.size, "--stage", stage, "--nodes", str(recommended.nodes), "--gpu", recommended.gpu]
    job = read_job(parser.parse_args(arguments))
    own = None if recommended.own is None else layout_of_given(job, parse_layout(recommended.own))
    return job, evaluate(job, layout_of_given(job, parse_layout(recommended.layout)), own)


def file_text(recommended: Recommendation) -> str:
    """The file, with what it was planned for in comments."""
    planned = {stage: plan_stage(recommended, stage)[1] for stage in recommended.stages}
    plan = planned[recommended.stages[0]]
    comments = [
        f"# Qwen3-VL-{recommended.size} on {recommended.nodes} x 8 {recommended.gpu.upper()}: {describe(plan)}.",
        "# Planned, not run (docs/planning.md), with the stages' own settings:",
    ]
    for stage, found in planned.items():
        sampling = f", with rollout.max_batch_size={found.memory.decoding.sequences}" if found.memory.decoding else ""
        comments.append(f"#   {stage}: {found.memory.total / GIB:.0f} of {found.capacity / GIB:g} GiB{sampling}")
    return file_of(plan, comments)


def main() -> None:
    folder = conf_root() / "parallel"
    for recommended in RECOMMENDED:
        path = Path(folder) / f"{recommended.name}.yaml"
        path.write_text(file_text(recommended), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
