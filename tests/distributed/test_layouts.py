"""One training step at every layout that fits four ranks, against one rank, in fp32.

Loss, gradient norm, every gradient and every updated weight, for a dense policy with tied embeddings, an MoE policy and an MoE
discriminator with its balancing loss, on rows with and without images that are spread unequally over data-parallel ranks. One
launch runs several layouts; the table at the end (`pytest -n 0`) shows how far each is from one rank.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from helpers.layouts import MODELS, OPTIMIZER, Share, build, directories, layouts, loss_of, rows_of
from helpers.ranks import run_ranks
from helpers.rows import gradients, one_rank, relative_errors
from torch import Tensor

from prism_nemo.config.enums import Device
from prism_nemo.config.schema import ParallelConfig, RuntimeConfig
from prism_nemo.engine.runtime import Runtime, initialize, session
from prism_nemo.models.base import TrainingBatch
from prism_nemo.models.discriminator import DiscriminatorModel
from prism_nemo.models.weights import export_hf_tensors

TOLERANCE = 1e-5
# Every process group has a thread of gloo's that wakes up a hundred times a second as long as its process lives. With the groups
# of all layouts that took more of a machine than the steps.
LAYOUTS_IN_A_LAUNCH = 6


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
    results = {}
    for world, cases in CASES.items():
        names = list(cases)
        for first in range(0, len(names), LAYOUTS_IN_A_LAUNCH):
            part = {name: cases[name] for name in names[first : first + LAYOUTS_IN_A_LAUNCH]}
            results |= run_ranks(on_ranks, world, directories(), part, timeout_seconds=900)[0]
    return results


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
