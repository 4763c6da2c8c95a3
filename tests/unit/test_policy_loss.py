"""The policy loss against hand-worked numbers, a float64 reference that loops over tokens, and numerical gradients."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from prism_nemo.algorithms.metrics import MetricSums, finalize, merge
from prism_nemo.algorithms.policy_loss import PolicyLossOutput, policy_loss
from prism_nemo.algorithms.rollout_correction import correction_weights, mismatch_metrics
from prism_nemo.config.enums import Aggregation, KLEstimator, RatioKind
from prism_nemo.config.schema import PolicyLossConfig

GRPO = PolicyLossConfig(clip_low=0.2, clip_high=0.2, dual_clip=3.0)
DAPO = PolicyLossConfig(clip_low=0.2, clip_high=0.28, dual_clip=10.0)
GSPO = PolicyLossConfig(ratio=RatioKind.sequence, clip_low=3e-4, clip_high=4e-4, aggregation=Aggregation.sequence_mean)
WIDE_GSPO = replace(GSPO, clip_low=0.2, clip_high=0.3)
DR_GRPO = PolicyLossConfig(clip_low=0.2, clip_high=0.2, dual_clip=3.0, aggregation=Aggregation.constant_length)
WITH_KL = PolicyLossConfig(kl_coefficient=0.1)
ALL = {"grpo": GRPO, "dapo": DAPO, "gspo": GSPO, "wide_gspo": WIDE_GSPO, "dr_grpo": DR_GRPO, "kl": WITH_KL}
MAX_LENGTH = 9


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_batch(seed: int, *, spread: float = 0.5, lengths: tuple[int, ...] = (3, 1, 5, 2)) -> dict[str, Tensor]:
    """Tokens of all sequences, in order; each sequence carries one advantage. float64."""
    generator = torch.Generator().manual_seed(seed)
    sequence_index = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    old, new, reference = -torch.rand(3, len(sequence_index), generator=generator, dtype=torch.float64)
    per_sequence = torch.randn(len(lengths), generator=generator, dtype=torch.float64)
    return {
        "log_probs": old + spread * (new - old),
        "old_log_probs": old,
        "advantages": per_sequence[sequence_index],
        "sequence_index": sequence_index,
        "reference_log_probs": reference,
    }


def compute(
    batch: dict[str, Tensor], parameters: PolicyLossConfig, *, tokens: float = 11, sequences: float = 4
) -> PolicyLossOutput:
    counts = {"global_tokens": tokens, "global_sequences": sequences, "max_response_length": MAX_LENGTH}
    return policy_loss(**batch, **counts, parameters=parameters)  # type: ignore[arg-type]


def reference_loss(batch: dict[str, Tensor], parameters: PolicyLossConfig) -> float:
    """The formulas of the algorithm, one token at a time, in Python floats. Global counts: 11 tokens, 4 sequences."""
    columns = {name: values.tolist() for name, values in batch.items()}
    per_sequence: dict[int, list[float]] = {}
    for i, sequence in enumerate(columns["sequence_index"]):
        own = [j for j, other in enumerate(columns["sequence_index"]) if other == sequence]
        log_ratios = [columns["log_probs"][j] - columns["old_log_probs"][j] for j in own]
        log_ratio = log_ratios[own.index(i)] if parameters.ratio == RatioKind.token else sum(log_ratios) / len(log_ratios)
        ratio, advantage = math.exp(max(-20.0, min(20.0, log_ratio))), columns["advantages"][i]
        clipped = max(1 - parameters.clip_low, min(1 + parameters.clip_high, ratio))
        loss = max(-advantage * ratio, -advantage * clipped)
        if parameters.dual_clip is not None and advantage < 0:
            loss = min(loss, -advantage * parameters.dual_clip)
        difference = columns["reference_log_probs"][i] - columns["log_probs"][i]
        loss += parameters.kl_coefficient * (math.exp(difference) - difference - 1)
        per_sequence.setdefault(sequence, []).append(loss)
    if parameters.aggregation == Aggregation.sequence_mean:
        return sum(sum(losses) / len(losses) for losses in per_sequence.values()) / 4
    total = sum(sum(losses) for losses in per_sequence.values())
    return total / (11 if parameters.aggregation == Aggregation.token_mean else 4 * MAX_LENGTH)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("seed", range(6))
def test_matches_the_reference(name: str, seed: int) -> None:
    batch = random_batch(seed, spread=4.0)  # ratios from e^-4 to e^4: every clip acts
    assert compute(batch, ALL[name]).loss.item() == pytest.approx(reference_loss(batch, ALL[name]), rel=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_float32_and_bfloat16_inputs(name: str) -> None:
    batch = random_batch(1)
    single = {key: value.float() if value.is_floating_point() else value for key, value in batch.items()}
    loss = compute(single, ALL[name]).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(reference_loss(batch, ALL[name]), rel=1e-5)
    half = {key: value.bfloat16() if value.is_floating_point() else value for key, value in batch.items()}
    exact = {key: value.double() if value.is_floating_point() else value for key, value in half.items()}
    assert compute(half, ALL[name]).loss.dtype == torch.float32
    assert compute(half, ALL[name]).loss.item() == pytest.approx(reference_loss(exact, ALL[name]), rel=1e-5)


def test_clipping_by_hand() -> None:
    """Ratios 1.5, 1.5, 0.5, 0.5, 4 and advantages 2, -2, 2, -2, -1; clip 0.2 / 0.28, dual clip 3."""
    ratios, advantages = tensor(1.5, 1.5, 0.5, 0.5, 4.0), tensor(2, -2, 2, -2, -1)
    log_probs = ratios.log().requires_grad_()
    parameters = PolicyLossConfig(clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    indices = torch.arange(5)
    output = policy_loss(
        log_probs, torch.zeros(5), advantages, indices, global_tokens=1, global_sequences=5, parameters=parameters
    )
    # -min(3, 2.56), -min(-3, -2.56), -min(1, 1.6), -min(-1, -1.6), and min(4, 3)
    assert output.loss.item() == pytest.approx(-2.56 + 3.0 - 1.0 + 1.6 + 3.0, rel=1e-12)
    (gradient,) = torch.autograd.grad(output.loss, log_probs)
    # d(-r A)/dlogp = -r A where no clip acts, else 0
    assert gradient.tolist() == pytest.approx([0.0, 3.0, -1.0, 0.0, 0.0], abs=1e-12)
    metrics = finalize(output.metrics)
    assert metrics["clip_fraction_high"] == pytest.approx(1 / 5)
    assert metrics["clip_fraction_low"] == pytest.approx(1 / 5)
    assert metrics["clip_fraction_dual"] == pytest.approx(1 / 5)
    assert metrics["ratio"] == pytest.approx(8 / 5)
    assert metrics["ratio_is_one"] == 0.0


def test_aggregations_by_hand() -> None:
    """At ratio 1 a token's loss is -A: sequences of 1 and 3 tokens with advantages -2 and -6."""
    log_probs, index = tensor(-1, -1, -1, -1), torch.tensor([0, 1, 1, 1])
    advantages = tensor(-2, -6, -6, -6)
    expected = {Aggregation.token_mean: 20 / 8, Aggregation.sequence_mean: 8 / 5, Aggregation.constant_length: 20 / (5 * 10)}
    for aggregation, value in expected.items():
        output = policy_loss(
            log_probs, log_probs, advantages, index,
            global_tokens=8, global_sequences=5, parameters=PolicyLossConfig(aggregation=aggregation), max_response_length=10,
        )  # fmt: skip
        assert output.loss.item() == pytest.approx(value, rel=1e-14)


def test_on_policy_the_gradient_is_reinforce_and_the_metrics_say_that_no_clip_can_act() -> None:
    batch = random_batch(2)
    batch["log_probs"] = batch["old_log_probs"].clone().requires_grad_()
    output = compute(batch, GRPO)
    (gradient,) = torch.autograd.grad(output.loss, batch["log_probs"])
    torch.testing.assert_close(gradient, -batch["advantages"] / 11, rtol=1e-14, atol=0)
    metrics = finalize(output.metrics)
    assert metrics["ratio_is_one"] == metrics["ratio"] == 1.0
    assert (
        metrics["approx_kl"]
        == metrics["clip_fraction_low"]
        == metrics["clip_fraction_high"]
        == metrics["clip_fraction_dual"]
        == 0.0
    )


def test_the_detached_own_log_probs_serve_as_old_ones() -> None:
    batch = random_batch(2)
    batch["log_probs"].requires_grad_()
    plain = compute(batch | {"old_log_probs": batch["log_probs"].detach().clone()}, GRPO)
    shared = compute(batch | {"old_log_probs": batch["log_probs"]}, GRPO)  # no gradient may flow through the old ones
    gradients = [torch.autograd.grad(output.loss, batch["log_probs"])[0] for output in (plain, shared)]
    assert torch.equal(*gradients)
    assert gradients[0].abs().min() > 0


def test_the_sequence_ratio_by_hand() -> None:
    """GSPO: dlogp 0.1 and 0.3 make s = exp(0.2); each token of the sequence gets half of ds = s."""
    log_probs = tensor(0.1, 0.3, -0.5).requires_grad_()
    index = torch.tensor([5, 5, 2])
    advantages = tensor(1, 1, 2)
    parameters = replace(GSPO, clip_low=1.0, clip_high=1.0)
    output = policy_loss(
        log_probs, tensor(0, 0, 0), advantages, index, global_tokens=3, global_sequences=2, parameters=parameters
    )
    first, second = math.exp(0.2), math.exp(-0.5)
    assert output.loss.item() == pytest.approx(-(first + 2 * second) / 2, rel=1e-14)
    (gradient,) = torch.autograd.grad(output.loss, log_probs)
    assert gradient.tolist() == pytest.approx([-first / 4, -first / 4, -second], rel=1e-14)
    assert finalize(output.metrics)["ratio"] == pytest.approx((2 * first + second) / 3, rel=1e-14)


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_the_sequence_ratio_has_the_gradient_of_gspos_token_form(aggregation: Aggregation) -> None:
    batch = random_batch(12, spread=2.0)
    parameters = replace(WIDE_GSPO, aggregation=aggregation)
    log_probs = batch["log_probs"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(compute(batch | {"log_probs": log_probs}, parameters).loss, log_probs)
    lengths = torch.bincount(batch["sequence_index"]).double()
    sums = torch.zeros(4, dtype=torch.float64).index_add(0, batch["sequence_index"], batch["log_probs"] - batch["old_log_probs"])
    ratio = (sums / lengths).exp()[batch["sequence_index"]] * (log_probs - log_probs.detach()).exp()
    surrogate = torch.minimum(ratio * batch["advantages"], ratio.clamp(0.8, 1.3) * batch["advantages"])
    weight = {
        Aggregation.token_mean: torch.full_like(surrogate, 1 / 11),
        Aggregation.sequence_mean: 1 / (4 * lengths)[batch["sequence_index"]],
        Aggregation.constant_length: torch.full_like(surrogate, 1 / (4 * MAX_LENGTH)),
    }[aggregation]
    (expected,) = torch.autograd.grad(-(surrogate * weight).sum(), log_probs)
    assert 0 < (expected == 0).sum() < 11  # some sequences are clipped, some are not
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("spread", [0.0, 0.3, 4.0])
def test_gradients_are_those_of_the_loss(name: str, spread: float) -> None:
    batch = random_batch(11, spread=spread)

    def loss(log_probs: Tensor) -> Tensor:
        return compute(batch | {"log_probs": log_probs}, ALL[name]).loss

    assert torch.autograd.gradcheck(loss, batch["log_probs"].clone().requires_grad_(), eps=1e-6, atol=1e-8, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_micro_batches_add_up(name: str) -> None:
    batch = random_batch(5, spread=3.0)
    log_probs = batch["log_probs"].clone().requires_grad_()
    whole = compute(batch | {"log_probs": log_probs}, ALL[name])
    (gradient,) = torch.autograd.grad(whole.loss, log_probs)
    for cuts in ([0, 1, 2, 3, 4], [0, 3, 4], [0, 0, 2, 4]):  # the last begins with an empty micro-batch
        losses, metrics = [], MetricSums()
        for first, last in pairwise(cuts):
            mine = (batch["sequence_index"] >= first) & (batch["sequence_index"] < last)
            part = {key: value[mine] for key, value in (batch | {"log_probs": log_probs}).items()}
            output = compute(part, ALL[name])
            losses.append(output.loss)
            metrics = merge(metrics, output.metrics)
        total = torch.stack(losses).sum()
        torch.testing.assert_close(total, whole.loss, rtol=1e-13, atol=1e-15)
        torch.testing.assert_close(torch.autograd.grad(total, log_probs)[0], gradient, rtol=1e-13, atol=1e-15)
        assert finalize(metrics) == pytest.approx(finalize(whole.metrics), rel=1e-12)


@pytest.mark.parametrize("name", ALL)
def test_order_and_sequence_numbers_do_not_matter(name: str) -> None:
    batch = random_batch(6, spread=3.0)
    shuffle = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    shuffled = {key: value[shuffle] for key, value in batch.items()}
    shuffled["sequence_index"] = 1000 - 7 * shuffled["sequence_index"]
    assert compute(shuffled, ALL[name]).loss.item() == pytest.approx(compute(batch, ALL[name]).loss.item(), rel=1e-13)


@pytest.mark.parametrize("name", ALL)
def test_an_empty_micro_batch_is_a_zero_that_keeps_the_graph(name: str) -> None:
    weight = torch.ones(3, requires_grad=True)
    nothing, index = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    output = policy_loss(
        weight[:0], nothing, nothing, index, global_tokens=0, global_sequences=0, parameters=ALL[name],
        max_response_length=MAX_LENGTH, reference_log_probs=nothing,
    )  # fmt: skip
    assert output.loss.item() == 0.0
    (gradient,) = torch.autograd.grad(output.loss, weight)
    assert torch.equal(gradient, torch.zeros(3))
    assert output.metrics.keys() == compute(random_batch(0), ALL[name]).metrics.keys()  # ranks agree on the names
    assert finalize(output.metrics) == {}


def test_extreme_ratios_stay_finite() -> None:
    log_probs = torch.tensor([500.0, -500.0, 500.0, -500.0], requires_grad=True)
    output = policy_loss(
        log_probs, torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, -1.0]), torch.arange(4), global_tokens=4, global_sequences=4,
        parameters=PolicyLossConfig(kl_coefficient=1e-3), reference_log_probs=torch.zeros(4),
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(output.loss, log_probs)
    assert output.loss.isfinite() and gradient.isfinite().all()
    assert all(math.isfinite(value) for value in finalize(output.metrics).values())
    # -1.2, -e^-20, e^20, 0.8 and twice k3(-20) and k3(20), over 4
    kl = 2 * (math.exp(-20) + 19) + 2 * (math.exp(20) - 21)
    assert output.loss.item() == pytest.approx((-1.2 - math.exp(-20) + math.exp(20) + 0.8 + 1e-3 * kl) / 4, rel=1e-6)


def test_a_token_without_advantage_has_no_gradient() -> None:
    batch = random_batch(3, spread=3.0)
    log_probs = batch["log_probs"].clone().requires_grad_()
    output = compute(batch | {"log_probs": log_probs, "advantages": torch.zeros(11)}, GRPO)
    assert torch.equal(torch.autograd.grad(output.loss, log_probs)[0], torch.zeros(11, dtype=torch.float64))


def test_the_reference_kl() -> None:
    batch = random_batch(8)
    difference = batch["reference_log_probs"] - batch["log_probs"]
    mean = (difference.exp() - difference - 1).mean().item()
    assert finalize(compute(batch, GRPO).metrics)["reference_kl"] == pytest.approx(mean, rel=1e-12)
    without = compute(batch, GRPO).loss.item()
    assert compute(batch, replace(GRPO, kl_coefficient=0.5)).loss.item() == pytest.approx(without + 0.5 * mean, rel=1e-12)
    del batch["reference_log_probs"]
    assert compute(batch, GRPO).loss.item() == without
    assert "reference_kl" not in compute(batch, GRPO).metrics
    with pytest.raises(ValueError, match="reference_log_probs"):
        compute(batch, WITH_KL)


def test_the_estimator_of_the_reference_kl() -> None:
    """k2's gradient is the log-ratio itself, on every token."""
    batch = random_batch(8)
    log_probs = batch["log_probs"].clone().requires_grad_()
    plain = batch | {"log_probs": log_probs}
    difference = batch["log_probs"] - batch["reference_log_probs"]
    parameters = replace(GRPO, kl_coefficient=0.5, kl_estimator=KLEstimator.k2)
    output = compute(plain, parameters)
    assert finalize(output.metrics)["reference_kl"] == pytest.approx(difference.square().mean().item() / 2, rel=1e-12)
    (with_kl,) = torch.autograd.grad(output.loss, log_probs)
    (without,) = torch.autograd.grad(compute(plain, GRPO).loss, log_probs)
    torch.testing.assert_close(with_kl - without, 0.5 * difference / 11, rtol=1e-9, atol=1e-15)


def test_the_old_to_new_kl() -> None:
    batch = random_batch(8)
    log_ratio = batch["log_probs"] - batch["old_log_probs"]
    expected = (log_ratio.exp() - 1 - log_ratio).mean().item()
    assert finalize(compute(batch, GSPO).metrics)["approx_kl"] == pytest.approx(expected, rel=1e-10)


def test_misuse_is_an_error() -> None:
    batch = random_batch(0)
    with pytest.raises(ValueError, match=r"\[N\]"):
        compute(batch | {"advantages": batch["advantages"][:3]}, GRPO)
    with pytest.raises(ValueError, match="max_response_length"):
        policy_loss(**batch, global_tokens=11, global_sequences=4, parameters=DR_GRPO)


def test_correction_weights_by_hand() -> None:
    trainer, sampler = tensor(math.log(3.0), math.log(0.5), 0.0, math.log(1.5)), tensor(0, 0, 0, 0)
    index = torch.tensor([4, 4, 9, 4])
    arguments = {"truncation": 2.0, "max_log_ratio": 20.0}
    tokens = correction_weights(trainer.requires_grad_(), sampler, index, per_sequence=False, **arguments)
    assert tokens.tolist() == pytest.approx([2.0, 0.5, 1.0, 1.5])
    assert not tokens.requires_grad
    sequences = correction_weights(trainer, sampler, index, per_sequence=True, **arguments)  # 3 * 0.5 * 1.5 = 2.25
    assert sequences.tolist() == pytest.approx([2.0, 2.0, 1.0, 2.0])
    inverse = correction_weights(sampler, trainer, index, per_sequence=True, **arguments)
    assert inverse.tolist() == pytest.approx([1 / 2.25, 1 / 2.25, 1.0, 1 / 2.25])
    assert correction_weights(
        tensor(900.0), tensor(0), index[:1], per_sequence=False, truncation=math.inf, max_log_ratio=20.0
    ).item() == (pytest.approx(math.exp(20)))


def test_correction_weights_scale_the_surrogate_and_not_the_kl() -> None:
    batch = random_batch(4)
    weights = torch.linspace(0.1, 2.0, 11, dtype=torch.float64)
    log_probs = batch["log_probs"].clone().requires_grad_()
    plain = batch | {"log_probs": log_probs}
    weighted = policy_loss(
        **plain, global_tokens=11, global_sequences=4, parameters=WITH_KL, correction_weights=weights
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(weighted.loss, log_probs)
    (surrogate,) = torch.autograd.grad(compute(plain, replace(WITH_KL, kl_coefficient=0.0)).loss, log_probs)
    (both,) = torch.autograd.grad(compute(plain, WITH_KL).loss, log_probs)
    torch.testing.assert_close(gradient, weights * surrogate + (both - surrogate), rtol=1e-12, atol=1e-15)


def test_importance_weights_make_the_samplers_mean_the_trainers() -> None:
    """Under the sampler, E[w f] = E_trainer[f]: exactly, over a vocabulary of 3."""
    sampler, trainer, value = tensor(0.5, 0.3, 0.2), tensor(0.4, 0.35, 0.25), tensor(1, -2, 5)
    weights = correction_weights(
        trainer.log(), sampler.log(), torch.arange(3), per_sequence=False, truncation=2.0, max_log_ratio=20.0
    )
    assert (sampler * weights * value).sum().item() == pytest.approx((trainer * value).sum().item(), rel=1e-14)


def test_mismatch_metrics_by_hand() -> None:
    trainer, sampler = tensor(-1.0, -2.0, -3.0, -4.0), tensor(-1.0, -1.95, -3.2, -5.0)  # dlogp 0, -0.05, 0.2, 1
    metrics = finalize(mismatch_metrics(trainer, sampler, thresholds=[0.1, 0.5]))
    assert metrics["abs_log_ratio"] == pytest.approx(1.25 / 4)
    assert metrics["kl_k1"] == pytest.approx(-1.15 / 4)
    k3 = sum(math.exp(d) - 1 - d for d in (0.0, -0.05, 0.2, 1.0)) / 4
    assert metrics["kl_k3"] == pytest.approx(k3, rel=1e-10)
    assert metrics["share_above_0.1"] == 0.5
    assert metrics["share_above_0.5"] == 0.25
    assert finalize(mismatch_metrics(tensor(), tensor(), thresholds=[0.1])) == {}
