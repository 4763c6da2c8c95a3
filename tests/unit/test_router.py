"""The experts' router: pools, the balancing loss and its gradient, counts, and independence of how groups are cut into rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from helpers.rows import assert_gradients_close, build_model, gradients, one_rank, routing_of, run_row
from helpers.tiny import NUM_EXPERTS, TOPK, TinyModel, make_group, tiny_model
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

from prism_nemo.config.enums import Precision
from prism_nemo.config.schema import ParallelConfig
from prism_nemo.models.context import PADDING, PROMPT, RouterStatistics, RoutingContext
from prism_nemo.models.qwen3_vl.config import Qwen3VLShape
from prism_nemo.models.qwen3_vl.model import Qwen3VLModel
from prism_nemo.models.router import GroupBalancedRouter, pool_mask
from prism_nemo.packing.groups import Group, SegmentKind
from prism_nemo.packing.rows import make_row

LAYERS = 4
KINDS = (SegmentKind.PERCEPTION, SegmentKind.REASONING)
GROUPS = [
    make_group([(4, 6)], (5, 9, 3, 7), seed=50, kinds=KINDS),
    make_group((), (6, 2), seed=51, kinds=KINDS, text_length=8),
    make_group([(2, 4), (4, 4)], (4, 4), seed=52, kinds=KINDS),
]


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> None:
    one_rank()
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1))  # a process-wide setting that Megatron's schedules make


@pytest.fixture(scope="module")
def tiny() -> TinyModel:
    return tiny_model(experts=True)


@pytest.fixture
def model(tiny: TinyModel) -> Qwen3VLModel:
    return build_model(tiny.directory)


@pytest.fixture
def router(tiny: TinyModel) -> GroupBalancedRouter:
    config = Qwen3VLShape.from_hf(tiny.config).language_config(ParallelConfig(), Precision.fp32)
    return GroupBalancedRouter(config, ProcessGroupCollection.use_mpu_process_groups())


def context_of(group: Sequence[int], kind: Sequence[int], **options: float) -> RoutingContext:
    return RoutingContext(
        torch.tensor(group),
        torch.tensor(kind),
        max(group) + 1,
        statistics=RouterStatistics(),
        **options,  # type: ignore[arg-type]
    )


def random_logits(tokens: int) -> Tensor:
    return (torch.randn(tokens, 1, NUM_EXPERTS, generator=torch.Generator().manual_seed(3)) * 2).requires_grad_()


GROUP_OF_TOKEN = [0] * 9 + [1] * 5 + [2] * 14 + [-1] * 4
KIND_OF_TOKEN = [PROMPT] * 3 + [1] * 3 + [2] * 3 + [PROMPT, 1, 1, 2, 2] + [PROMPT] * 4 + [0] * 10 + [PADDING] * 4


def by_loops(logits: Tensor, group: Sequence[int]) -> Tensor:
    """Sum over groups of tokens * experts * sum_i f_i P_i in float64, one token at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for number in range(max(group) + 1):
        tokens = [token for token, owner in enumerate(group) if owner == number]
        chosen, probability = [0.0] * NUM_EXPERTS, [torch.zeros((), dtype=torch.float64)] * NUM_EXPERTS
        for token in tokens:
            row = logits[token, 0].double()
            for expert in sorted(range(NUM_EXPERTS), key=lambda e: -float(row[e].detach()))[:TOPK]:
                chosen[expert] += 1 / len(tokens)
            exponent = row.exp()
            for expert in range(NUM_EXPERTS):
                probability[expert] = probability[expert] + exponent[expert] / exponent.sum() / len(tokens)
        total = total + len(tokens) * NUM_EXPERTS * sum(f * p for f, p in zip(chosen, probability, strict=True))
    return total


def test_balance_is_the_written_out_formula_and_transformers(router: GroupBalancedRouter) -> None:
    logits = random_logits(len(GROUP_OF_TOKEN))
    router.context = context_of(GROUP_OF_TOKEN, KIND_OF_TOKEN)
    router.routing(logits)
    statistics = router.context.statistics
    assert statistics is not None
    assert statistics.tokens == 28
    assert statistics.balance == pytest.approx(float(by_loops(logits.detach(), GROUP_OF_TOKEN)), rel=1e-6)
    theirs = sum(
        len(part) * float(load_balancing_loss_func((part[:, 0],), NUM_EXPERTS, TOPK))
        for part in logits[:28].detach().split([9, 5, 14])
    )
    assert statistics.balance == pytest.approx(theirs, rel=1e-6)


def test_perfect_balance_is_the_number_of_choices(router: GroupBalancedRouter) -> None:
    """f_i = P_i * topk = topk / experts: the loss is topk, its least value."""
    logits = torch.zeros(4, 1, NUM_EXPERTS)
    for token in range(4):
        logits[token, 0, [token, (token + 1) % 4]] = 1.0
    router.context = context_of([0] * 4, [0] * 4)
    router.routing(logits)
    assert router.context.statistics is not None
    assert router.context.statistics.balance / 4 == pytest.approx(TOPK, rel=1e-6)


def test_gradient_of_the_balance_loss(router: GroupBalancedRouter) -> None:
    """The output's own gradient passes unchanged, and coefficient / (global tokens * layers) * d balance comes on top."""
    upstream = torch.randn(len(GROUP_OF_TOKEN), NUM_EXPERTS, generator=torch.Generator().manual_seed(4))
    logits = random_logits(len(GROUP_OF_TOKEN))
    router.context = context_of(GROUP_OF_TOKEN, KIND_OF_TOKEN, balance_coefficient=0.5, global_tokens=100.0)
    probabilities, _ = router.routing(logits)
    (probabilities * upstream).sum().backward()

    router.context = None
    oracle = random_logits(len(GROUP_OF_TOKEN))
    probabilities, _ = router.routing(oracle)
    ((probabilities * upstream).sum() + 0.5 / (100.0 * LAYERS) * by_loops(oracle, GROUP_OF_TOKEN)).backward()
    torch.testing.assert_close(logits.grad, oracle.grad, atol=1e-7, rtol=1e-5)
    plain = random_logits(len(GROUP_OF_TOKEN))
    (router.routing(plain)[0] * upstream).sum().backward()
    assert float((plain.grad - logits.grad)[:28].abs().max()) > 1e-4  # type: ignore[operator]
    assert torch.equal(plain.grad[28:], logits.grad[28:])  # type: ignore[index]  padding is not balanced


def test_without_a_coefficient_the_balance_is_measured_only(router: GroupBalancedRouter) -> None:
    logits, plain = random_logits(len(GROUP_OF_TOKEN)), random_logits(len(GROUP_OF_TOKEN))
    (router.routing(plain)[0] ** 2).sum().backward()
    router.context = context_of(GROUP_OF_TOKEN, KIND_OF_TOKEN)
    (router.routing(logits)[0] ** 2).sum().backward()
    assert torch.equal(logits.grad, plain.grad)  # type: ignore[arg-type]
    assert router.context.statistics is not None
    assert router.context.statistics.balance > 0


def test_pool_mask_by_hand() -> None:
    kind = torch.tensor([PROMPT, SegmentKind.PERCEPTION, SegmentKind.REASONING, SegmentKind.RESPONSE, PADDING])
    blocked = [[0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert pool_mask(kind, 4).int().tolist() == blocked


def test_dedicated_pools_hold_every_token(router: GroupBalancedRouter) -> None:
    logits = random_logits(len(GROUP_OF_TOKEN))
    context = context_of(GROUP_OF_TOKEN, KIND_OF_TOKEN, balance_coefficient=0.1)
    context.dedicated = True
    router.context = context
    probabilities, choices = router.routing(logits)
    kind = context.token_kind
    assert (choices.sum(dim=1) == TOPK).all()
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(len(kind)))
    assert not choices[kind == SegmentKind.PERCEPTION][:, 2:].any()
    assert not choices[kind == SegmentKind.REASONING][:, :2].any()
    free = (kind == PROMPT) | (kind == SegmentKind.RESPONSE)
    _, learned = GroupBalancedRouter.routing(_without_context(router), logits)
    assert torch.equal(choices[free], learned[free])
    assert not torch.equal(choices[~free], learned[~free])
    (probabilities**2).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    blocked = pool_mask(kind, NUM_EXPERTS)
    assert not logits.grad[:, 0][blocked].any()


def _without_context(router: GroupBalancedRouter) -> GroupBalancedRouter:
    router.context = None
    return router


def test_counts_per_kind_by_hand(router: GroupBalancedRouter) -> None:
    """Every token's two largest logits are written down; a second row adds up, padding and a recomputed row do not."""
    chosen = [(0, 1), (0, 2), (2, 3), (2, 3), (1, 3), (0, 3)]
    logits = torch.zeros(6, 1, NUM_EXPERTS)
    for token, experts in enumerate(chosen):
        logits[token, 0, list(experts)] = 5.0
    context = context_of([0, 0, 0, 0, 1, -1], [PROMPT, 1, 1, 2, 2, PADDING])
    router.context = context
    router.routing(logits)
    assert context.statistics is not None
    load = {kind: counts.tolist() for kind, counts in context.statistics.load.items()}
    assert load == {PROMPT: [1, 1, 0, 0], 1: [1, 0, 2, 1], 2: [0, 1, 1, 2]}
    router.routing(logits)  # the same row once more: recomputed, not another
    assert context.statistics.load[1].tolist() == [1, 0, 2, 1]
    assert context.statistics.tokens == 5
    router.context = replace(context, counted=set())
    router.routing(logits)
    assert context.statistics.load[1].tolist() == [2, 0, 4, 2]
    assert context.statistics.tokens == 10


Outcome = tuple[dict[str, Tensor], RouterStatistics]


def balance_alone(model: Qwen3VLModel, tiny: TinyModel, rows: Sequence[Sequence[Group]], *, dedicated: bool = False) -> Outcome:
    """Gradients of the balancing loss (and nothing else) accumulated over rows, and the sums of the statistics."""
    model.zero_grad(set_to_none=True)
    tokens = sum(group.num_tokens for row in rows for group in row)
    total = RouterStatistics()
    for groups in rows:
        row = make_row(groups, pad_multiple=16)
        routing = routing_of(row, coefficient=0.3, global_tokens=tokens, dedicated=dedicated)
        (run_row(model, row, routing).hidden.sum() * 0.0).backward()
        assert routing.statistics is not None
        total.balance += routing.statistics.balance
        total.tokens += routing.statistics.tokens
        for kind, load in routing.statistics.load.items():
            total.load[kind] = total.load.get(kind, torch.zeros_like(load)) + load
    return gradients(model, tiny.config), total


@pytest.mark.parametrize("dedicated", [False, True])
def test_rows_do_not_change_loss_gradient_or_counts(tiny: TinyModel, model: Qwen3VLModel, dedicated: bool) -> None:
    first, second, third = GROUPS
    grads, total = balance_alone(model, tiny, [[first, second, third]], dedicated=dedicated)
    assert float(grads["model.language_model.layers.0.mlp.gate.weight"].norm()) > 1e-4
    tokens = sum(group.num_tokens for group in GROUPS)
    assert total.tokens == LAYERS * tokens
    assert sum(float(load.sum()) for load in total.load.values()) == LAYERS * TOPK * tokens
    assert set(total.load) == {PROMPT, SegmentKind.PERCEPTION, SegmentKind.REASONING}
    if dedicated:
        assert total.load[SegmentKind.PERCEPTION][2:].tolist() == [0, 0] == total.load[SegmentKind.REASONING][:2].tolist()
    for rows in ([[first], [second], [third]], [[third, first], [second]]):
        other_grads, other = balance_alone(model, tiny, rows, dedicated=dedicated)
        assert_gradients_close(other_grads, grads, 1e-5)
        assert other.balance == pytest.approx(total.balance, rel=1e-6)
        assert other.tokens == total.tokens
        assert {kind: load.tolist() for kind, load in other.load.items()} == {
            kind: load.tolist() for kind, load in total.load.items()
        }


def test_no_layer_is_left_out(tiny: TinyModel, model: Qwen3VLModel) -> None:
    """The balancing loss of every layer reaches that layer's router, and through the layers below the embeddings."""
    grads, _ = balance_alone(model, tiny, [GROUPS])
    gates = [grads[f"model.language_model.layers.{layer}.mlp.gate.weight"] for layer in range(LAYERS)]
    assert all(float(gate.norm()) > 1e-4 for gate in gates)
    assert float(grads["model.language_model.embed_tokens.weight"].norm()) > 1e-4
    assert not grads["lm_head.weight"].any()
