"""`prism-nemo plan`: arguments, and what is printed."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from prism_nemo.config.compose import compose
from prism_nemo.config.schema import ParallelConfig
from prism_nemo.errors import ConfigError, LayoutError
from prism_nemo.plan import report
from prism_nemo.plan.activations import Cost, Recompute
from prism_nemo.plan.hardware import ASSUMPTIONS, GPUS, read_gpu
from prism_nemo.plan.layouts import Layout, is_possible, with_recompute
from prism_nemo.plan.placed import Settings
from prism_nemo.plan.search import Job, Plan, best, does_not_fit, evaluate
from prism_nemo.plan.shapes import OFFICIAL_SIZES, Shape, read_shape
from prism_nemo.plan.timing import Cluster
from prism_nemo.plan.workload import STAGES, Workload

HELP = f"""\
usage: prism-nemo plan --model SIZE|DIR --stage STAGE [--gpu GPU] [--nodes N] [--gpus-per-node N] [...]

Whether a job fits before it is submitted: memory of the fullest GPU by what it is for, and an estimate of a step's time.
Without --layout it searches, and lists the layouts that fit, the quickest first.

what runs
  --model SIZE|DIR       {", ".join(OFFICIAL_SIZES)}, or a model directory, run or checkpoint
  --stage STAGE          {", ".join(STAGES)}
  --discriminator SIZE   the dense model that the discriminator is made from: align (2B where not given), warmup (--model)
  --experts N            the discriminator's experts (4); 1: dense
  --precision bf16|fp32
  --freeze-vision        the vision tower is not trained

where
  --gpu GPU              {", ".join(GPUS)} (h100)
  --nodes N              machines (1)
  --gpus-per-node N      GPUs of one (8)
  --layout A=N,...       tp, pp, vpp, first and last (layers of those stages), cp, ep, etp; sp=true|false,
                         recompute=none|core_attn|mlp|core_attn+mlp|full, offload=true|false
  --discriminator-layout A=N,...
                         align: the discriminator's own, over the same GPUs. With --layout alone it is cut as the policy is;
                         with neither, both are searched

one step; what is not given is the stage's own setting, with lengths at their limits and images half of the prompt
  --prompt-tokens N      of a typical prompt, its image included
  --image-tokens N       of a prompt's images (32 x 32 pixels each)
  --response-tokens N    of a typical response
  --rollouts N           responses a prompt
  --global-batch N       prompts, pairs or demonstrations of a step
  --row-tokens N         trainer.max_tokens_per_row
  --max-batch-size N     rollout.max_batch_size; where not given, as many as fit

what is written
  --top N                how many layouts are listed (10)
  --out FILE             the layout (the best one found) as a file for conf/parallel; with a layout of the
                         discriminator's own it sets `discriminator_parallel` too, and is for align alone
  --json                 everything, as JSON

examples
  prism-nemo plan --model 8B --stage sft
  prism-nemo plan --model 8B --stage align --gpu h200 --layout tp=4,sp=true --response-tokens 1500
  prism-nemo plan --model 30B-A3B --stage rlvr --nodes 2 --out conf/parallel/mine.yaml
  prism-nemo plan --model 30B-A3B --stage align --nodes 2 --layout tp=4,ep=16,sp --discriminator-layout ep=4

Memory follows what the engine allocates and is checked against measured runs; times are estimates from data sheets and named
assumptions, not verified on hardware. docs/planning.md explains both.
"""

_SIZES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "first": "num_layers_in_first_pipeline_stage",
    "last": "num_layers_in_last_pipeline_stage",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True)
    parser.add_argument("--stage", required=True, choices=STAGES)
    parser.add_argument("--discriminator")
    parser.add_argument("--experts", type=_count, default=4)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--freeze-vision", action="store_true")
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--nodes", type=_count, default=1)
    parser.add_argument("--gpus-per-node", type=_count, default=8)
    parser.add_argument("--layout")
    parser.add_argument("--discriminator-layout")
    for name in ("prompt-tokens", "response-tokens", "rollouts", "global-batch", "row-tokens", "max-batch-size"):
        parser.add_argument(f"--{name}", type=_count)
    parser.add_argument("--image-tokens", type=_count_or_none)
    parser.add_argument("--top", type=_count, default=10)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--json", action="store_true")


def run(options: argparse.Namespace) -> None:
    """Plans and prints. Raises ConfigError, LayoutError or PlanError."""
    job = read_job(options)
    own = None
    if options.discriminator_layout is not None:
        own = layout_of_given(job, parse_layout(options.discriminator_layout, option="--discriminator-layout"))
    if options.layout is None:
        plans = best(job, own)
    else:
        plans = [_evaluate_given(job, layout_of_given(job, parse_layout(options.layout)), own)]
    if options.json:
        sys.stdout.write(json.dumps(report.as_json(job, plans[: options.top]), indent=2) + "\n")
    else:
        sys.stdout.write(report.as_text(job, plans, top=options.top, searched=options.layout is None))
    if options.out is not None and plans[0].fits:
        write_layout(options.out, job, plans[0])
    if not plans[0].fits:  # told in full above; a script must notice too
        raise does_not_fit(job, plans[0])


def _evaluate_given(job: Job, layout: Layout, own: Layout | None) -> Plan:
    """Raises LayoutError when it is impossible; where the policy alone could be cut so, naming that as the way out."""
    try:
        return evaluate(job, layout, own)
    except LayoutError as error:
        if own is None and job.policy and job.discriminator and is_possible([job.policy], layout, job.cluster.world_size):
            remedy = f"{error.remedy}; or cut the discriminator differently: --discriminator-layout"
            raise LayoutError(error.what, where=error.where, remedy=remedy) from error
        raise


def read_job(options: argparse.Namespace) -> Job:
    """What the arguments ask for; lengths and batch from the stage's shipped settings where they are not given."""
    policy = read_shape(options.model) if options.stage != "warmup" else None
    discriminator = None
    if options.stage in ("warmup", "align"):
        chosen = options.discriminator or (options.model if options.stage == "warmup" else "2B")
        discriminator = _read_discriminator(chosen, options)
    elif options.discriminator is not None:
        raise ConfigError(
            f"{options.stage} has no discriminator", where="--discriminator", remedy="leave it out, or plan warmup or align"
        )
    if options.stage != "align" and options.discriminator_layout is not None:
        raise ConfigError(
            f"{options.stage} does not train two models", where="--discriminator-layout", remedy="use --layout, or plan align"
        )
    cost = Cost(
        value_bytes=4 if options.precision == "fp32" else 2,
        vision_is_trained=not options.freeze_vision,
        expert_imbalance=ASSUMPTIONS.expert_imbalance,
    )
    cluster = Cluster(read_gpu(options.gpu), options.nodes, options.gpus_per_node)
    return Job(policy, discriminator, _workload(options), cluster, Settings(cost))


def _read_discriminator(model: str, options: argparse.Namespace) -> Shape:
    """The one that a dense model is made into, or a warmed-up one in a directory, whose configuration has the experts."""
    shape = read_shape(model, option="--model" if options.discriminator is None else "--discriminator")
    if shape.experts is not None and Path(model).is_dir():
        return replace(shape, is_discriminator=True)
    return shape.as_discriminator(options.experts)


def _workload(options: argparse.Namespace) -> Workload:
    stage = compose(options.stage)

    def setting(key: str, default: int) -> int:
        value = OmegaConf.select(stage, key)
        return default if value is None else int(value)

    def given(name: str, key: str, default: int = 1) -> int:
        value = getattr(options, name)
        return setting(key, default) if value is None else value

    prompt = given("prompt_tokens", "data.max_prompt_length")
    image = prompt // 2 if options.image_tokens is None else options.image_tokens
    if image > prompt:
        raise ConfigError(
            f"a prompt of {prompt} tokens cannot have {image} visual ones",
            where="--image-tokens, --prompt-tokens",
            remedy="the prompt's tokens include its images'",
        )
    response = given("response_tokens", "data.max_response_length")
    rows = given("row_tokens", "trainer.max_tokens_per_row")
    shared = 2 if options.stage in ("warmup", "align") else 1  # the discriminator sees a teacher's and a student's
    if prompt + shared * response > rows:
        raise ConfigError(
            f"a row of {rows} tokens does not hold a prompt of {prompt} and {shared} response(s) of {response}",
            where="--row-tokens, --prompt-tokens, --response-tokens",
            remedy=f"--row-tokens {prompt + shared * response} or more, or shorter texts",
        )
    return Workload(
        stage=options.stage,
        prompt_tokens=prompt,
        response_tokens=response,
        image_tokens=image,
        rollouts=given("rollouts", "rollout.num_rollouts_per_prompt"),
        global_batch=given("global_batch", "trainer.global_batch_size"),
        row_tokens=rows,
        max_batch_size=given("max_batch_size", "rollout.max_batch_size"),
    )


@dataclass(frozen=True)
class GivenLayout:
    parallel: ParallelConfig
    recompute: Recompute
    offload: bool


def parse_layout(text: str, *, option: str = "--layout") -> GivenLayout:
    """`tp=2,ep=4,sp=true`. Raises ConfigError for an unknown name or value; whether it is possible is checked elsewhere."""
    values: dict[str, Any] = {}
    recompute, offload = Recompute.none, False
    for part in filter(None, text.split(",")):
        name, _, value = part.strip().partition("=")
        if name in _SIZES and value.isdigit() and int(value) > 0:
            values[_SIZES[name]] = int(value)
        elif name in ("sp", "offload") and value in ("", "true", "false"):
            if name == "sp":
                values["sequence_parallel"] = value != "false"
            else:
                offload = value != "false"
        elif name == "recompute" and value in list(Recompute):
            recompute = Recompute(value)
        elif name != "dp":  # what is left over is data-parallel; naming it does no harm
            raise ConfigError(
                f"`{part}` is not part of a layout",
                where=option,
                remedy="as in tp=4,pp=2,sp=true,recompute=full: "
                f"{', '.join(_SIZES)} are numbers, sp and offload true or false, recompute {', '.join(Recompute)}",
            )
    return GivenLayout(ParallelConfig(**values), recompute, offload)


def layout_of_given(job: Job, given: GivenLayout) -> Layout:
    """A layout as given, with the distributed optimizer where there are replicas to spread it over."""
    parallel = given.parallel
    model_ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    parallel = replace(parallel, use_distributed_optimizer=job.cluster.world_size > model_ranks)
    settings = replace(job.settings, cost=replace(job.settings.cost, recompute=given.recompute), cpu_offload=given.offload)
    return Layout(with_recompute(parallel, given.recompute), settings)


def write_layout(path: Path, job: Job, plan: Plan) -> None:
    """Raises ConfigError when the file exists with something else in it, or its folder does not."""
    text = report.as_yaml(job, plan)
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise ConfigError("the file exists", where=f"--out {path}", remedy="remove it, or choose another name")
    if not path.parent.is_dir():
        raise ConfigError("the folder does not exist", where=f"--out {path}", remedy=f"mkdir -p {path.parent}")
    path.write_text(text, encoding="utf-8")
    print(f"wrote {path}", file=sys.stderr)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def _count_or_none(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value
