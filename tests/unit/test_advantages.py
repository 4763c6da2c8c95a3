"""Advantages against hand-worked numbers and an independent float64 reference that loops over groups."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from prism_nemo.algorithms.advantages import group_normalize, grpo_advantages, mixed_advantages, prism_advantages
from prism_nemo.config.enums import AlignReward


def reference_normalize(scores: list[float], ids: list[int], eps: float = 1e-6) -> list[float]:
    out = []
    for score, group in zip(scores, ids, strict=True):
        members = [other for other, other_group in zip(scores, ids, strict=True) if other_group == group]
        mean, std = (0.0, 1.0) if len(members) == 1 else (statistics.fmean(members), statistics.stdev(members))
        out.append((score - mean) / (std + eps))
    return out


def reference_prism(perception: list[float], reasoning: list[float], valid: list[bool], ids: list[int]) -> list[float]:
    def fill(scores: list[float]) -> list[float]:
        filled = []
        for index, group in enumerate(ids):
            good = [scores[other] for other in range(len(ids)) if ids[other] == group and valid[other]]
            filled.append(scores[index] if valid[index] else (min(good) if good else 0.0) - 1.0)
        return filled

    normalized = zip(reference_normalize(fill(perception), ids), reference_normalize(fill(reasoning), ids), valid, strict=True)
    return [0.5 * p + 0.5 * r - (0.0 if ok else 1.5) for p, r, ok in normalized]


def random_problem(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch = int(torch.randint(1, 40, (), generator=generator))
    labels = torch.tensor([-7, 3, 10**12, 0, 5])  # neither contiguous nor sorted
    ids = labels[torch.randint(0, len(labels), (batch,), generator=generator)]
    perception, reasoning = 3 * torch.randn(2, batch, generator=generator)
    valid = torch.rand(batch, generator=generator) < 0.7
    return perception, reasoning, valid, ids


def test_group_normalize_by_hand() -> None:
    # Group 7: 1, 2, 3 has mean 2 and unbiased std 1. Group -1: 0, 4 has mean 2 and std sqrt(8).
    scores = torch.tensor([1.0, 0.0, 2.0, 4.0, 3.0])
    ids = torch.tensor([7, -1, 7, -1, 7])
    expected = [-1.0, -2 / math.sqrt(8), 0.0, 2 / math.sqrt(8), 1.0]
    assert group_normalize(scores, ids).tolist() == pytest.approx(expected, abs=2e-6)


def test_eps_is_added_to_the_standard_deviation() -> None:
    scores = torch.tensor([0.0, 2.0], dtype=torch.float64)
    result = group_normalize(scores, torch.tensor([0, 0]), eps=0.5)
    assert result.tolist() == pytest.approx([-1 / (math.sqrt(2) + 0.5), 1 / (math.sqrt(2) + 0.5)], rel=1e-14)


def test_a_group_of_one_has_mean_0_and_std_1() -> None:
    scores, ids = torch.tensor([3.0], dtype=torch.float64), torch.tensor([4])
    assert group_normalize(scores, ids).item() == pytest.approx(3 / (1 + 1e-6), rel=1e-14)
    assert grpo_advantages(scores, ids, normalize_std=False).item() == 3.0


@pytest.mark.parametrize("value", [0.1, -1e4, 16777216.0])
def test_a_group_without_spread_gives_exact_zeros(value: float) -> None:
    for size in (2, 3, 7):  # the mean of three times 0.1 is not 0.1
        scores, ids = torch.full((size,), value, dtype=torch.float64), torch.zeros(size, dtype=torch.int64)
        for precise in (scores, scores.float()):
            assert torch.equal(group_normalize(precise, ids), torch.zeros_like(precise))
            assert torch.equal(grpo_advantages(precise, ids, normalize_std=False), torch.zeros_like(precise))


def test_a_large_mean_keeps_its_digits() -> None:
    small = torch.tensor([0.0, 1.0, 2.0, 5.0])
    ids = torch.zeros(4, dtype=torch.int64)
    assert torch.equal(group_normalize(small + 8388608.0, ids), group_normalize(small, ids))


@pytest.mark.parametrize("seed", range(20))
def test_group_normalize_and_grpo_match_the_reference(seed: int) -> None:
    scores, _, _, ids = random_problem(seed)
    expected = reference_normalize(scores.double().tolist(), ids.tolist())
    assert group_normalize(scores, ids).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert group_normalize(scores.double(), ids).tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
    assert torch.equal(grpo_advantages(scores, ids), group_normalize(scores, ids))


@pytest.mark.parametrize("seed", range(20))
def test_prism_advantages_match_the_reference(seed: int) -> None:
    perception, reasoning, valid, ids = random_problem(seed)
    unscored = torch.where(valid, perception, torch.nan), torch.where(valid, reasoning, torch.inf)
    expected = reference_prism(perception.double().tolist(), reasoning.double().tolist(), valid.tolist(), ids.tolist())
    assert prism_advantages(*unscored, valid, ids).tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    shift = 1e6  # float64 scores keep their digits
    precise = prism_advantages(unscored[0].double() + shift, unscored[1].double(), valid, ids)
    shifted = reference_prism((perception.double() + shift).tolist(), reasoning.double().tolist(), valid.tolist(), ids.tolist())
    assert precise.dtype == torch.float64
    assert precise.tolist() == pytest.approx(shifted, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_order_and_labels_do_not_matter(seed: int) -> None:
    perception, reasoning, valid, ids = random_problem(seed)
    shuffle = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed + 100))
    plain = prism_advantages(perception, reasoning, valid, ids)
    shuffled = prism_advantages(perception[shuffle], reasoning[shuffle], valid[shuffle], -ids[shuffle] + 1)
    torch.testing.assert_close(shuffled, plain[shuffle], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(group_normalize(perception[shuffle], ids[shuffle]), group_normalize(perception, ids)[shuffle])


def test_prism_by_hand() -> None:
    # Perception 2, 4 and an invalid third: min(2, 4) - 1 = 1, so 2, 4, 1: mean 7/3, deviations -1/3, 5/3, -4/3, variance 7/3.
    # Reasoning 0, 0 and -1: deviations 1/3, 1/3, -2/3, variance 1/3.
    advantages = prism_advantages(
        torch.tensor([2.0, 4.0, math.nan]),
        torch.tensor([0.0, 0.0, math.nan]),
        torch.tensor([True, True, False]),
        torch.tensor([9, 9, 9]),
    )
    p, r = math.sqrt(7 / 3), math.sqrt(1 / 3)
    expected = [0.5 * (-1 / 3 / p + 1 / 3 / r), 0.5 * (5 / 3 / p + 1 / 3 / r), 0.5 * (-4 / 3 / p - 2 / 3 / r) - 1.5]
    assert advantages.tolist() == pytest.approx(expected, abs=3e-6)


def test_without_a_valid_rollout_all_score_minus_one() -> None:
    nothing = torch.full((4,), math.nan)
    advantages = prism_advantages(nothing, nothing, torch.zeros(4, dtype=torch.bool), torch.tensor([0, 0, 0, 1]))
    # The group of three has no spread; the group of one has mean 0 and std 1, so GN(-1) = -1 for both segments.
    assert advantages.tolist() == pytest.approx([-1.5, -1.5, -1.5, -2.5], abs=2e-6)


def test_weights_and_penalty() -> None:
    perception, reasoning = torch.tensor([0.0, 2.0, -9.0]), torch.tensor([3.0, 1.0, -9.0])
    valid, ids = torch.tensor([1, 1, 0]), torch.tensor([0, 0, 1])
    advantages = prism_advantages(
        perception, reasoning, valid, ids, perception_weight=2.0, reasoning_weight=0.0, format_penalty=0.25
    )
    assert advantages.tolist() == pytest.approx([-math.sqrt(2), math.sqrt(2), -2.25], abs=1e-5)


def test_dr_grpo_only_centers() -> None:
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.5, 0.0])
    ids = torch.tensor([2, 2, 2, 2, 0, 0])
    assert grpo_advantages(rewards, ids, normalize_std=False).tolist() == [0.5, -0.5, -0.5, 0.5, 0.25, -0.25]


def test_dtypes() -> None:
    ids = torch.tensor([1, 1, 1], dtype=torch.int32)
    for scores in (torch.tensor([0, 1, 1]), torch.tensor([False, True, True]), torch.tensor([0.0, 1.0, 1.0]).bfloat16()):
        result = group_normalize(scores, ids)
        assert result.dtype == torch.float32
        assert result.tolist() == pytest.approx([-2 / math.sqrt(3), 1 / math.sqrt(3), 1 / math.sqrt(3)], abs=3e-6)
    assert grpo_advantages(torch.tensor([True, False]), ids[:2], normalize_std=False).tolist() == [0.5, -0.5]
    assert group_normalize(torch.zeros(3, dtype=torch.float64), ids).dtype == torch.float64
    assert prism_advantages(torch.zeros(3), torch.zeros(3), torch.ones(3, dtype=torch.bool), ids).dtype == torch.float32


def test_an_empty_batch_is_no_error() -> None:
    nothing, ids = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert prism_advantages(nothing, nothing, nothing.bool(), ids).shape == (0,)
    assert grpo_advantages(nothing, ids).shape == (0,)


def test_advantages_carry_no_gradient() -> None:
    scores = torch.randn(4, requires_grad=True)
    ids, valid = torch.tensor([0, 0, 1, 1]), torch.tensor([True, True, True, False])
    assert not prism_advantages(scores, scores, valid, ids).requires_grad
    assert not grpo_advantages(scores, ids, normalize_std=False).requires_grad


def test_non_finite_scores_are_an_error_that_counts_them() -> None:
    ids = torch.zeros(4, dtype=torch.int64)
    bad = torch.tensor([1.0, math.nan, math.inf, -math.inf])
    with pytest.raises(ValueError, match=r"3 of 4 scores are NaN or infinite"):
        group_normalize(bad, ids)
    with pytest.raises(ValueError, match=r"3 of 4 rewards"):
        grpo_advantages(bad, ids, normalize_std=False)
    valid = torch.tensor([True, True, True, False])  # the last is never read
    with pytest.raises(ValueError, match=r"2 of 4 reasoning scores of valid rollouts"):
        prism_advantages(torch.zeros(4), bad, valid, ids)
    with pytest.raises(ValueError, match=r"2 of 4 perception scores of valid rollouts"):
        prism_advantages(bad, torch.zeros(4), valid, ids)


def test_inputs_are_left_as_they_were() -> None:
    perception, reasoning, valid, ids = random_problem(3)
    before = [tensor.clone() for tensor in (perception, reasoning, valid, ids)]
    prism_advantages(perception, reasoning, valid, ids)
    assert all(torch.equal(old, new) for old, new in zip(before, (perception, reasoning, valid, ids), strict=True))


def test_shapes_and_types_are_checked() -> None:
    scores, ids = torch.zeros(3), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"\[3\] and \[2\]"):
        group_normalize(scores, ids[:2])
    with pytest.raises(ValueError, match=r"\[1, 3\]"):
        grpo_advantages(scores[None], ids[None])
    with pytest.raises(ValueError, match="reasoning has shape"):
        prism_advantages(scores, scores[:1], scores.bool(), ids)
    with pytest.raises(ValueError, match="valid has shape"):
        prism_advantages(scores, scores, scores[:1].bool(), ids)
    with pytest.raises(TypeError, match=r"float32"):
        group_normalize(scores, scores)
    with pytest.raises(TypeError, match="valid must be bool"):
        prism_advantages(scores, scores, scores, ids)


def test_a_hundred_thousand_groups_at_once() -> None:
    scores = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    ids = torch.arange(200_000) % 100_000
    pair = scores.view(2, -1).double()
    expected = (pair - pair.mean(0)) / (pair.std(0) + 1e-6)
    torch.testing.assert_close(group_normalize(scores, ids), expected.flatten().float(), rtol=1e-5, atol=1e-6)


# Alignment with verified answers. Group 0: right, wrong, invalid; group 1: right, wrong.
ALIGNMENT = torch.tensor([0.6, -0.2, -1.0, 0.5, -0.5], dtype=torch.float64)
MIXED = {
    "valid": torch.tensor([True, True, False, True, True]),
    "correct": torch.tensor([True, False, False, True, False]),
    "rewards": torch.tensor([1.0, 0.2, 0.0, 1.0, 0.2], dtype=torch.float64),
    "group_ids": torch.tensor([0, 0, 0, 1, 1]),
}


def verified_by_hand() -> list[float]:
    """GN of the rewards: (1, .2, 0) have mean .4 and variance (.36 + .04 + .16) / 2; (1, .2) mean .6 and variance .32."""
    first, second = math.sqrt(0.28) + 1e-6, math.sqrt(0.32) + 1e-6
    return [0.6 / first, -0.2 / first, -0.4 / first, 0.4 / second, -0.4 / second]


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        # weight 0.5: half the alignment where right; -0.7 where wrong; -1.5 where invalid
        (AlignReward.gated, [0.3, -0.7, -1.5, 0.25, -0.7]),
        (AlignReward.verified_plus_gated, [a + b for a, b in zip(verified_by_hand(), [0.3, 0, 0, 0.25, 0], strict=True)]),
        (AlignReward.verified_plus_signed, [a + b for a, b in zip(verified_by_hand(), [0.3, 0.1, 0, 0.25, 0.25], strict=True)]),
    ],
)
def test_alignment_with_verified_answers(reward: AlignReward, expected: list[float]) -> None:
    found = mixed_advantages(ALIGNMENT, **MIXED, reward=reward, alignment_weight=0.5, wrong_penalty=0.7, format_penalty=1.5)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = {name: tensor[order] for name, tensor in MIXED.items()}
    again = mixed_advantages(
        ALIGNMENT[order], **shuffled, reward=reward, alignment_weight=0.5, wrong_penalty=0.7, format_penalty=1.5
    )
    torch.testing.assert_close(again, found[order], rtol=0, atol=0)


def test_what_is_not_valid_is_not_right() -> None:
    claimed = {**MIXED, "correct": torch.ones(5, dtype=torch.bool)}
    gated = mixed_advantages(ALIGNMENT, **claimed, reward=AlignReward.gated, format_penalty=1.5)
    assert gated[2] == -1.5


def test_mixing_refuses_what_it_cannot_mix() -> None:
    with pytest.raises(ValueError, match="mixes nothing"):
        mixed_advantages(ALIGNMENT, **MIXED, reward=AlignReward.discriminator)
    with pytest.raises(ValueError, match="one length"):
        mixed_advantages(ALIGNMENT[:4], **MIXED, reward=AlignReward.gated)
