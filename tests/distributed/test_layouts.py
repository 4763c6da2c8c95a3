"""One training step at every layout that fits four ranks, against one rank, in fp32.

Loss, gradient norm, every gradient and every updated weight, for a dense policy with tied embeddings, an MoE policy and an MoE
discriminator with its balancing loss, on rows with and without images that are spread unequally over data-parallel ranks. One
launch runs many layouts; the table at the end shows how far each is from one rank.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
from helpers.ranks import run_ranks
from helpers.rows import gradients, one_rank, relative_errors
from helpers.tiny import make_group, tiny_model
from torch import Tensor

from prism_nemo.algorithms.metrics import MetricSums
from prism_nemo.config.schema import (
    Device,
    DiscriminatorConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
    RecomputeGranularity,
    RecomputeModule,
    RuntimeConfig,
)
from prism_nemo.engine.runtime import Runtime, initialize, session
from prism_nemo.models.base import TrainableModel, TrainingBatch
from prism_nemo.models.discriminator import DiscriminatorModel
from prism_nemo.models.policy import PolicyModel
from prism_nemo.models.weights import export_hf_tensors
from prism_nemo.packing.groups import Group, SegmentKind
from prism_nemo.packing.rows import PackedRow, make_row

KINDS = (SegmentKind.PERCEPTION, SegmentKind.REASONING)
Share = Literal["some_have_images", "all_have_images", "none_has_images", "one_has_nothing"]
MODELS = ("dense", "moe", "discriminator")
DEEPSTACK = (0, 1, 3)  # three features over four language layers: with interleaved chunks of one layer they travel two stages
TOLERANCE = 1e-5
# Adam divides by the root of the second moment: where a gradient is rounding noise, a small epsilon turns the noise into a
# whole step of either sign. This one keeps the update proportional there.
RECOMPUTE: dict[str, dict[str, Any]] = {
    "recompute-full": {"recompute_granularity": RecomputeGranularity.full},
    "recompute-modules": {
        "recompute_granularity": RecomputeGranularity.selective,
        "recompute_modules": [RecomputeModule.core_attn, RecomputeModule.mlp],
    },
}
OPTIMIZER = OptimizerConfig(lr=1e-2, adam_eps=1e-3, clip_grad=1.0)


def batch() -> list[list[Group]]:
    """Rows of groups: two images and text, text alone, one image late in the row, images of several sizes."""
    return [
        [make_group([(4, 6), (8, 4)], (5, 9, 3, 7), seed=60, kinds=KINDS), make_group((), (6, 2), seed=61, kinds=KINDS)],
        [make_group((), (5, 7, 2), seed=63, kinds=KINDS, text_length=9)],
        [make_group((), (20, 21), seed=65, kinds=KINDS, text_length=10), make_group([(4, 6)], (3, 4), seed=64, kinds=KINDS)],
        [make_group([(2, 12)], (4, 4), seed=62, kinds=KINDS)],
    ]


def rows_of(runtime: Runtime, share: Share = "some_have_images") -> list[PackedRow]:
    """This data-parallel rank's part of the batch: the second rank has no images, the ranks have different numbers of rows."""
    rows = [make_row(groups, pad_multiple=runtime.row_multiple) for groups in batch()]
    shares = {
        "some_have_images": ([rows[0], rows[2], rows[3]], [rows[1]]),
        "all_have_images": ([rows[0]], [rows[2], rows[3]]),
        "none_has_images": ([rows[1], rows[1]], [rows[1]]),
        "one_has_nothing": ([rows[0], rows[1]], []),
    }[share]
    return shares[runtime.data_parallel_rank] if runtime.data_parallel_size > 1 else [*shares[0], *shares[1]]


def layouts(world_size: int, *, experts: bool) -> dict[str, ParallelConfig]:
    """Every cut of the model over `world_size` ranks by sizes of 1 and 2; what is left is data-parallel."""
    found = {}
    for tp, pp, cp, ep in itertools.product((1, 2), (1, 2), (1, 2), (1, 2) if experts else (1,)):
        dp, rest = divmod(world_size, tp * pp * cp)
        if rest or dp not in (1, 2) or (world_size // pp) % ep:
            continue
        vpps: tuple[int | None, ...] = (None, 2) if pp == 2 else (None,)
        etps: tuple[int | None, ...] = (1, 2) if ep == 2 and tp == 2 and world_size // pp % 4 == 0 else (None,)
        sps = (False, True) if tp == 2 and not experts else (tp == 2,)  # with experts it is always on
        shards = (False, True) if dp * cp > 1 else (False,)
        for vpp, etp, sp, sharded in itertools.product(vpps, etps, sps, shards):
            if sharded and (vpp or etp == 2 or sp != (tp == 2)):
                continue  # nothing new: the optimizer is spread over the same ranks as without these
            name = f"tp{tp} pp{pp} vpp{vpp or 1} cp{cp} dp{dp}" + (f" ep{ep}" if experts else "")
            name += (f" etp{etp}" if etp else "") + (" sp" if sp else "") + (" sharded-optimizer" if sharded else "")
            parallel = ParallelConfig(
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                virtual_pipeline_model_parallel_size=vpp,
                context_parallel_size=cp,
                expert_model_parallel_size=ep,
                expert_tensor_parallel_size=etp,
                sequence_parallel=sp,
                use_distributed_optimizer=sharded,
            )
            found[name] = parallel
            if (tp, pp, vpp, ep) == (2, 2, 2, 1):
                found |= {f"{name} {recompute}": replace(parallel, **keys) for recompute, keys in RECOMPUTE.items()}
    return found


def build(kind: str, directory: Path, parallel: ParallelConfig, runtime: Runtime) -> TrainableModel:
    if kind == "discriminator":
        config = DiscriminatorConfig(path=str(directory), precision=Precision.fp32, moe_aux_loss_coeff=0.1)
        return DiscriminatorModel(config, parallel, runtime, seed=3)
    return PolicyModel(ModelConfig(path=str(directory), precision=Precision.fp32), parallel, runtime)


def loss_of(row: PackedRow, output: Any, *, divisor: float) -> tuple[Tensor, MetricSums]:
    """A weighted sum that treats every label or score differently."""
    values = output if isinstance(output, Tensor) else output.log_probs
    tokens = row.label_ids if values.numel() == row.num_labels else row.input_ids[row.segment_end]
    weights = torch.sin(tokens.float() + torch.arange(values.numel()))
    return (values * weights).sum() / divisor, {"mean": (values.detach().sum(), torch.tensor(float(values.numel())))}


def step(
    kind: str, directory: Path, parallel: ParallelConfig, runtime: Runtime, share: Share = "some_have_images"
) -> dict[str, Any]:
    """One optimizer step; what it did to the whole model, by HuggingFace names."""
    model = build(kind, directory, parallel, runtime)
    model.build_optimizer(OPTIMIZER, max_steps=1)
    model.prepare_for_training()
    rows = rows_of(runtime, share)
    model.prepare_for_training_step()
    found: dict[str, Any] = {}
    if isinstance(model, DiscriminatorModel):
        model.start_batch(rows)
    loss, metrics = model.get_loss_and_metrics(TrainingBatch(rows, partial(loss_of, divisor=7.0)), forward_only=False)
    if isinstance(model, DiscriminatorModel):
        metrics |= model.router_metrics()
    model.finish_training_step()
    score_head = kind == "discriminator"
    if not parallel.use_distributed_optimizer:  # which leaves every rank a part of the summed gradient
        found["gradients"] = gradients(model.chunks, model.hf_config, score_head=score_head)
    result = model.optimizer_step(0)
    weights = export_hf_tensors(model.chunks, model.hf_config, score_head=score_head)
    after = {name: tensor.clone() for name, tensor in weights}
    outputs = [output if isinstance(output, Tensor) else output.log_probs for output in model.infer(rows)]
    total = torch.cat([torch.zeros(1), *outputs]).double().sum()
    inferred = float(runtime.sum_over_data_parallel(total))
    return {**found, "loss": loss, "metrics": metrics, "norm": result.grad_norm, "weights": after, "inferred": inferred}


def on_ranks(directories: dict[str, Path], cases: dict[str, list[tuple[str, ParallelConfig]]]) -> dict[str, Any]:
    """Every layout's step; errors against the one-rank steps are for the caller, who gets the first rank's tensors."""
    found: dict[str, Any] = {}
    with session(next(iter(cases.values()))[0][1], RuntimeConfig(device=Device.cpu)) as runtime:
        for name, members in cases.items():
            for kind, parallel in members:
                runtime = initialize(parallel, RuntimeConfig(device=Device.cpu))
                result = step(kind, directories[kind], parallel, runtime)
                found[f"{kind}: {name}"] = result if runtime.rank == 0 else {key: result[key] for key in ("loss", "norm")}
            if name in SHARED:
                for (kind, _), share in itertools.product(members, get_args(Share)):
                    found[f"{kind}: {name} {share}"] = step(kind, directories[kind], members[0][1], runtime, share)
    return found


def directories() -> dict[str, Path]:
    dense = tiny_model(tied=True, deepstack=DEEPSTACK).directory
    return {"dense": dense, "discriminator": dense, "moe": tiny_model(experts=True, deepstack=DEEPSTACK).directory}


def cases_of(world_size: int) -> dict[str, list[tuple[str, ParallelConfig]]]:
    """Layouts with the models that have them, those with the same process groups together."""
    cases: dict[str, list[tuple[str, ParallelConfig]]] = {}
    for kind in MODELS:
        for name, parallel in layouts(world_size, experts=kind != "dense").items():
            cases.setdefault(name, []).append((kind, parallel))

    def groups(item: tuple[str, list[tuple[str, ParallelConfig]]]) -> str:
        alike = {"sequence_parallel": False, "use_distributed_optimizer": False, "recompute_granularity": None}
        return str(replace(item[1][0][1], **alike, recompute_modules=[]))

    return dict(sorted(cases.items(), key=groups))


CASES = {world_size: cases_of(world_size) for world_size in (2, 4)}
NAMES = [(world, f"{kind}: {name}") for world, cases in CASES.items() for name, members in cases.items() for kind, _ in members]


SHARED = ("tp1 pp1 vpp1 cp1 dp2", "tp1 pp1 vpp1 cp1 dp2 ep2", "tp1 pp2 vpp2 cp1 dp2", "tp2 pp1 vpp1 cp1 dp2 ep2 etp1 sp")


@cache
def expected(kind: str, share: Share = "some_have_images") -> dict[str, Any]:
    return step(kind, directories()[kind], ParallelConfig(), one_rank(), share)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return {
        name: result
        for world, cases in CASES.items()
        for name, result in run_ranks(on_ranks, world, directories(), cases, timeout_seconds=900)[0].items()
    }


def errors(found: dict[str, Any], name: str, share: Share = "some_have_images") -> dict[str, float]:
    """Relative errors of a layout's step; of tensors the largest, each by its norm."""
    want, got = expected(name.partition(":")[0], share), found[name]
    result = {key: abs(got[key] - want[key]) / abs(want[key]) for key in ("loss", "norm", "inferred")}
    result["weights"] = max(relative_errors(got["weights"], want["weights"]).values())
    if "gradients" in got:
        result["gradients"] = max(relative_errors(got["gradients"], want["gradients"]).values())
    return result


@pytest.mark.parametrize(("world", "name"), NAMES)
def test_a_step_is_one_ranks_step(found: dict[str, Any], world: int, name: str) -> None:
    bad = {key: error for key, error in errors(found, name).items() if not error <= TOLERANCE}
    assert not bad
    assert found[name]["metrics"] == pytest.approx(expected(name.partition(":")[0])["metrics"], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("share", get_args(Share))
@pytest.mark.parametrize(("world", "name"), [item for item in NAMES if item[1].partition(": ")[2] in SHARED])
def test_no_rank_waits_for_another(found: dict[str, Any], world: int, name: str, share: Share) -> None:
    """Whichever ranks have images, or anything at all: the step ends, and its gradients are one rank's."""
    bad = {key: error for key, error in errors(found, f"{name} {share}", share).items() if not error <= TOLERANCE}
    assert not bad


def test_table(found: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """What was compared, for people to read."""
    lines = [f"{'layout against one rank, relative error':60} {'loss':>8} {'norm':>8} {'gradients':>9} {'weights':>8}"]
    for _, name in sorted(NAMES):
        error = errors(found, name)
        gradient = f"{error['gradients']:9.1e}" if "gradients" in error else f"{'':>9}"
        lines.append(f"{name:60} {error['loss']:8.1e} {error['norm']:8.1e} {gradient} {error['weights']:8.1e}")
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    assert len(lines) == len(NAMES) + 1
