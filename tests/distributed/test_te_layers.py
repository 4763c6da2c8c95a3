"""Transformer Engine's layers, put together and run without a GPU, against the local ones.

A stand-in takes the place of the `transformer_engine` package (tests/helpers/fake_te: exact products, Transformer Engine's checks
of shapes, a note of every product's recipe); Megatron's wrappers, our layers, the optimizer and checkpoints are real. tests/gpu
runs the package itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.forks import TESTS
from helpers.layouts import OPTIMIZER, RECOMPUTE, build, directories, loss_of, rows_of
from helpers.ranks import run_ranks
from helpers.rows import gradients, relative_errors
from helpers.saving import save_model
from helpers.tiny import make_prompt

from prism_nemo.config.enums import Device, Fp8Recipe
from prism_nemo.config.schema import ParallelConfig, RuntimeConfig
from prism_nemo.convert.torch_dist import TorchDistCheckpoint
from prism_nemo.engine.model_checkpoint import load_model
from prism_nemo.engine.runtime import initialize, session
from prism_nemo.models import discriminator, policy
from prism_nemo.models.base import TrainableModel, TrainingBatch
from prism_nemo.models.discriminator import DiscriminatorModel
from prism_nemo.models.qwen3_vl.fp8 import LOCAL, LayerKind
from prism_nemo.models.weights import canonical_parameters
from prism_nemo.rollout.base import SamplingParams
from prism_nemo.rollout.megatron import MegatronEngine

TP = {"tensor_model_parallel_size": 2}
SP = {**TP, "sequence_parallel": True}
EP = {"expert_model_parallel_size": 2}
CASES: dict[str, tuple[str, dict[str, Any], Fp8Recipe | None]] = {
    "dense, bf16": ("dense", {**TP, **RECOMPUTE["recompute-full"]}, None),
    "dense, tensorwise, sequence parallel": ("dense", SP, Fp8Recipe.tensorwise),
    "dense, delayed, recomputed": ("dense", {**TP, **RECOMPUTE["recompute-full"]}, Fp8Recipe.delayed),
    "dense, delayed": ("dense", SP, Fp8Recipe.delayed),
    "dense, mxfp8, context parallel": ("dense", {"context_parallel_size": 2}, Fp8Recipe.mxfp8),
    "dense, blockwise, pipeline": (
        "dense",
        {"pipeline_model_parallel_size": 2, **RECOMPUTE["recompute-modules"]},
        Fp8Recipe.blockwise,
    ),
    "moe, bf16": ("moe", EP, None),
    "discriminator, tensorwise": ("discriminator", {**TP, **RECOMPUTE["recompute-modules"]}, Fp8Recipe.tensorwise),
    "discriminator, delayed, experts apart": ("discriminator", EP, Fp8Recipe.delayed),
}
RECIPES = {
    None: None,
    Fp8Recipe.delayed: "TEDelayedScaling",
    Fp8Recipe.tensorwise: "Float8CurrentScaling",
    Fp8Recipe.blockwise: "Float8BlockScaling",
    Fp8Recipe.mxfp8: "MXFP8BlockScaling",
}
SAMPLING = SamplingParams(
    temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=5, end_token_id=127, banned_token_ids=(120, 121, 122, 123)
)


@contextmanager
def layers_of(kind: LayerKind) -> Iterator[None]:
    """Models are built of these; without a CUDA device nothing else would ask for Transformer Engine."""
    before = policy.layer_kind
    policy.layer_kind = discriminator.layer_kind = lambda config, device: kind
    try:
        yield
    finally:
        policy.layer_kind = discriminator.layer_kind = before


def step(name: str, kind: LayerKind, directories: dict[str, Path]) -> tuple[TrainableModel, dict[str, Any]]:
    """A model after one optimizer step, and what was seen on the way."""
    import transformer_engine as te

    model_kind, layout, _ = CASES[name]
    parallel = ParallelConfig(**layout)
    runtime = initialize(parallel, RuntimeConfig(device=Device.cpu))
    with layers_of(kind):
        model = build(model_kind, directories[model_kind], parallel, runtime)
    model.build_optimizer(OPTIMIZER, max_steps=1)
    model.prepare_for_training()
    model.prepare_for_training_step()
    rows = rows_of(runtime)
    if isinstance(model, DiscriminatorModel):
        model.start_batch(rows)
    layouts = [row.layout for row in rows]
    seen: dict[str, Any] = {
        "rows": [layout.length for layout in layouts],
        "unpadded": [layout.length - layout.padding for layout in layouts],
    }
    te.LOG.clear()
    te.UPDATES.clear()
    seen["loss"], _ = model.get_loss_and_metrics(TrainingBatch(rows, partial(loss_of, divisor=7.0)), forward_only=False)
    seen["training"] = {entry[1:] for entry in te.LOG}
    seen["modules"] = {entry[0] for entry in te.LOG}
    seen["updates"] = len(te.UPDATES)
    if isinstance(model, DiscriminatorModel):
        seen["metrics"] = model.router_metrics()
    model.finish_training_step()
    seen["gradients"] = gradients(model.chunks, model.hf_config, score_head=model_kind == "discriminator")
    te.LOG.clear()
    model.infer(rows)
    seen["inference"] = {entry[1:] for entry in te.LOG}
    seen["norm"] = model.optimizer_step(0).grad_norm
    seen["names"] = sorted(canonical_parameters(model.chunks, model.hf_config))
    return model, seen


def moved(source: TrainableModel, target: TrainableModel, folder: Path) -> tuple[bool, list[Any]]:
    """Whether `target` has `source`'s weights after a checkpoint, and the extra states that its modules then hold."""
    for model in (source, target):
        assert model.optimizer is not None
    save_model(folder, source.chunks, source.optimizer)
    with torch.no_grad():
        for chunk in target.chunks:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))
    load_model(folder, target.chunks, target.optimizer)
    ours, theirs = (canonical_parameters(model.chunks, model.hf_config) for model in (source, target))
    equal = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    held = [getattr(module, "loaded_extra_state", None) for chunk in target.chunks for module in chunk.modules()]
    return equal, [{**state, "recipe": type(state["recipe"]).__name__} for state in held if state is not None]


def on_two_ranks(directories: dict[str, Path], folder: Path) -> dict[str, Any]:
    import transformer_engine as te

    found: dict[str, Any] = {}
    with session(ParallelConfig(**TP), RuntimeConfig(device=Device.cpu)):
        for number, (name, (kind, _, recipe)) in enumerate(CASES.items()):
            local, expected = step(name, LOCAL, directories)
            model, seen = step(name, LayerKind(True, recipe), directories)
            seen["errors"] = relative_errors(seen.pop("gradients"), expected.pop("gradients"))
            with model.runtime.layout.active():
                to_local, _ = moved(model, local, folder / f"{number}-te")
                to_te, _ = moved(local, model, folder / f"{number}-local")
                _, seen["resumed"] = moved(model, model, folder / f"{number}-again")
            te.LOG.clear()
            if kind == "dense":
                prompts = [make_prompt([(4, 6)], seed=5), make_prompt((), seed=6, text_length=7)]
                tokens = []
                for policy_model in (local, model):
                    with policy_model.runtime.layout.active():
                        engine = MegatronEngine(policy_model.chunks, device=torch.device("cpu"), max_batch_size=8)
                        rollouts = engine.generate(prompts, SAMPLING, num_rollouts_per_prompt=1, seeds=[1, 2])
                    tokens.append([rollout.tokens.tolist() for rollout in rollouts])
                seen["same_rollouts"] = tokens[0] == tokens[1]
                seen["rollouts"] = {entry[1] for entry in te.LOG}
            found[name] = {"local": expected, "te": seen, "to_local": to_local, "to_te": to_te}
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("checkpoints")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(TESTS / "helpers" / "fake_te"))
        ranks = run_ranks(on_two_ranks, 2, directories(), folder, fresh=True)
    for number, name in enumerate(CASES):
        ranks[0][name]["checkpoints"] = [TorchDistCheckpoint(folder / f"{number}-{kind}") for kind in ("te", "local")]
    return {name: [rank[name] for rank in ranks] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_same_step_as_with_local_layers(results: dict[str, Any], name: str) -> None:
    """Other orders of addition (rows are padded further), and a norm that is scaled before its cast: rounding."""
    for rank in results[name]:
        local, te = rank["local"], rank["te"]
        assert te["names"] == local["names"]
        assert te["loss"] == pytest.approx(local["loss"], rel=1e-5)
        assert te["norm"] == pytest.approx(local["norm"], rel=1e-5)
        assert max(te["errors"].values()) < 1e-5, te["errors"]
        assert te.get("metrics", {}) == pytest.approx(local.get("metrics", {}), rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_products_run_in_the_recipe_in_both_passes(results: dict[str, Any], name: str) -> None:
    """Recomputed ones too; without gradients all but delayed scaling's; and rollouts never."""
    kind, layout, recipe = CASES[name]
    for rank in results[name]:
        te = rank["te"]
        passes = {False, True} if "recompute_granularity" in layout else {False}
        assert te["training"] == {(RECIPES[recipe], again) for again in passes}
        quantised = None if recipe is Fp8Recipe.delayed else RECIPES[recipe]
        assert te["inference"] == {(quantised, False)}
        assert te["modules"] == {
            "TELayerNormColumnParallelLinear",
            "TERowParallelLinear",
            *(() if kind == "dense" else ("TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear")),
        }
        if kind == "dense":
            assert te["rollouts"] == {None}
            assert te["same_rollouts"]


def test_delayed_scaling_updates_its_scales_once_a_micro_batch(results: dict[str, Any]) -> None:
    for rank in results["dense, delayed"]:
        assert rank["te"]["updates"] == len(rank["te"]["rows"])
    for name in ("dense, bf16", "dense, tensorwise, sequence parallel"):
        assert results[name][0]["te"]["updates"] == 0


@pytest.mark.parametrize("name", CASES)
def test_checkpoints_go_both_ways_under_the_same_keys(results: dict[str, Any], name: str) -> None:
    assert all(rank["to_local"] and rank["to_te"] for rank in results[name])
    te, local = results[name][0]["checkpoints"]
    assert {key: tensor.shape for key, tensor in te.tensors.items()} == {key: t.shape for key, t in local.tensors.items()}
    assert te.objects == local.objects


@pytest.mark.parametrize("name", CASES)
def test_a_run_goes_on_with_delayed_scalings_history_alone(results: dict[str, Any], name: str) -> None:
    """What the other recipes keep beside weights is neither needed nor unpickled."""
    delayed = CASES[name][2] is Fp8Recipe.delayed
    for rank in results[name]:
        states = rank["te"]["resumed"]
        assert bool(states) == delayed
        for state in states:
            assert state["recipe"] == "TEDelayedScaling"
            assert len(state["amax_history_fwd"]) == 1024
            gemms = torch.arange(len(state["scale_fwd"]) // 3, dtype=torch.float32)  # of several experts, each its own
            assert torch.equal(state["scale_fwd"], gemms.repeat(3))
            assert torch.equal(state["amax_history_bwd"], gemms.repeat(1024, 2))


@pytest.mark.parametrize(
    ("name", "multiple"),
    [
        ("dense, bf16", 2),
        ("dense, tensorwise, sequence parallel", 32),
        ("dense, mxfp8, context parallel", 64),
        ("dense, blockwise, pipeline", 16),
    ],
)
def test_rows_are_as_long_as_the_recipe_needs(results: dict[str, Any], name: str, multiple: int) -> None:
    for rank in results[name]:
        for padded, plain in zip(rank["te"]["rows"], rank["te"]["unpadded"], strict=True):
            assert padded == -(-plain // multiple) * multiple
