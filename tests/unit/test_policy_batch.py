"""The policy's batch of rollouts: who gets which advantage and old log-probability, however the rows are cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from helpers.rows import assert_gradients_close, gradients, one_rank
from helpers.tiny import make_prompt, random_tokens, tiny_model
from torch import Tensor

from prism_nemo.config.enums import Aggregation, Precision, RatioKind
from prism_nemo.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, PolicyLossConfig
from prism_nemo.data.records import Record
from prism_nemo.models.policy import OutputDistribution, PolicyModel
from prism_nemo.packing.groups import Group, Segment
from prism_nemo.packing.rows import make_row
from prism_nemo.rollout.base import Rollout
from prism_nemo.rollout.batch import RolloutBatch
from prism_nemo.stages.policy_batch import policy_batch, policy_rows

LENGTHS = ((3, 8, 1), (5,), (9, 2))  # tokens of every rollout, by prompt
PROMPT_OF = [number for number, lengths in enumerate(LENGTHS) for _ in lengths]
NUM_TOKENS, NUM_ROLLOUTS = sum(map(sum, LENGTHS)), len(PROMPT_OF)
ADVANTAGES = torch.tensor([1.5, -2.0, 0.25, 0.0, -0.5, 3.0])
MAX_RESPONSE = 12
BANNED = (7, 90, 127)
BUDGETS = {"one_row": 1000, "cut": 31}  # tokens


def make_batch() -> RolloutBatch:
    prompts = [make_prompt([(4, 4)] if number == 1 else (), seed=number, text_length=6) for number in range(len(LENGTHS))]
    rollouts = []
    for index, (prompt, length) in enumerate(zip(PROMPT_OF, [n for lengths in LENGTHS for n in lengths], strict=True)):
        tokens = random_tokens(length, 30 + index)
        tokens[torch.isin(tokens, torch.tensor(BANNED))] = 1
        rollouts.append(Rollout(prompt, tokens, torch.full((length,), -2.0 - index), "stop", 0))
    records = [Record(str(number), "") for number in range(len(LENGTHS))]
    return RolloutBatch(records, prompts, rollouts, [""] * len(rollouts), [None] * len(rollouts))


@pytest.fixture(scope="module")
def policy() -> PolicyModel:
    config = ModelConfig(path=str(tiny_model().directory), precision=Precision.fp32)
    model = PolicyModel(config, ParallelConfig(), one_rank(), OutputDistribution(0.8, BANNED))
    model.build_optimizer(OptimizerConfig(), 1)
    return model


def run(
    policy: PolicyModel, parameters: PolicyLossConfig, budget: str, old: Sequence[Tensor] | None = None
) -> tuple[float, dict[str, float], dict[str, Tensor]]:
    rollouts = make_batch()
    batch = policy_batch(
        policy_rows(rollouts, max_tokens=BUDGETS[budget], runtime=one_rank()),
        rollouts,
        ADVANTAGES,
        parameters,
        one_rank(),
        max_response_length=MAX_RESPONSE,
        old_log_probs=old,
    )
    policy.prepare_for_training_step()
    loss, metrics = policy.get_loss_and_metrics(batch, forward_only=False)
    policy.finish_training_step()
    return loss, metrics, gradients(policy.module, policy.hf_config)


def by_hand(policy: PolicyModel, parameters: PolicyLossConfig, old: Sequence[Tensor] | None) -> tuple[float, dict[str, Tensor]]:
    """Every rollout alone in its row, and the clipped surrogate written out."""
    batch = make_batch()
    policy.prepare_for_training_step()
    total = torch.zeros(())
    for index, rollout in enumerate(batch.rollouts):
        row = make_row([Group(batch.prompts[rollout.prompt_index], (Segment(rollout.tokens, 0),))])
        log_probs = policy.forward_row(policy.module, row).log_probs
        log_ratio = log_probs - (log_probs.detach() if old is None else old[index])
        if parameters.ratio is RatioKind.sequence:
            log_ratio = log_ratio.mean().expand(len(log_probs))
        ratio, advantage = log_ratio.exp(), ADVANTAGES[index]
        clipped = ratio.clamp(1 - parameters.clip_low, 1 + parameters.clip_high)
        losses = -torch.minimum(ratio * advantage, clipped * advantage)
        total = (
            total
            + {
                Aggregation.token_mean: losses.sum() / NUM_TOKENS,
                Aggregation.sequence_mean: losses.mean() / NUM_ROLLOUTS,
                Aggregation.constant_length: losses.sum() / (NUM_ROLLOUTS * MAX_RESPONSE),
            }[parameters.aggregation]
        )
    total.backward()
    policy.finish_training_step()
    return float(total), gradients(policy.module, policy.hf_config)


def old_log_probs(policy: PolicyModel) -> list[Tensor]:
    """Off by up to 0.8 from the policy's own, by another amount at every token."""
    batch = make_batch()
    rows = [make_row([Group(batch.prompts[r.prompt_index], (Segment(r.tokens, 0),))]) for r in batch.rollouts]
    return [
        found + 0.5 * torch.sin(torch.arange(len(found)) * 1.7 + index) + 0.3 * math.cos(3 * index)
        for index, found in enumerate(policy.get_inference_log_probs(rows))
    ]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("aggregation", list(Aggregation))
@pytest.mark.parametrize(("ratio", "with_old"), [(RatioKind.token, False), (RatioKind.token, True), (RatioKind.sequence, True)])
def test_loss_and_gradient_are_the_formulas(
    policy: PolicyModel, ratio: RatioKind, with_old: bool, aggregation: Aggregation, budget: str
) -> None:
    parameters = PolicyLossConfig(ratio=ratio, aggregation=aggregation, clip_low=0.1, clip_high=0.3)
    old = old_log_probs(policy) if with_old else None
    loss, metrics, found = run(policy, parameters, budget, old)
    expected_loss, expected = by_hand(policy, parameters, old)
    assert abs(expected_loss) > 1e-3
    assert loss == pytest.approx(expected_loss, abs=2e-6)
    assert_gradients_close(found, expected, 2e-5)
    assert (metrics["ratio_is_one"] == 1.0) == (not with_old)
    assert (metrics["clip_fraction_low"] + metrics["clip_fraction_high"] > 0) == with_old


def test_rows_hold_every_rollout_once_with_its_prompt() -> None:
    batch = make_batch()
    for budget, count in (("one_row", 1), ("cut", 3)):
        rows = policy_rows(batch, max_tokens=BUDGETS[budget], runtime=one_rank())
        assert len(rows) == count
        assert sorted(sample for row in rows for sample in row.segment_sample.tolist()) == list(range(NUM_ROLLOUTS))
        for row in rows:
            for segment, sample in enumerate(row.segment_sample.tolist()):
                assert torch.equal(row.label_ids[row.label_segment == segment], batch.rollouts[sample].tokens)
                first = int(row.label_source[row.label_segment == segment][0])
                prompt = batch.prompts[PROMPT_OF[sample]].input_ids
                assert torch.equal(row.input_ids[first + 1 - len(prompt) : first + 1], prompt)


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_mismatch_compares_with_the_samplers_numbers(policy: PolicyModel, budget: str) -> None:
    """Each rollout's own: they differ by whole numbers here, which shows any mix-up."""
    batch = make_batch()
    rows = [make_row([Group(batch.prompts[r.prompt_index], (Segment(r.tokens, 0),))]) for r in batch.rollouts]
    trained = policy.get_inference_log_probs(rows)
    gaps = [
        abs(float(a - b)) for own, r in zip(trained, batch.rollouts, strict=True) for a, b in zip(own, r.log_probs, strict=True)
    ]
    _, metrics, _ = run(policy, PolicyLossConfig(), budget)
    assert metrics["mismatch/abs_log_ratio"] == pytest.approx(math.fsum(gaps) / len(gaps), rel=1e-5)
    assert metrics["entropy"] > 0


def test_the_trainers_distribution_is_the_samplers(policy: PolicyModel) -> None:
    """Temperature and ban: probabilities of all tokens but the banned ones sum to 1."""
    prompt = make_prompt((), seed=0)
    row = make_row([Group(prompt, tuple(Segment(torch.tensor([token]), token) for token in range(128) if token not in BANNED))])
    (log_probs,) = policy.get_inference_log_probs([row])
    assert float(log_probs.exp().sum()) == pytest.approx(1.0, abs=1e-5)
    plain = PolicyModel(ModelConfig(path=str(tiny_model().directory), precision=Precision.fp32), ParallelConfig(), one_rank())
    (whole,) = plain.get_inference_log_probs([row])
    ratio = (log_probs - whole / 0.8).exp()
    torch.testing.assert_close(ratio, ratio[0].expand_as(ratio), rtol=1e-4, atol=0)
    assert float(whole.exp().sum()) < 0.9999


def test_zero_advantages_give_no_gradient(policy: PolicyModel) -> None:
    rollouts = make_batch()
    rows = policy_rows(rollouts, max_tokens=1000, runtime=one_rank())
    advantages = torch.zeros(NUM_ROLLOUTS)
    batch = policy_batch(rows, rollouts, advantages, PolicyLossConfig(), one_rank(), max_response_length=MAX_RESPONSE)
    policy.prepare_for_training_step()
    loss, _ = policy.get_loss_and_metrics(batch, forward_only=False)
    assert loss == 0
    assert all(float(grad.abs().sum()) == 0 for grad in gradients(policy.module, policy.hf_config).values())


def test_a_rank_without_prompts(policy: PolicyModel) -> None:
    empty = replace(make_batch(), records=[], prompts=[], rollouts=[], texts=[], rewards=[])
    rows = policy_rows(empty, max_tokens=1000, runtime=one_rank())
    batch = policy_batch(rows, empty, torch.zeros(0), PolicyLossConfig(), one_rank(), max_response_length=MAX_RESPONSE)
    assert list(batch.rows) == []
    assert policy.get_loss_and_metrics(batch, forward_only=False) == (0.0, {})
