"""Training that changes its layout at every step, over four ranks, against a run that stays on one rank, in fp32.

Every step loads the checkpoint that the step before saved at another layout. Weights, moments and step counters are cut and put
together again each time; without any of them the losses would part.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from helpers.layouts import OPTIMIZER, build, directories, layouts, loss_of, rows_of
from helpers.ranks import run_ranks
from helpers.rows import one_rank, relative_errors
from torch import Tensor

from prism_nemo.config.enums import Device
from prism_nemo.config.schema import ParallelConfig, RuntimeConfig
from prism_nemo.engine.checkpoint import CheckpointStore
from prism_nemo.engine.runtime import Runtime, initialize, session
from prism_nemo.models.base import TrainableModel, TrainingBatch
from prism_nemo.models.discriminator import DiscriminatorModel
from prism_nemo.models.weights import export_hf_tensors

RANKS = 4
TOLERANCE = 1e-5
DENSE = (
    "tp2 pp2 vpp2 cp1 dp1",
    "tp1 pp1 vpp1 cp2 dp2",
    "tp2 pp1 vpp1 cp1 dp2 sp",
    "tp1 pp2 vpp1 cp2 dp1",
    "tp2 pp1 vpp1 cp2 dp1",
    "tp1 pp2 vpp2 cp1 dp2",
)
EXPERTS = (
    "tp2 pp2 vpp2 cp1 dp1 ep2 sp",
    "tp1 pp1 vpp1 cp2 dp2 ep1",
    "tp2 pp1 vpp1 cp1 dp2 ep2 etp2 sp",
    "tp1 pp2 vpp1 cp2 dp1 ep2",
    "tp2 pp1 vpp1 cp2 dp1 ep2 etp1 sp",
    "tp1 pp2 vpp2 cp1 dp2 ep1",
)


def spread(*names: str) -> tuple[str, ...]:
    return tuple(f"{name} sharded-optimizer" for name in names)


CHAINS = {
    "dense": DENSE,
    "moe": EXPERTS,
    "discriminator": EXPERTS,
    "dense, optimizer spread": spread(DENSE[1], DENSE[2], DENSE[3], DENSE[1]),
    "moe, optimizer spread": spread(EXPERTS[1], EXPERTS[4], EXPERTS[3], EXPERTS[1]),
}


def take_step(model: TrainableModel, runtime: Runtime, number: int) -> dict[str, float]:
    """Optimizer step `number`, on the same rows each time."""
    model.prepare_for_training()
    rows = rows_of(runtime)
    model.prepare_for_training_step()
    if isinstance(model, DiscriminatorModel):
        model.start_batch(rows)
    loss, _ = model.get_loss_and_metrics(TrainingBatch(rows, partial(loss_of, divisor=7.0)), forward_only=False)
    model.finish_training_step()
    return {"loss": loss, "norm": model.optimizer_step(number).grad_norm}


def new_model(kind: str, directory: Path, parallel: ParallelConfig, runtime: Runtime) -> TrainableModel:
    model = build(kind, directory, parallel, runtime)
    model.build_optimizer(OPTIMIZER, max_steps=len(DENSE))
    return model


def weights_of(model: TrainableModel) -> dict[str, Tensor]:
    tensors = export_hf_tensors(model.chunks, model.hf_config, score_head=isinstance(model, DiscriminatorModel))
    return {name: tensor.clone() for name, tensor in tensors}


def on_ranks(directories: dict[str, Path], chain: str, folder: Path) -> dict[str, Any]:
    """A model, a checkpoint and a layout for each step. What the last one left, and the losses on the way."""
    kind = chain.partition(",")[0]
    known = layouts(RANKS, experts=kind != "dense")
    steps = []
    with session(ParallelConfig(), RuntimeConfig(device=Device.cpu)):
        for number, name in enumerate(CHAINS[chain]):
            runtime = initialize(known[name], RuntimeConfig(device=Device.cpu))
            model = new_model(kind, directories[kind], known[name], runtime)
            store = CheckpointStore(folder, runtime, keep_last_k=1)
            state = store.load({"model": model})
            assert (number == 0) if state is None else (state["step"] == number)
            steps.append(take_step(model, runtime, number))
            store.save(number + 1, {"model": model}, {})
        return {"steps": steps, "weights": weights_of(model)}


@cache
def stayed(kind: str, steps: int) -> dict[str, Any]:
    runtime = one_rank()
    model = new_model(kind, directories()[kind], ParallelConfig(), runtime)
    return {"steps": [take_step(model, runtime, number) for number in range(steps)], "weights": weights_of(model)}


@pytest.mark.parametrize("chain", CHAINS)
def test_training_goes_on_at_another_layout(chain: str, tmp_path: Path) -> None:
    found: dict[str, Any] = run_ranks(on_ranks, RANKS, directories(), chain, tmp_path / "run", timeout_seconds=600)[0]
    expected = stayed(chain.partition(",")[0], len(CHAINS[chain]))
    for got, want in zip(found["steps"], expected["steps"], strict=True):
        assert got == pytest.approx(want, rel=TOLERANCE)
    bad = {
        name: error for name, error in relative_errors(found["weights"], expected["weights"]).items() if not error <= TOLERANCE
    }
    assert not bad
    losses = [step["loss"] for step in expected["steps"]]
    assert len({round(loss, 4) for loss in losses}) == len(losses), "every step changed something"
