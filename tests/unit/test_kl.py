"""KL estimators: values, their expectation over a whole distribution, gradients, and digits near zero."""

from __future__ import annotations

import math

import pytest
import torch

from prism_nemo.algorithms.kl import kl_k1, kl_k2, kl_k3

P = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
Q = torch.tensor([0.4, 0.25, 0.35], dtype=torch.float64)


def test_by_hand() -> None:
    log_p, log_q = torch.tensor([math.log(0.5)], dtype=torch.float64), torch.tensor([math.log(0.25)], dtype=torch.float64)
    assert kl_k1(log_p, log_q).item() == pytest.approx(math.log(2))
    assert kl_k2(log_p, log_q).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_k3(log_p, log_q).item() == pytest.approx(0.5 - 1 + math.log(2))


def test_k1_and_k3_are_unbiased_and_k3_is_never_negative() -> None:
    exact = sum(p * math.log(p / q) for p, q in zip(P.tolist(), Q.tolist(), strict=True))
    assert (P * kl_k1(P.log(), Q.log())).sum().item() == pytest.approx(exact, rel=1e-12)
    assert (P * kl_k3(P.log(), Q.log())).sum().item() == pytest.approx(exact, rel=1e-12)
    assert (kl_k3(P.log(), Q.log()) >= 0).all()
    assert (kl_k1(P.log(), Q.log()) < 0).any()  # so the line above says something


def test_k2_agrees_to_second_order() -> None:
    log_p = P.log()
    for step in (1e-2, 1e-3):
        log_q = (P + step * torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)).log()
        exact = (P * (log_p - log_q)).sum()
        assert abs((P * kl_k2(log_p, log_q)).sum() / exact - 1) < 10 * step


@pytest.mark.parametrize("estimator", [kl_k1, kl_k2, kl_k3])
def test_gradients(estimator) -> None:  # type: ignore[no-untyped-def]
    log_p, log_q = P.log().requires_grad_(), Q.log().requires_grad_()
    assert torch.autograd.gradcheck(estimator, (log_p, log_q))


def test_k3_keeps_its_digits_near_zero_in_float32() -> None:
    difference = 1e-3
    value = kl_k3(torch.zeros(1), torch.tensor([difference])).item()
    assert value == pytest.approx(math.expm1(difference) - difference, rel=1e-3)
    naive = (torch.tensor([difference]).exp() - 1 - difference).item()
    assert abs(naive / (math.expm1(difference) - difference) - 1) > 1e-3


def test_k3_is_bounded_by_the_clamp() -> None:
    zero, far = torch.zeros(2, dtype=torch.float64), torch.tensor([1000.0, -1000.0], dtype=torch.float64)
    assert kl_k3(zero, far, max_log_ratio=20.0).tolist() == pytest.approx([math.exp(20) - 21, math.exp(-20) + 19], rel=1e-12)
    assert kl_k3(zero, far)[0].isinf()
