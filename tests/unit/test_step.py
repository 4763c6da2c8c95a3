"""A step's loss and gradient do not depend on how its groups are cut into rows, and are those of plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from helpers.rows import assert_gradients_close, gradients, one_rank
from helpers.tiny import PATCH_WIDTH, make_group, tiny_model
from torch import Tensor

from prism_nemo.algorithms.metrics import MetricSums, mean_of
from prism_nemo.config.enums import Precision, Routing
from prism_nemo.config.schema import DiscriminatorConfig, ModelConfig, OptimizerConfig, ParallelConfig
from prism_nemo.engine.step import reduce_metrics, run_rows
from prism_nemo.models.base import TrainableModel, TrainingBatch
from prism_nemo.models.discriminator import DiscriminatorModel
from prism_nemo.models.policy import PolicyModel, PolicyOutput
from prism_nemo.packing.groups import SegmentKind
from prism_nemo.packing.rows import PackedRow, make_row, pack_rows
from prism_nemo.stages.sft import cross_entropy

KINDS = (SegmentKind.PERCEPTION, SegmentKind.REASONING)
GROUPS = [
    make_group([(4, 6), (8, 4)], (5, 9, 3), seed=60, kinds=KINDS),
    make_group((), (6, 2), seed=61, kinds=KINDS, text_length=8),
    make_group([(2, 12)], (4, 7), seed=62, kinds=KINDS),
    make_group((), (11,), seed=63, kinds=KINDS),
]
CUTS = {"one": [[0, 1, 2, 3]], "two": [[0, 3], [1, 2]], "each": [[2], [0], [1], [3]]}
TOKENS = sum(len(segment) for group in GROUPS for segment in group.segments)


def rows_of(cut: str, *, pad_multiple: int = 1) -> list[PackedRow]:
    return [make_row([GROUPS[index] for index in members], pad_multiple=pad_multiple) for members in CUTS[cut]]


def policy(*, experts: bool = False) -> PolicyModel:
    config = ModelConfig(path=str(tiny_model(experts=experts).directory), precision=Precision.fp32)
    return PolicyModel(config, ParallelConfig(), one_rank())


def discriminator(routing: Routing) -> DiscriminatorModel:
    config = DiscriminatorConfig(
        path=str(tiny_model().directory),
        precision=Precision.fp32,
        routing=routing,
        router_init_std=0.3,
        head_init_std=0.5,
        expert_noise_std=0.05,
        moe_aux_loss_coeff=0.5,
    )
    return DiscriminatorModel(config, ParallelConfig(), one_rank(), seed=3)


def weighted_scores(row: PackedRow, scores: Tensor) -> tuple[Tensor, MetricSums]:
    """Every score by a number of its own."""
    weights = torch.sin(row.label_ids.new_tensor([int(row.input_ids[end]) for end in row.segment_end.tolist()]).float())
    return (scores * weights).sum() / 8, {"score": mean_of(scores)}


def token_loss(row: PackedRow, output: PolicyOutput) -> tuple[Tensor, MetricSums]:
    """Weighs every token by a number of its own, so that no two places can be mixed up."""
    weights = torch.cos(row.label_ids.float() + row.sample_of_label)
    return (output.log_probs * weights).sum() / TOKENS, {"log_prob": mean_of(output.log_probs), "tokens": (row.num_labels, 1)}


CASES: dict[str, tuple[Callable[[], TrainableModel], Any]] = {
    "policy": (policy, token_loss),
    "policy_with_experts": (partial(policy, experts=True), token_loss),
    "sft": (policy, partial(cross_entropy, global_tokens=float(TOKENS))),
    "discriminator": (partial(discriminator, Routing.learned), weighted_scores),
    "dedicated": (partial(discriminator, Routing.dedicated), weighted_scores),
}


def step(model: TrainableModel, rows: list[PackedRow], loss: Any) -> tuple[float, dict[str, float], dict[str, Tensor]]:
    model.prepare_for_training_step()
    is_discriminator = isinstance(model, DiscriminatorModel)
    if is_discriminator:
        model.start_batch(rows)
    value, metrics = model.get_loss_and_metrics(TrainingBatch(rows, loss), forward_only=False)
    model.finish_training_step()
    if is_discriminator:
        metrics |= model.router_metrics()
    return value, metrics, gradients(model.module, model.hf_config, score_head=is_discriminator)


@pytest.mark.parametrize("case", CASES)
def test_rows_do_not_matter(case: str) -> None:
    build, loss = CASES[case]
    model = build()
    model.build_optimizer(OptimizerConfig(), 1)
    expected_loss, expected_metrics, expected = step(model, rows_of("one"), loss)
    assert expected_loss != 0
    assert all(float(grad.norm()) > 0 for name, grad in expected.items() if name.endswith("_proj.weight"))
    for cut, pad_multiple in (("two", 1), ("each", 1), ("each", 16)):
        found_loss, found_metrics, found = step(model, rows_of(cut, pad_multiple=pad_multiple), loss)
        assert found_loss == pytest.approx(expected_loss, abs=2e-6)
        rows_counted = found_metrics.pop("tokens", None), expected_metrics.get("tokens")
        assert found_metrics == pytest.approx(
            {name: value for name, value in expected_metrics.items() if name != "tokens"}, abs=1e-5
        )
        assert rows_counted[0] is None or rows_counted == (TOKENS / len(CUTS[cut]), TOKENS)
        assert_gradients_close(found, expected, 2e-5)


@pytest.mark.parametrize("case", ["policy", "policy_with_experts"])
def test_gradients_are_plain_autograds(case: str) -> None:
    """Megatron's schedule divides by nothing and averages over nothing."""
    build, loss = CASES[case]
    scheduled, plain = build(), build()
    scheduled.build_optimizer(OptimizerConfig(), 1)
    _, _, found = step(scheduled, rows_of("each"), loss)
    plain.module.train()
    for parameter in plain.module.parameters():
        assert parameter.requires_grad
    plain.ddp[0].zero_grad_buffer()
    total = sum(loss(row, plain.forward_row(plain.module, row))[0] for row in rows_of("one"))
    total.backward()
    assert_gradients_close(found, gradients(plain.module, plain.hf_config), 2e-5)


def test_an_empty_row_adds_nothing_and_keeps_the_graph() -> None:
    """What a rank with fewer rows than others runs."""
    for case in ("policy", "discriminator"):
        build, loss = CASES[case]
        model = build()
        model.build_optimizer(OptimizerConfig(), 1)
        expected_loss, _, expected = step(model, rows_of("one"), loss)
        idle = make_row([], patch_size=PATCH_WIDTH)
        found_loss, _, found = step(model, [idle, *rows_of("one"), idle], loss)
        assert found_loss == pytest.approx(expected_loss, abs=1e-6)
        assert_gradients_close(found, expected, 1e-6)
        nothing, metrics, zeros = step(model, [idle], loss)
        assert nothing == 0.0
        assert all(float(grad.abs().sum()) == 0 for grad in zeros.values())
        assert not set(metrics) & {"log_prob", "score", "router/balance_loss"}


def test_no_rows_at_all() -> None:
    model = policy()
    assert run_rows(model.ddp, [], model.forward_row, token_loss, model.runtime, forward_only=False) == []
    assert model.get_loss_and_metrics(TrainingBatch([], token_loss), forward_only=True) == (0.0, {})
    assert model.infer([]) == []


def test_forward_only_leaves_the_gradients_alone() -> None:
    model = policy()
    model.build_optimizer(OptimizerConfig(), 1)
    value, metrics, before = step(model, rows_of("two"), token_loss)
    with model.inference_mode():
        again = model.get_loss_and_metrics(TrainingBatch(rows_of("two"), token_loss), forward_only=True)
    assert again[0] == pytest.approx(value, abs=1e-6)
    assert again[1] == pytest.approx(metrics, abs=1e-6)
    after = gradients(model.module, model.hf_config)
    assert all(torch.equal(after[name], grad) for name, grad in before.items())


def test_gradients_add_up_until_they_are_zeroed() -> None:
    model = policy()
    model.build_optimizer(OptimizerConfig(), 1)
    _, _, once = step(model, rows_of("two"), token_loss)
    model.get_loss_and_metrics(TrainingBatch(rows_of("each"), token_loss), forward_only=False)
    twice = gradients(model.module, model.hf_config)
    assert_gradients_close(twice, {name: 2 * grad for name, grad in once.items()}, 2e-5)
    model.prepare_for_training_step()
    assert all(float(grad.abs().sum()) == 0 for grad in gradients(model.module, model.hf_config).values())


def test_inference_gives_the_rows_outputs_in_order() -> None:
    model = policy()
    rows = rows_of("each")
    outputs = model.infer(rows)
    assert [output.log_probs.numel() for output in outputs] == [row.num_labels for row in rows] == [11, 17, 8, 11]
    assert not outputs[0].log_probs.requires_grad
    (whole,) = model.infer(rows_of("one"))
    pieces = torch.split(whole.log_probs, [17, 8, 11, 11])
    for (member,), output in zip(CUTS["each"], outputs, strict=True):
        torch.testing.assert_close(output.log_probs, pieces[member], rtol=1e-5, atol=1e-5)
    log_probs = model.get_inference_log_probs(rows)
    assert all(torch.equal(found, output.log_probs) for found, output in zip(log_probs, outputs, strict=True))


def test_metrics_are_sums_over_counts_and_absent_where_nothing_was_counted() -> None:
    sums: MetricSums = {"a": (torch.tensor(6.0), torch.tensor(4)), "nothing": (0.0, 0)}
    assert reduce_metrics(sums, one_rank()) == {"a": 1.5}


def test_packing_by_budget_is_one_of_the_cuts() -> None:
    """The stages cut by a number of tokens."""
    model = policy()
    model.build_optimizer(OptimizerConfig(), 1)
    expected_loss, _, expected = step(model, rows_of("one"), token_loss)
    for budget, count in ((200, 1), (60, 2), (50, 3)):
        rows = pack_rows(GROUPS, max_tokens=budget)
        assert len(rows) == count
        found_loss, _, found = step(model, rows, token_loss)
        assert found_loss == pytest.approx(expected_loss, abs=2e-6)
        assert_gradients_close(found, expected, 2e-5)
