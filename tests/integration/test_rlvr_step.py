"""One RLVR step on the tiny digits task, against the step written out: mini-batches, reference, dynamic sampling, grading."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rows import gradients
from helpers.stages import run_stage, tiny_task, trainer_of, written
from torch import Tensor

from prism_nemo.algorithms.advantages import grpo_advantages
from prism_nemo.errors import ConfigError, DataError
from prism_nemo.packing.groups import Group, Segment
from prism_nemo.packing.rows import make_row
from prism_nemo.rewards.grader import Grader
from prism_nemo.rewards.registry import Reward
from prism_nemo.rollout.batch import RolloutBatch
from prism_nemo.rollout.groups import GroupSampler, NoSignalError
from prism_nemo.rollout.megatron import MegatronEngine

DAPO = ("algorithm=dapo", "algorithm.overlong_buffer_length=16", "optimizer.lr_warmup_iters=0")


def sampled(trainer: Any) -> tuple[RolloutBatch, Tensor]:
    trainer.policy.prepare_for_training()
    rollouts = trainer.groups.sample(trainer.draw, step=0).rollouts
    return rollouts, grpo_advantages(trainer.scores(rollouts), rollouts.group_ids)


def alone(policy: Any, rollouts: RolloutBatch, index: int) -> Tensor:
    """Log-probabilities of one rollout, alone in its row, with gradient."""
    rollout = rollouts.rollouts[index]
    row = make_row([Group(rollouts.prompts[rollout.prompt_index], (Segment(rollout.tokens, 0),))])
    found: Tensor = policy.forward_row(policy.module, row).log_probs
    return found


def weights(policy: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in policy.module.named_parameters()}


def test_mini_batches_are_steps_against_the_policy_that_sampled(tmp_path: Path) -> None:
    """Two mini-batches with a divergence from the start, against single rollouts and the formulas, through Adam."""
    overrides = ("algorithm.num_mini_batches=2", "algorithm.policy_loss.kl_coefficient=0.1", "optimizer.lr=3e-3")
    with trainer_of("rlvr", tmp_path / "ours", *overrides) as trainer:
        rollouts, advantages = sampled(trainer)
        assert float(advantages.abs().max()) > 0
        before = weights(trainer.policy)
        update = trainer.policy_update.run(0, rollouts, advantages, range(4))
        ours = weights(trainer.policy)
    assert update.applied
    assert update.metrics["reference_kl"] > 0  # of the second mini-batch; of the first it is 0
    assert 0 < update.metrics["ratio_is_one"] < 1

    with trainer_of("rlvr", tmp_path / "plain", *overrides) as trainer:
        policy = trainer.policy
        policy.prepare_for_training()
        with torch.no_grad():
            old = [alone(policy, rollouts, index) for index in range(len(rollouts.texts))]
        for prompts in ((0, 1), (2, 3)):
            members = [index for index, rollout in enumerate(rollouts.rollouts) if rollout.prompt_index in prompts]
            tokens = sum(int(rollouts.lengths[index]) for index in members)
            policy.prepare_for_training_step()
            total = torch.zeros(())
            for index in members:
                log_probs, advantage = alone(policy, rollouts, index), float(advantages[index])
                ratio = (log_probs - old[index]).exp()
                surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
                if advantage < 0:
                    surrogate = surrogate.clamp(min=3.0 * advantage)
                away = old[index] - log_probs
                total = total + ((0.1 * (away.exp() - 1 - away)) - surrogate).sum() / tokens
            total.backward()
            policy.finish_training_step()
            assert all(grad.isfinite().all() for grad in gradients(policy.module, policy.hf_config).values())
            policy.optimizer_step(0)
        plain = weights(policy)
    moved = {name: float((ours[name] - before[name]).norm()) for name in before}
    apart = {name: float((ours[name] - plain[name]).norm()) / max(moved[name], 1e-6) for name in before}
    assert max(moved.values()) > 1e-2
    # Adam's first steps divide a gradient by its own size, so entries whose gradient is rounding move by rounding's sign.
    assert {name: error for name, error in apart.items() if error > 2e-2} == {}
    assert sum(apart.values()) / len(apart) < 2e-3


def test_a_mini_batch_holds_the_same_prompts_whoever_holds_them(tmp_path: Path) -> None:
    """Of a batch of four whose second record is unusable: the two ranks' parts are those of one rank."""
    with trainer_of("rlvr", tmp_path, "algorithm.num_mini_batches=2") as trainer:
        rollouts, advantages = sampled(trainer)

        def ids(prompts: list[int], positions: list[int], number: int) -> list[str]:
            held = torch.isin(rollouts.group_ids, torch.tensor(prompts))
            batch, values = trainer.policy_update.part(number, rollouts.select(prompts), advantages[held], positions)
            assert len(values) == len(batch.texts)
            return [record.id for record in batch.records]

        names = [record.id for record in rollouts.records]
        assert [ids([0, 2, 3], [0, 2, 3], number) for number in (0, 1)] == [[names[0]], [names[2], names[3]]]
        assert [ids([0, 2], [0, 2], number) for number in (0, 1)] == [[names[0]], [names[2]]]  # the first of two ranks
        assert [ids([3], [3], number) for number in (0, 1)] == [[], [names[3]]]  # the second


def test_a_reference_that_is_not_there_is_found_before_anything_is_built(tmp_path: Path) -> None:
    overrides = ("algorithm.policy_loss.kl_coefficient=0.1", f"algorithm.policy_loss.reference_path={tmp_path / 'gone'}")
    with pytest.raises(ConfigError, match="does not exist") as caught:
        run_stage("rlvr", tmp_path / "run", *overrides)
    assert str(caught.value.where).startswith("algorithm.policy_loss.reference_path")
    assert not (tmp_path / "run").exists()


def test_the_reference_is_where_the_stage_started_also_when_it_is_resumed(tmp_path: Path) -> None:
    overrides = ("algorithm.policy_loss.kl_coefficient=0.01", "optimizer.lr_decay_style=constant")
    whole, _ = written(run_stage("rlvr", tmp_path / "whole", *overrides, "trainer.max_steps=4"))
    run_stage("rlvr", tmp_path / "cut", *overrides, "trainer.max_steps=2")
    resumed, _ = written(run_stage("rlvr", tmp_path / "cut", *overrides, "trainer.max_steps=4"))
    divergence = [row["reference_kl"] for row in whole]
    assert divergence[0] == pytest.approx(0, abs=1e-9)
    assert divergence[3] > divergence[1] > 1e-5
    assert [row["reference_kl"] for row in resumed] == divergence


def test_dapo_trains_on_groups_with_a_signal_alone(tmp_path: Path) -> None:
    run = run_stage("rlvr", tmp_path / "dapo", *DAPO, "trainer.max_steps=2", "trainer.log_samples=100")
    metrics, samples = written(run)
    assert len(metrics) == 2
    for step in (1, 2):
        rows = [row for row in samples if row["step"] == step]
        assert len({row["id"] for row in rows}) == 4
        for name in {row["id"] for row in rows}:
            accuracies = {row["correct"] for row in rows if row["id"] == name}
            assert accuracies == {0.0, 1.0}
            assert any(row["advantage"] != 0 for row in rows if row["id"] == name)
    assert all(row["dynamic_sampling/generation_batches"] >= 1 for row in metrics)
    assert all(0 < row["groups_with_signal"] <= 1 for row in metrics)


def test_dapo_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    """How many prompts a step draws depends on what they gave; the next step starts behind them."""
    overrides = (*DAPO, "algorithm.generation_batch_size=3", "optimizer.lr_decay_style=constant")
    whole = written(run_stage("rlvr", tmp_path / "whole", *overrides, "trainer.max_steps=4"))
    run_stage("rlvr", tmp_path / "cut", *overrides, "trainer.max_steps=3")
    assert written(run_stage("rlvr", tmp_path / "cut", *overrides, "trainer.max_steps=4")) == whole
    assert len({row["dynamic_sampling/generation_batches"] for row in whole[0]}) > 1


def test_the_overlong_penalty_lowers_the_reward(tmp_path: Path) -> None:
    with trainer_of("rlvr", tmp_path, "algorithm.overlong_buffer_length=24") as trainer:
        rollouts, _ = sampled(trainer)
        penalised = trainer.scores(rollouts)
    for found, reward, length in zip(penalised.tolist(), rollouts.rewards, rollouts.lengths.tolist(), strict=True):
        assert reward is not None
        assert found == pytest.approx(reward.score - max(0.0, (length - 8) / 24), abs=1e-6)
    assert int(rollouts.lengths.max()) > 8


def test_prompts_that_nobody_solves_end_the_run_with_a_remedy(tmp_path: Path) -> None:
    """The untrained model is right nowhere."""
    with pytest.raises(DataError, match="2 generation batches of 4 prompts gave 0 groups") as caught:
        run_stage("rlvr", tmp_path, *DAPO, "algorithm.max_generation_batches=2", f"model.path={tiny_task().model}")
    assert "easier prompts" in str(caught.value.remedy)


def test_what_was_trained_before_the_signal_ran_out_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And goes on from there, with more generation batches, as if nothing had happened."""
    overrides = (*DAPO, "algorithm.generation_batch_size=3", "optimizer.lr_decay_style=constant", "trainer.max_steps=3")
    whole = written(run_stage("rlvr", tmp_path / "whole", *overrides))
    needed = [int(row["dynamic_sampling/generation_batches"]) for row in whole[0]]
    assert needed[2] > 2, "the third step must need more batches than its fewest"
    kept, real = [], GroupSampler.finish

    def runs_out(self: GroupSampler, filling: Any, draw: Any, *, step: int) -> Any:
        if step == 2 and not kept:
            kept.append(step)
            self.algorithm = replace(self.algorithm, max_generation_batches=2)
        return real(self, filling, draw, step=step)

    monkeypatch.setattr(GroupSampler, "finish", runs_out)
    with pytest.raises(NoSignalError, match="2 generation batches of 3 prompts"):
        run_stage("rlvr", tmp_path / "cut", *overrides)
    latest = (tmp_path / "cut" / "checkpoints" / "latest").read_text().strip()
    assert latest == "step_00000002"
    assert written(run_stage("rlvr", tmp_path / "cut", *overrides, "algorithm.max_generation_batches=20")) == whole


class Waiting(Grader):
    """Grades the first batch only after a second one has been sampled: a run that waits for the grades first never ends."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.sampled_again = threading.Event()
        self.batches = 0

    def grade(self, responses: Sequence[str], records: Sequence[Any]) -> list[Reward | None]:
        self.batches += 1
        if self.batches == 2:
            assert self.sampled_again.wait(timeout=60), "the next batch was not sampled while this one was graded"
        grades = super().grade(responses, records)
        # One group with a signal a batch: the first group's first answer is right, all others are wrong.
        return [reward and replace(reward, accuracy=float(index == 0)) for index, reward in enumerate(grades)]


def test_sampling_goes_on_while_grades_are_awaited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate, calls = MegatronEngine.generate, []
    with trainer_of("rlvr", tmp_path, *DAPO) as trainer:
        grader = Waiting(trainer.config.reward)
        object.__setattr__(trainer.sampler, "grader", grader)

        def count(*arguments: Any, **options: Any) -> Any:
            calls.append(len(calls))
            if len(calls) == 3:
                grader.sampled_again.set()
            return generate(*arguments, **options)

        monkeypatch.setattr(MegatronEngine, "generate", count)
        rollouts, _ = sampled(trainer)
    assert len(rollouts.prompts) == 4
    assert grader.batches == len(calls) == 4


@pytest.mark.parametrize("reward", ["gated", "verified_plus_gated", "verified_plus_signed"])
def test_alignment_with_verified_answers(reward: str, tmp_path: Path) -> None:
    run = run_stage("align", tmp_path, f"algorithm.reward={reward}", "trainer.max_steps=2", "algorithm.num_mini_batches=2")
    metrics, _ = written(run)
    trained = [row for row in metrics if row["prefix"] == "train"]
    assert len(trained) == 2
    assert all(row["grad_norm"] > 0 and row["advantage_magnitude"] > 0 for row in trained)


def test_alignment_with_verified_answers_needs_them(tmp_path: Path) -> None:
    import json

    task = tiny_task()
    lines = [json.loads(line) for line in Path(task.data.teacher).read_text().splitlines()]
    file = tmp_path / "unanswered.jsonl"
    for line in lines:
        line.pop("answer", None)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    root = f"data.image_root={task.data.root}"
    with pytest.raises(DataError, match="has no answer"):
        run_stage("align", tmp_path / "run", "algorithm.reward=gated", f"data.train={file}", root)
