"""The Bradley-Terry loss, the game's health metrics and the metric sums they are made of."""

from __future__ import annotations

import math

import pytest
import torch

from prism_nemo.algorithms.discriminator_loss import (
    bradley_terry_loss,
    content_probe,
    discriminator_health,
    groups_without_spread,
    histogram_shares,
    score_histogram,
    score_regularization,
)
from prism_nemo.algorithms.metrics import MetricSums, finalize, mean_of, merge, prefixed


def test_bradley_terry_by_hand() -> None:
    teacher, student = torch.tensor([1.0, 0.0, -2.0]).double(), torch.tensor([0.0, 0.0, 1.0]).double()
    expected = -sum(math.log(1 / (1 + math.exp(-margin))) for margin in (1.0, 0.0, -3.0))
    assert bradley_terry_loss(teacher, student, global_pairs=3).item() == pytest.approx(expected / 3, rel=1e-12)
    assert bradley_terry_loss(teacher, student, global_pairs=torch.tensor(12)).item() == pytest.approx(expected / 12, rel=1e-12)


def test_bradley_terry_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 6, generator=generator, dtype=torch.float64).unbind()
    teacher.requires_grad_()
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda t, s: bradley_terry_loss(t, s, global_pairs=7), (teacher, student))
    loss = bradley_terry_loss(teacher, student, global_pairs=7)
    gradients = torch.autograd.grad(loss, (teacher, student))
    wrong = torch.sigmoid(student - teacher).detach() / 7  # the probability given to the wrong side
    torch.testing.assert_close(gradients[0], -wrong)
    torch.testing.assert_close(gradients[1], wrong)


@pytest.mark.parametrize("far", [15.0, 500.0])
def test_far_pairs_keep_their_gradient_and_stay_finite(far: float) -> None:
    """A clamp of scores at 10 would zero the gradient of exactly the pairs that are most wrong."""
    teacher, student = torch.tensor([-far], requires_grad=True), torch.tensor([far], requires_grad=True)
    loss = bradley_terry_loss(teacher, student, global_pairs=1)
    assert loss.item() == pytest.approx(2 * far)
    gradients = torch.autograd.grad(loss, (teacher, student))
    assert [gradient.item() for gradient in gradients] == pytest.approx([-1.0, 1.0])
    assert bradley_terry_loss(-teacher, -student, global_pairs=1).item() == pytest.approx(
        math.log1p(math.exp(-2 * far)), abs=1e-12
    )


def test_a_repeated_teacher_score_gathers_its_gradients() -> None:
    teacher = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    student = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(bradley_terry_loss(teacher.expand(3), student, global_pairs=3), teacher)
    assert gradient.item() == pytest.approx(-torch.sigmoid(student - 0.5).mean().item(), rel=1e-12)


def test_the_loss_does_not_depend_on_micro_batches_or_order() -> None:
    """Dividing by each micro-batch's own count would weigh the pair that is alone three times."""
    generator = torch.Generator().manual_seed(1)
    teacher, student = torch.randn(2, 10, generator=generator, dtype=torch.float64)
    whole = bradley_terry_loss(teacher, student, global_pairs=10)
    for cut in (0, 1, 5):
        parts = [bradley_terry_loss(teacher[part], student[part], global_pairs=10) for part in (slice(cut), slice(cut, None))]
        torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-13, atol=0)
        squares = [score_regularization(teacher[part], global_count=10) for part in (slice(cut), slice(cut, None))]
        torch.testing.assert_close(squares[0] + squares[1], teacher.square().mean(), rtol=1e-13, atol=0)
    torch.testing.assert_close(bradley_terry_loss(teacher.flip(0), student.flip(0), global_pairs=10), whole, rtol=1e-13, atol=0)


def test_without_pairs_the_losses_are_zeros_that_keep_the_graph() -> None:
    scores = torch.ones(2, requires_grad=True)
    loss = bradley_terry_loss(scores[:0], scores[2:], global_pairs=0) + score_regularization(scores[:0], global_count=0)
    assert loss.item() == 0.0
    assert torch.equal(torch.autograd.grad(loss, scores)[0], torch.zeros(2))


def test_bfloat16_scores_are_computed_in_float32() -> None:
    teacher, student = torch.tensor([1.0, 2.0]).bfloat16(), torch.tensor([0.25, 3.0]).bfloat16()
    loss = bradley_terry_loss(teacher, student, global_pairs=2)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((math.log1p(math.exp(-0.75)) + math.log1p(math.exp(1.0))) / 2, rel=1e-6)
    assert score_regularization(teacher, global_count=1).dtype == torch.float32


def test_health_by_hand() -> None:
    teacher = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 5.0])
    student = torch.tensor([0.0, 1.0, 3.0, 0.5, 0.5, 4.0])  # won, tied, lost | lost, lost | won
    metrics = finalize(discriminator_health(teacher, student, kind="perception"))
    assert metrics == pytest.approx(
        {
            "perception/accuracy": 2 / 5,  # the tie is left out
            "perception/ties": 1 / 6,
            "perception/margin": (1 + 0 - 2 - 0.5 - 0.5 + 1) / 6,
            "perception/teacher_score": 8 / 6,
            "perception/student_score": 9 / 6,
        }
    )
    spread = finalize(groups_without_spread(student, torch.tensor([8, 8, 8, -2, -2, 0]), kind="perception"))
    assert spread == {"perception/groups_without_spread": 1 / 2}  # of two groups with more than one student


def test_a_student_that_writes_the_teachers_text_is_no_failure_of_the_discriminator() -> None:
    scores = torch.tensor([0.3, 0.3, 0.7])
    metrics = finalize(discriminator_health(scores, scores + 1e-7, kind="reasoning"))  # rounding is a tie as well
    assert "reasoning/accuracy" not in metrics
    assert metrics["reasoning/ties"] == 1.0


def test_with_nothing_to_measure_metrics_are_absent() -> None:
    nothing, ids = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    health = discriminator_health(nothing, nothing, kind="perception")
    assert finalize(health) == {}
    assert finalize(content_probe(nothing, nothing, kind="perception")) == {}
    full = discriminator_health(torch.ones(1), torch.zeros(1), kind="perception")
    assert health.keys() == full.keys()  # ranks agree on the names
    alone = groups_without_spread(torch.ones(1), torch.zeros(1, dtype=torch.int64), kind="perception")
    assert groups_without_spread(nothing, ids, kind="perception").keys() == alone.keys()
    assert finalize(alone) == {}  # one student alone has nothing to differ from


def test_health_adds_up_over_micro_batches() -> None:
    generator = torch.Generator().manual_seed(2)
    teacher, student = torch.randint(0, 3, (2, 12), generator=generator).float()
    whole = finalize(discriminator_health(teacher, student, kind="x"))
    parts: MetricSums = {}
    for part in (slice(0, 3), slice(3, 9), slice(9, 12)):
        parts = merge(parts, discriminator_health(teacher[part], student[part], kind="x"))
    assert 0 < whole["x/accuracy"] < 1
    assert finalize(parts) == pytest.approx(whole)


def test_content_probe() -> None:
    true, altered = torch.tensor([1.0, 2.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 1.0, -1.0])  # won, tied, lost, won
    metrics = finalize(content_probe(true, altered, kind="perception"))
    assert metrics == pytest.approx({"perception/content_probe": 2.5 / 4, "perception/content_probe_margin": 1 / 4})
    blind = torch.full((10,), 0.7)
    assert finalize(content_probe(blind, blind, kind="reasoning"))["reasoning/content_probe"] == 0.5


def test_score_histogram() -> None:
    scores = torch.tensor([-2.5, -2.0, -0.1, 0.0, 0.9, 1.0, 2.0, 99.0])
    counts = score_histogram(scores, limit=2.0, bins=4)
    assert counts.tolist() == [1, 1, 1, 2, 1, 2]
    halves = score_histogram(scores[:3], limit=2.0, bins=4) + score_histogram(scores[3:], limit=2.0, bins=4)
    assert torch.equal(halves, counts)
    assert score_histogram(scores[:0], limit=2.0, bins=4).tolist() == [0] * 6
    with pytest.raises(ValueError, match="1 of 2 scores"):
        score_histogram(torch.tensor([0.0, math.nan]), limit=1.0, bins=2)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="pairs"):
        bradley_terry_loss(torch.zeros(3), torch.zeros(1), global_pairs=3)  # would broadcast
    with pytest.raises(ValueError, match="pairs"):
        discriminator_health(torch.zeros(3), torch.zeros(2), kind="x")
    with pytest.raises(ValueError, match="pairs"):
        groups_without_spread(torch.zeros(3), torch.zeros(2), kind="x")


def test_metric_sums() -> None:
    first: MetricSums = {"a": (1.0, 2.0), "b": (torch.tensor(3.0), torch.tensor(0.0))}
    second: MetricSums = {"a": mean_of(torch.tensor([True, True, False])), "c": (4, 1)}
    merged = merge(first, second)
    assert finalize(merged) == pytest.approx({"a": 3 / 5, "c": 4.0})  # b has nothing to measure
    assert first["a"] == (1.0, 2.0) and "c" not in first
    assert finalize(prefixed("policy", merged)).keys() == {"policy/a", "policy/c"}


def test_sums_of_many_small_values_keep_their_digits() -> None:
    total, count = mean_of(torch.full((3_000_000,), 0.1))
    assert total.dtype == torch.float64
    assert (total / count).item() == pytest.approx(float(torch.tensor(0.1)), rel=1e-12)


def test_histogram_shares_are_counts_of_bins_and_add_up() -> None:
    scores = torch.tensor([-12.0, -10.0, -0.1, 0.0, 2.4, 2.5, 10.0, float("nan")])
    shares = finalize(histogram_shares(scores, kind="perception", role="student"))
    expected = {"-inf": 1, "-10": 1, "-2.5": 1, "0": 2, "2.5": 1, "10": 1}
    assert len(shares) == 10
    for name, share in shares.items():
        assert share == expected.get(name.removeprefix("perception/histogram/student/"), 0) / 7, name
    assert finalize(histogram_shares(scores[:0], kind="perception", role="student")) == {}
