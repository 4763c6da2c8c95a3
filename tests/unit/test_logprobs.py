"""Log-probabilities of labels and their gradients against float64 log_softmax. Two ranks: tests/distributed."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from helpers.rows import one_rank
from torch import Tensor

from prism_nemo.engine import logprobs
from prism_nemo.engine.logprobs import label_log_probs

TOKENS, HIDDEN, VOCABULARY = 37, 16, 50
BANNED = (0, 17, 49)


class Case(NamedTuple):
    hidden: Tensor
    weight: Tensor
    labels: Tensor
    upstream: Tensor


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> None:
    one_rank()


@pytest.fixture
def case() -> Case:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    labels[0], labels[1] = 1, VOCABULARY - 2
    labels[torch.isin(labels, torch.tensor(BANNED))] = 5
    return Case(
        torch.randn(TOKENS, HIDDEN, generator=generator),
        torch.randn(VOCABULARY, HIDDEN, generator=generator),
        labels,
        torch.randn(TOKENS, generator=generator),
    )


class Result(NamedTuple):
    log_probs: Tensor
    entropy: Tensor
    hidden_grad: Tensor
    weight_grad: Tensor


def ours(case: Case, temperature: float, banned: tuple[int, ...]) -> Result:
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    log_probs, entropy = label_log_probs(
        hidden, weight, case.labels, dist.group.WORLD, temperature=temperature, banned_token_ids=banned, with_entropy=True
    )
    (log_probs * case.upstream).sum().backward()
    assert entropy is not None
    assert not entropy.requires_grad
    return Result(log_probs.detach(), entropy, hidden.grad, weight.grad)


def oracle(case: Case, temperature: float, banned: tuple[int, ...]) -> Result:
    hidden, weight = case.hidden.double().requires_grad_(), case.weight.double().requires_grad_()
    kept = torch.tensor([token for token in range(VOCABULARY) if token not in banned])
    # Only the kept part of the vocabulary takes part at all: no infinities here.
    everything = (hidden @ weight[kept].t() / temperature).log_softmax(dim=1)
    place = (case.labels.unsqueeze(1) == kept).int().argmax(dim=1, keepdim=True)
    log_probs = everything.gather(1, place).squeeze(1)
    (log_probs * case.upstream.double()).sum().backward()
    entropy = -(everything.exp() * everything).sum(dim=1)
    return Result(log_probs.detach(), entropy.detach(), hidden.grad, weight.grad)


def assert_same(found: Result, expected: Result) -> None:
    for mine, want in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), want.double(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
@pytest.mark.parametrize("banned", [(), BANNED])
def test_values_and_gradients(case: Case, temperature: float, banned: tuple[int, ...]) -> None:
    assert_same(ours(case, temperature, banned), oracle(case, temperature, banned))


@pytest.mark.parametrize("logits_at_a_time", [1, 3 * VOCABULARY, TOKENS * VOCABULARY - 1])
def test_chunks_change_nothing(case: Case, logits_at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "_CHUNK_LOGITS", logits_at_a_time)
    assert_same(ours(case, 0.8, BANNED), oracle(case, 0.8, BANNED))


def test_large_logits_do_not_overflow(case: Case) -> None:
    large = case._replace(hidden=case.hidden * 300)
    found, expected = ours(large, 1.0, ()), oracle(large, 1.0, ())
    assert float(expected.log_probs.min()) < -1000
    torch.testing.assert_close(found.log_probs.double(), expected.log_probs, atol=0.02, rtol=1e-6)
    torch.testing.assert_close(found.hidden_grad.double(), expected.hidden_grad, atol=1e-2, rtol=1e-3)


def test_two_tokens_by_hand() -> None:
    """Logits (0, ln 3): probabilities 1/4 and 3/4; at temperature 1/2, 1/10 and 9/10."""
    hidden, weight = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [1.0986123]])
    for temperature, expected in ((1.0, [0.25, 0.75]), (0.5, [0.1, 0.9])):
        log_probs, entropy = label_log_probs(
            hidden, weight, torch.tensor([0, 1]), dist.group.WORLD, temperature=temperature, with_entropy=True
        )
        torch.testing.assert_close(log_probs.exp(), torch.tensor(expected))
        want = -sum(p * torch.tensor(p).log() for p in expected)
        torch.testing.assert_close(entropy, torch.stack([want, want]))


def test_a_banned_label_has_probability_zero(case: Case) -> None:
    labels = case.labels.clone()
    labels[3] = BANNED[1]
    log_probs, entropy = label_log_probs(case.hidden, case.weight, labels, dist.group.WORLD, banned_token_ids=BANNED)
    assert entropy is None
    assert log_probs.isneginf().nonzero().flatten().tolist() == [3]


def test_without_labels(case: Case) -> None:
    """An idle rank's row: a graph is there, and its gradients are zeros."""
    hidden, weight = case.hidden[:0].clone().requires_grad_(), case.weight.clone().requires_grad_()
    log_probs, entropy = label_log_probs(hidden, weight, case.labels[:0], dist.group.WORLD, with_entropy=True)
    assert entropy is not None
    assert log_probs.shape == entropy.shape == (0,)
    log_probs.sum().backward()
    assert hidden.grad is not None
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_frozen_weight_takes_no_gradient(case: Case) -> None:
    hidden = case.hidden.clone().requires_grad_()
    log_probs, _ = label_log_probs(hidden, case.weight, case.labels, dist.group.WORLD)
    (log_probs * case.upstream).sum().backward()
    torch.testing.assert_close(hidden.grad.double(), oracle(case, 1.0, ()).hidden_grad, atol=2e-5, rtol=1e-5)


def test_bf16_is_within_its_rounding(case: Case) -> None:
    """The model's precision on a GPU: logits rounded to 8 bits, everything after them in fp32."""
    rounded = Case(case.hidden.bfloat16(), case.weight.bfloat16(), case.labels, case.upstream)
    found, expected = ours(rounded, 1.0, ()), oracle(rounded, 1.0, ())
    assert found.log_probs.dtype == torch.float32
    assert found.weight_grad.dtype == torch.bfloat16
    torch.testing.assert_close(found.log_probs.double(), expected.log_probs, atol=0.1, rtol=0)
    relative = (found.weight_grad.double() - expected.weight_grad).norm() / expected.weight_grad.norm()
    assert float(relative) < 0.02
