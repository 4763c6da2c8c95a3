"""Two ranks against one, in fp32: values, and gradients of every parameter as Megatron's DDP finishes them.

One launch runs every model on every row under tensor parallelism, and a training step with its rows spread over two
data-parallel ranks; the tests compare what it brought back.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from helpers.rows import assert_gradients_close, build_model, gradients, one_rank, routing_of, run_row
from helpers.tiny import NUM_EXPERTS, PATCH_WIDTH, make_group, tiny_model
from helpers.videos import mixed_group, mixed_prompt
from torch import Tensor

from prism_nemo.algorithms.metrics import MetricSums
from prism_nemo.config.enums import Device, Precision, Routing
from prism_nemo.config.schema import DiscriminatorConfig, OptimizerConfig, ParallelConfig, RuntimeConfig
from prism_nemo.convert.hf import load_model_config
from prism_nemo.convert.qwen3_vl import HF_SCORE_HEAD
from prism_nemo.engine.logprobs import label_log_probs
from prism_nemo.engine.optimizer import ModelOptimizer, wrap_data_parallel
from prism_nemo.engine.runtime import Runtime, initialize, session
from prism_nemo.models.base import TrainingBatch
from prism_nemo.models.discriminator import DiscriminatorModel
from prism_nemo.models.qwen3_vl.model import Qwen3VLModel
from prism_nemo.models.weights import export_hf_tensors
from prism_nemo.packing.groups import SegmentKind
from prism_nemo.packing.rows import PackedRow, make_row

TP = 2
KINDS = (SegmentKind.PERCEPTION, SegmentKind.REASONING)
BALANCE, GLOBAL_TOKENS = 0.3, 50.0


class Case(NamedTuple):
    """A model, and how it is cut. Megatron trains experts under tensor parallelism with sequence parallelism only."""

    model: dict[str, bool]
    sequence_parallel: bool
    dedicated: bool = False


CASES = {
    "dense": Case({}, False),
    "dense_sequence_parallel": Case({}, True),
    "dense_tied": Case({"tied": True}, False),
    "dense_tied_sequence_parallel": Case({"tied": True}, True),
    "moe": Case({"experts": True}, False),
    "moe_dedicated": Case({"experts": True}, True, dedicated=True),
}


def make_rows() -> dict[str, PackedRow]:
    several = [
        make_group([(4, 6), (8, 4)], (5, 9, 3, 7), seed=60, kinds=KINDS),
        make_group((), (6, 2), seed=61, kinds=KINDS, text_length=8),
        make_group([(2, 12)], (4,), seed=62),
    ]
    text = [make_group((), (5, 7, 2), seed=63, kinds=KINDS, text_length=9)]
    image = make_group([(4, 6)], (3, 4), seed=64)
    long_text = make_group((), (20, 21), seed=65, text_length=10)
    video = mixed_group(mixed_prompt([3, (3, 4, 6), 2, (4, 4), (2, 2, 8), 4], seed=66), (5, 2), seed=66)
    rows = {
        "several_groups": several,
        "text": text,
        "image_in_first_half": [image, long_text],
        "image_in_last_half": [long_text, image],
        "videos": [video, image],
    }
    made = {name: make_row(groups, pad_multiple=TP) for name, groups in rows.items()}
    return {**made, "padded": make_row(several, pad_multiple=64), "idle": make_row([], pad_multiple=TP, patch_size=PATCH_WIDTH)}


ROWS = make_rows()
STEP_ROWS = {name: row for name, row in ROWS.items() if name != "videos"}  # of a discriminator's step


def run_and_differentiate(model: Qwen3VLModel, row: PackedRow, *, dedicated: bool) -> dict[str, Any]:
    """Forward and backward of a loss that weighs every log-probability and every hidden value on its own, balancing included."""
    routing = None
    if model.shape.moe is not None:
        routing = routing_of(row, coefficient=BALANCE, global_tokens=GLOBAL_TOKENS, dedicated=dedicated)
    output = run_row(model, row, routing)
    generator = torch.Generator().manual_seed(9)
    loss = (output.log_probs * torch.randn(output.log_probs.shape, generator=generator)).sum()
    read = output.hidden[: row.num_tokens]
    loss = loss + (read * torch.randn(read.shape, generator=generator)).sum() / 8
    loss.backward()
    found = {"loss": loss.detach(), "hidden": read.detach(), "log_probs": output.log_probs.detach(), "entropy": output.entropy}
    if routing is not None:
        statistics = routing.statistics
        assert statistics is not None
        found |= {"balance": statistics.balance, "tokens": statistics.tokens, "load": statistics.load}
    return found


def run_case(directory: Path, parallel: ParallelConfig, case: Case) -> dict[str, Any]:
    config = load_model_config(directory)
    model = build_model(directory, parallel)
    weights = {name: tensor.clone() for name, tensor in export_hf_tensors(model, config)}
    optimizer = ModelOptimizer(wrap_data_parallel(model, parallel), OptimizerConfig(), parallel, max_steps=1)
    rows = {}
    for name, row in ROWS.items():
        optimizer.zero_grad()
        rows[name] = run_and_differentiate(model, row, dedicated=case.dedicated)
        optimizer.finalize_gradients()
        rows[name]["gradients"] = gradients(model, config)
        optimizer.optimizer.prepare_grads()
        rows[name]["norm"] = float(optimizer.optimizer.get_grad_norm())
    return {"weights": weights, "rows": rows, "sequence_parallel": model.config.sequence_parallel}


DISCRIMINATORS = {
    routing: DiscriminatorConfig(
        precision=Precision.fp32,
        routing=routing,
        expert_noise_std=0.05,
        router_init_std=0.3,
        head_init_std=0.5,
        moe_aux_loss_coeff=0.2,
    )
    for routing in Routing
}


def run_discriminator(
    config: DiscriminatorConfig, directory: Path, parallel: ParallelConfig, runtime: Runtime, rows: list[PackedRow]
) -> dict[str, Any]:
    """One training step of a discriminator upcycled from a dense model; `rows` are this data-parallel rank's."""
    discriminator = DiscriminatorModel(replace(config, path=str(directory)), parallel, runtime, seed=5)
    discriminator.build_optimizer(OptimizerConfig(lr=1e-3), max_steps=1)
    discriminator.start_batch(rows)
    scores = discriminator.infer_rm_critic(rows)

    def loss(row: PackedRow, found: Tensor) -> tuple[Tensor, MetricSums]:
        return (found * torch.linspace(-1, 2, found.numel())).sum(), {"score": (float(found.detach().sum()), found.numel())}

    discriminator.start_batch(rows)
    discriminator.prepare_for_training_step()
    total, metrics = discriminator.get_loss_and_metrics(TrainingBatch(rows, loss), forward_only=False)
    discriminator.finish_training_step()
    found = {"gradients": gradients(discriminator.module, discriminator.hf_config, score_head=True)}
    norm = discriminator.optimizer_step(0).grad_norm
    return found | {"scores": scores, "loss": total, "norm": norm, "metrics": metrics | discriminator.router_metrics()}


LABELS = torch.randint(0, 64, (33,), generator=torch.Generator().manual_seed(10))
BANNED = (3, 40, 63)


def run_log_probs(*, temperature: float, banned: tuple[int, ...]) -> tuple[Tensor, ...]:
    """`label_log_probs` with this rank's part of a vocabulary of 64, its gradients gathered."""
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(33, 16, generator=generator).requires_grad_()
    full = torch.randn(64, 16, generator=generator)
    weight = full.chunk(dist.get_world_size())[dist.get_rank()].clone().requires_grad_()
    labels = LABELS.where(~torch.isin(LABELS, torch.tensor(BANNED)), 5)
    log_probs, entropy = label_log_probs(
        hidden, weight, labels, dist.group.WORLD, temperature=temperature, banned_token_ids=banned, with_entropy=True
    )
    (log_probs * torch.randn(33, generator=generator)).sum().backward()
    parts = [torch.empty_like(weight) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, weight.grad)
    assert entropy is not None
    assert hidden.grad is not None
    return log_probs.detach(), entropy, hidden.grad, torch.cat(parts)


FIRST_RANKS_ROWS = ("text",)  # the second rank has five times as many, so that the first runs empty ones
LOG_PROBS = [{"temperature": 1.0, "banned": ()}, {"temperature": 0.7, "banned": BANNED}]


def on_two_ranks(directories: dict[str, Path]) -> dict[str, Any]:
    """Everything that the tests below compare, from one rank's point of view."""
    parallel = ParallelConfig(tensor_model_parallel_size=TP)
    with session(parallel, RuntimeConfig(device=Device.cpu)) as runtime:
        found: dict[str, Any] = {"log_probs": [run_log_probs(**options) for options in LOG_PROBS]}
        for routing, config in DISCRIMINATORS.items():
            found[routing] = run_discriminator(config, directories["dense"], parallel, runtime, list(STEP_ROWS.values()))
        for name, case in CASES.items():
            cut = ParallelConfig(tensor_model_parallel_size=TP, sequence_parallel=case.sequence_parallel)
            found[name] = run_case(directories[name], cut, case)
        runtime = initialize(ParallelConfig(), RuntimeConfig(device=Device.cpu))
        mine = [row for name, row in STEP_ROWS.items() if (name in FIRST_RANKS_ROWS) == (runtime.data_parallel_rank == 0)]
        config = DISCRIMINATORS[Routing.learned]
        found["data_parallel"] = run_discriminator(config, directories["dense"], ParallelConfig(), runtime, mine)
    return found


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    directories = {name: tiny_model(**case.model).directory for name, case in CASES.items()}
    return run_ranks(on_two_ranks, TP, directories)


@pytest.fixture(scope="module", params=CASES)
def case_name(request: pytest.FixtureRequest) -> str:
    one_rank()
    return request.param


@pytest.fixture(scope="module")
def model(case_name: str) -> Qwen3VLModel:
    return build_model(tiny_model(**CASES[case_name].model).directory)


@pytest.mark.parametrize("row_name", ROWS)
def test_values_and_gradients_equal_one_rank(
    two_ranks: list[dict[str, Any]], case_name: str, model: Qwen3VLModel, row_name: str
) -> None:
    case, row = CASES[case_name], ROWS[row_name]
    model.zero_grad(set_to_none=True)
    expected = run_and_differentiate(model, row, dedicated=case.dedicated)
    expected_gradients = gradients(model, tiny_model(**case.model).config)
    norm = sum(float(grad.double().square().sum()) for grad in expected_gradients.values()) ** 0.5
    assert (norm > 1.0) == (row_name != "idle")
    for rank in two_ranks:
        found = rank[case_name]["rows"][row_name]
        for name in ("hidden", "log_probs", "entropy"):
            torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["loss"], expected["loss"], atol=1e-4, rtol=1e-5)
        assert_gradients_close(found["gradients"], expected_gradients, 1e-5)
        assert found["norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("case_name", [name for name, case in CASES.items() if "experts" in case.model], indirect=True)
@pytest.mark.parametrize("row_name", ROWS)
def test_router_statistics_add_up_to_one_ranks(
    two_ranks: list[dict[str, Any]], case_name: str, model: Qwen3VLModel, row_name: str
) -> None:
    """With sequence parallelism each rank counts its slice of the row."""
    case, row = CASES[case_name], ROWS[row_name]
    expected = run_and_differentiate(model, row, dedicated=case.dedicated)
    parts = [rank[case_name]["rows"][row_name] for rank in two_ranks]
    assert sum(part["tokens"] for part in parts) == expected["tokens"] == row.num_tokens * model.config.num_layers
    assert sum(part["balance"] for part in parts) == pytest.approx(expected["balance"], rel=1e-5, abs=1e-9)
    nothing = torch.zeros(NUM_EXPERTS, dtype=torch.float64)
    for kind, load in expected["load"].items():
        assert torch.equal(sum(part["load"].get(kind, nothing) for part in parts), load)


def test_weights_are_cut_and_gathered_bit_by_bit(two_ranks: list[dict[str, Any]], case_name: str, model: Qwen3VLModel) -> None:
    expected = dict(export_hf_tensors(model, tiny_model(**CASES[case_name].model).config))
    for rank in two_ranks:
        found = rank[case_name]["weights"]
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_what_runs_is_what_the_names_say(two_ranks: list[dict[str, Any]]) -> None:
    cut = {name: two_ranks[0][name]["sequence_parallel"] for name in CASES}
    assert cut == {name: name.endswith("sequence_parallel") or name.startswith("moe") for name in CASES}
    for name, half in (("image_in_first_half", 0), ("image_in_last_half", 1)):
        row = ROWS[name]
        assert (row.image_index // (row.layout.length // TP)).unique().tolist() == [half]
    row = ROWS["several_groups"]
    assert (row.image_index // (row.layout.length // TP)).unique().tolist() == [0, 1]


@pytest.mark.parametrize("number", range(len(LOG_PROBS)))
def test_log_probs_over_a_cut_vocabulary(two_ranks: list[dict[str, Any]], number: int) -> None:
    one_rank()
    expected = run_log_probs(**LOG_PROBS[number])
    for rank in two_ranks:
        for found, want in zip(rank["log_probs"][number], expected, strict=True):
            torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


def assert_same_step(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert expected["norm"] > 1
    assert float(expected["gradients"][HF_SCORE_HEAD].norm()) > 1
    assert_gradients_close(found["gradients"], expected["gradients"], 1e-5)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert found["norm"] == pytest.approx(expected["norm"], rel=1e-5)
    assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-5)
    assert expected["metrics"].keys() >= {"score", "router/balance_loss", "expert_load/prompt/0", "expert_load/reasoning/3"}


@pytest.mark.parametrize("routing", DISCRIMINATORS)
def test_discriminator_step_equals_one_ranks(two_ranks: list[dict[str, Any]], routing: Routing) -> None:
    config, rows = DISCRIMINATORS[routing], list(STEP_ROWS.values())
    expected = run_discriminator(config, tiny_model().directory, ParallelConfig(), one_rank(), rows)
    for rank in two_ranks:
        torch.testing.assert_close(rank[routing]["scores"], expected["scores"], atol=1e-5, rtol=1e-5)
        assert_same_step(rank[routing], expected)


def test_step_does_not_depend_on_which_rank_has_which_rows(two_ranks: list[dict[str, Any]]) -> None:
    """One data-parallel rank with a row of text alone, the other with all the images."""
    config, rows = DISCRIMINATORS[Routing.learned], list(STEP_ROWS.values())
    expected = run_discriminator(config, tiny_model().directory, ParallelConfig(), one_rank(), rows)
    scores = iter([*two_ranks[1]["data_parallel"]["scores"]])
    text = two_ranks[0]["data_parallel"]["scores"]
    in_order = [text[0] if name in FIRST_RANKS_ROWS else next(scores) for name in STEP_ROWS]
    torch.testing.assert_close(in_order, expected["scores"], atol=1e-5, rtol=1e-5)
    for rank in two_ranks:
        assert_same_step(rank["data_parallel"], expected)
