"""One step of the game: the one-pass way against the plain way, and identical texts against identical scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.stages import run_stage, trained_policy, trainer_of
from torch import Tensor

from prism_nemo.algorithms.advantages import prism_advantages
from prism_nemo.algorithms.metrics import MetricSums
from prism_nemo.algorithms.policy_loss import policy_loss
from prism_nemo.data.open import open_file
from prism_nemo.data.segments import response_segments
from prism_nemo.errors import ConfigError, PrismError
from prism_nemo.models.base import TrainableModel, TrainingBatch
from prism_nemo.models.policy import PolicyOutput
from prism_nemo.packing.groups import Group, Segment, SegmentKind
from prism_nemo.packing.rows import PackedRow, make_row
from prism_nemo.rollout.batch import RolloutBatch
from prism_nemo.run_directory import read_json_lines
from prism_nemo.stages.align import AlignTrainer
from prism_nemo.stages.comparisons import ComparisonBatch
from prism_nemo.stages.crossing import Scores
from prism_nemo.stages.policy_batch import policy_batch, policy_rows

KINDS = (SegmentKind.PERCEPTION, SegmentKind.REASONING)


def gradients(model: TrainableModel) -> dict[str, Tensor]:
    return {name: parameter.main_grad.clone() for name, parameter in model.module.named_parameters()}


def assert_equal_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative to each tensor's norm; a tensor whose gradient is rounding alone, relative to a millionth of the largest norm."""
    assert found.keys() == expected.keys()
    floor = 1e-6 * max(float(tensor.norm()) for tensor in expected.values())
    assert floor > 1e-9
    errors = {name: float((found[name] - want).norm()) / max(float(want.norm()), floor) for name, want in expected.items()}
    assert {name: error for name, error in errors.items() if not error <= tolerance} == {}


@dataclass(frozen=True, eq=False)
class Step:
    """What a trainer has in hand between sampling and updating."""

    trainer: AlignTrainer
    rollouts: RolloutBatch
    teachers: list[tuple[Segment, ...]]

    def policy_batch(self, game: Scores, old_log_probs: Sequence[Tensor] | None = None) -> TrainingBatch:
        config = self.trainer.config
        return policy_batch(
            policy_rows(self.rollouts, max_tokens=config.trainer.max_tokens_per_row, runtime=self.trainer.runtime),
            self.rollouts,
            self.trainer.advantages(self.rollouts, game),
            config.algorithm.policy_loss,
            self.trainer.runtime,
            max_response_length=config.data.max_response_length,
            old_log_probs=old_log_probs,
        )

    def policy_gradients(self, batch: TrainingBatch) -> tuple[float, dict[str, float], dict[str, Tensor]]:
        policy = self.trainer.policy
        policy.prepare_for_training_step()
        loss, metrics = policy.get_loss_and_metrics(batch, forward_only=False)
        policy.finish_training_step()
        return loss, metrics, gradients(policy)

    def discriminator_gradients(self) -> dict[str, Tensor]:
        self.trainer.discriminator.finish_training_step()
        return gradients(self.trainer.discriminator)


def sample(trainer: AlignTrainer) -> Step:
    trainer.policy.prepare_for_training()
    trainer.discriminator.prepare_for_training()
    batch = trainer.stream.next_batch()
    prompts = [(record, encoded.prompt) for record, encoded in batch]
    rollouts = trainer.sampler.sample(prompts, trainer.config.rollout, step=0)
    return Step(trainer, rollouts, [encoded.teacher for _, encoded in batch])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("align")


@pytest.fixture
def step(folder: Path, request: pytest.FixtureRequest) -> Iterator[Step]:
    with trainer_of("align", folder / request.node.name, *getattr(request, "param", ())) as trainer:
        yield sample(trainer)


SMALL_ROWS = "trainer.max_tokens_per_row=100"  # comparisons are cut over rows


@pytest.mark.parametrize("step", [(), (SMALL_ROWS,)], ids=["whole", "cut"], indirect=True)
def test_one_pass_gives_the_scores_and_the_gradients_of_two(step: Step) -> None:
    trainer, discriminator = step.trainer, step.trainer.discriminator
    game, metrics = trainer.play(step.rollouts, step.teachers)
    one_pass = step.discriminator_gradients()
    one_advantages = trainer.advantages(step.rollouts, game)
    one_loss, one_metrics, one_policy = step.policy_gradients(step.policy_batch(game))
    assert 0 < int(game.compared.sum()) < len(step.rollouts.texts), "some rollouts should be valid and some not"

    # Score first ...
    scores = torch.full_like(game.student_scores, float("nan"))
    for row, row_scores in zip(game.batch.rows, discriminator.infer_rm_critic(game.batch.rows), strict=True):
        for kind, index, score in zip(row.segment_kind.tolist(), row.segment_sample.tolist(), row_scores.tolist(), strict=True):
            if index >= 0:
                scores[index, KINDS.index(SegmentKind(kind))] = score
    torch.testing.assert_close(scores, game.student_scores, rtol=0, atol=1e-6, equal_nan=True)

    # ... then forward and backward once more, for the gradient alone.
    again = replace_scores(game, scores)
    discriminator.prepare_for_training_step()
    discriminator.start_batch(game.batch.rows)
    loss, _ = discriminator.get_loss_and_metrics(TrainingBatch(game.batch.rows, partial(loss_of, game.batch)), forward_only=False)
    assert loss == pytest.approx(metrics["discriminator/loss"], rel=1e-6)
    assert_equal_gradients(step.discriminator_gradients(), one_pass, 1e-6)

    # The old log-probabilities in a pass of their own.
    advantages = trainer.advantages(step.rollouts, again)
    torch.testing.assert_close(advantages, one_advantages, rtol=1e-5, atol=1e-6)
    batch = step.policy_batch(again)
    old: list[Tensor | None] = [None] * len(step.rollouts.texts)
    for row, log_probs in zip(batch.rows, trainer.policy.get_inference_log_probs(batch.rows), strict=True):
        for segment, index in enumerate(row.segment_sample.tolist()):
            assert old[index] is None
            old[index] = log_probs[row.label_segment == segment]
    two_loss, two_metrics, two_policy = step.policy_gradients(step.policy_batch(again, old))
    assert two_loss == pytest.approx(one_loss, abs=1e-6)
    assert one_metrics["ratio_is_one"] == 1.0
    assert two_metrics["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert_equal_gradients(two_policy, one_policy, 1e-6)


def replace_scores(game: Scores, scores: Tensor) -> Any:
    """What `advantages` reads of a game."""

    @dataclass(frozen=True)
    class Scored:
        student_scores: Tensor
        compared: Tensor

    return Scored(scores, game.compared)


def loss_of(game: ComparisonBatch, row: PackedRow, scores: Tensor) -> tuple[Tensor, MetricSums]:
    return game.loss(row, scores)[0], {}


PLAIN = (
    "discriminator.moe_aux_loss_coeff=0",
    "discriminator.score_regularization=0.05",
    "algorithm.perception_weight=0.8",
    "algorithm.reasoning_weight=0.3",
    "algorithm.format_penalty=1.2",
)


@pytest.mark.parametrize("step", [PLAIN], ids=["plain"], indirect=True)
def test_the_plain_way_with_every_sequence_alone(step: Step) -> None:
    """No shared prefixes, no shared teacher, no identities: one row a sequence, and the formulas as the algorithm writes them.

    The balancing loss is off: it is a mean over the tokens of a group, and without shared prefixes the groups are others.
    """
    trainer, rollouts = step.trainer, step.rollouts
    game, metrics = trainer.play(rollouts, step.teachers)
    packed_discriminator = step.discriminator_gradients()
    packed_loss, _, packed_policy = step.policy_gradients(step.policy_batch(game))
    advantages = trainer.advantages(rollouts, game)

    students = [trainer.student_segments(text, index) for index, text in enumerate(rollouts.texts)]
    valid = [index for index, student in enumerate(students) if student is not None]
    compared = torch.tensor([student is not None for student in students])
    discriminator = trainer.discriminator
    discriminator.prepare_for_training_step()
    scores = torch.zeros(len(students), len(KINDS))
    total = torch.zeros(())
    teacher_scores = torch.zeros(len(step.teachers), len(KINDS))
    for column in range(len(KINDS)):
        alone = [score(trainer, prompt, step.teachers[i][column]) for i, prompt in enumerate(rollouts.prompts)]
        teacher_scores[:, column] = torch.stack(alone).detach()
        squares = torch.stack(alone).square().mean()
        own = []
        for index in valid:
            number = rollouts.rollouts[index].prompt_index
            own.append(score(trainer, rollouts.prompts[number], students[index][column]))
            total = total - torch.nn.functional.logsigmoid(alone[number] - own[-1]) / len(valid)
        scores[valid, column] = torch.stack(own).detach()
        total = total + 0.05 * (squares + torch.stack(own).square().mean()) / 4  # mean over four score sets
    total.backward()
    assert float(total) == pytest.approx(metrics["discriminator/loss"], abs=2e-6)
    torch.testing.assert_close(scores[valid], game.student_scores[valid], rtol=0, atol=1e-5)
    assert_equal_gradients(step.discriminator_gradients(), packed_discriminator, 2e-5)
    for column, kind in enumerate(KINDS):
        of_pairs = torch.stack([teacher_scores[rollouts.rollouts[index].prompt_index, column] for index in valid])
        assert metrics[f"discriminator/{kind.name.lower()}/teacher_score"] == pytest.approx(float(of_pairs.mean()), abs=1e-6)

    plain = prism_advantages(
        scores[:, 0],
        scores[:, 1],
        compared,
        rollouts.group_ids,
        perception_weight=0.8,
        reasoning_weight=0.3,
        format_penalty=1.2,
    )
    torch.testing.assert_close(plain, advantages, rtol=1e-3, atol=1e-3)  # normalising magnifies the scores' rounding
    policy = trainer.policy
    policy.prepare_for_training_step()
    tokens = int(rollouts.lengths.sum())
    loss = torch.zeros(())
    for index, rollout in enumerate(rollouts.rollouts):
        row = make_row([Group(rollouts.prompts[rollout.prompt_index], (Segment(rollout.tokens, 0),))])
        output: PolicyOutput = policy.forward_row(policy.module, row)
        taken = advantages[index].expand(rollout.tokens.numel())
        result = policy_loss(
            output.log_probs,
            rollout.log_probs,  # the sampler's own
            taken,
            torch.zeros(len(taken), dtype=torch.int64),
            global_tokens=tokens,
            global_sequences=len(rollouts.rollouts),
            parameters=trainer.config.algorithm.policy_loss,
        )
        loss = loss + result.loss
    loss.backward()
    policy.finish_training_step()
    assert float(loss) == pytest.approx(packed_loss, abs=1e-5)
    assert_equal_gradients(gradients(policy), packed_policy, 2e-5)


def score(trainer: AlignTrainer, prompt: Any, segment: Segment) -> Tensor:
    """One segment's score with gradient, alone in its row. The gradient goes where Megatron's DDP collects it."""
    row = make_row([Group(prompt, (segment,))])
    return trainer.discriminator.module(row, 1.0, None).squeeze(0)


# Identical texts


def dense_discriminator(folder: Path) -> str:
    """A warmed-up discriminator without experts."""
    run = folder / "dense_warmup"
    if not run.exists():
        run_stage("warmup", run, "discriminator.num_experts=1", "trainer.max_steps=2")
    return str(run)


DISCRIMINATORS = {
    "learned": (),
    "dedicated": ("discriminator.routing=dedicated",),
    "dense": ("discriminator.num_experts=1",),
    "text_only": ("discriminator.use_images=false",),
    "whole": ("discriminator.view=whole",),
}


@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_a_student_that_writes_the_teachers_text_gets_the_teachers_scores(kind: str, folder: Path) -> None:
    """Through the stage's own path: rollouts as text, segments, rows, scores. Every second rollout stays as it was sampled."""
    overrides = [*DISCRIMINATORS[kind]]
    if kind == "dense":
        overrides.append(f"discriminator.path={dense_discriminator(folder)}")
    with trainer_of("align", folder / kind, *overrides) as trainer:
        step = sample(trainer)
        texts = [
            step.rollouts.record_of(index).response if index % 2 == 0 else text for index, text in enumerate(step.rollouts.texts)
        ]
        copied = [index for index in range(len(texts)) if index % 2 == 0]
        rollouts = replace(step.rollouts, texts=texts)
        game, metrics = trainer.play(rollouts, step.teachers)
        teacher = teacher_scores(trainer, game)
        assert all(torch.equal(game.compared[index], torch.tensor(True)) for index in copied)
        expected = torch.stack([teacher[rollouts.rollouts[index].prompt_index] for index in copied])
        torch.testing.assert_close(game.student_scores[copied], expected, rtol=0, atol=1e-6)
        assert len(teacher.unique()) == teacher.numel(), "the scores of different texts should differ"
        others = len(texts) - len(copied)
        valid_others = int(game.compared.sum()) - len(copied)
        assert 0 < valid_others <= others
        for name in [kind.name.lower() for kind in game.kinds]:
            assert metrics[f"discriminator/{name}/ties"] == pytest.approx(len(copied) / (len(copied) + valid_others))


def teacher_scores(trainer: AlignTrainer, game: Scores) -> Tensor:
    """[prompts, kinds]."""
    scores = torch.full((len(game.batch.copies), len(game.kinds)), float("nan"))
    for row, row_scores in zip(game.batch.rows, trainer.discriminator.infer(game.batch.rows), strict=True):
        for kind, index, value in zip(row.segment_kind.tolist(), row.segment_sample.tolist(), row_scores.tolist(), strict=True):
            if index < 0:
                scores[-1 - index, game.kinds.index(SegmentKind(kind))] = value
    return scores


def test_frozen_discriminator_scores_without_a_gradient(folder: Path) -> None:
    with trainer_of("align", folder / "free") as trainer:
        step = sample(trainer)
        expected, _ = trainer.play(step.rollouts, step.teachers)
    with trainer_of("align", folder / "frozen", "algorithm.discriminator_steps_frozen=true") as trainer:
        step = sample(trainer)
        game, metrics = trainer.play(step.rollouts, step.teachers)
        torch.testing.assert_close(game.student_scores, expected.student_scores, rtol=0, atol=1e-6, equal_nan=True)
        assert "discriminator/loss" in metrics
        before = {name: parameter.detach().clone() for name, parameter in trainer.discriminator.module.named_parameters()}
        assert all(float(grad.norm()) == 0 for grad in gradients(trainer.discriminator).values())
        result = trainer.update(0, step.rollouts, game, trainer.stream.positions)
        assert result["grad_norm"] > 0
        assert "discriminator/grad_norm" not in result
        after = dict(trainer.discriminator.module.named_parameters())
        assert all(torch.equal(after[name], value) for name, value in before.items())


def test_score_clip_bounds_the_advantages_and_no_gradient(folder: Path) -> None:
    """With all scores beyond the clip the policy sees no differences among valid rollouts; the discriminator still learns."""
    with trainer_of("align", folder / "clip", "algorithm.score_clip=1e-6") as trainer:
        step = sample(trainer)
        with torch.no_grad():
            trainer.discriminator.module.score_head.weight.abs_().mul_(100)
        game, _ = trainer.play(step.rollouts, step.teachers)
        kept = game.student_scores[game.compared]
        assert bool((kept.abs() > 1e-6).all())
        assert len(kept.unique()) > 1
        assert float(torch.stack([grad.norm() for grad in step.discriminator_gradients().values()]).norm()) > 1e-3
        clipped = replace_scores(game, game.student_scores.sign() * 1e-6)
        torch.testing.assert_close(
            trainer.advantages(step.rollouts, game), trainer.advantages(step.rollouts, clipped), rtol=0, atol=0
        )


def test_a_rollout_that_is_not_in_the_format_is_pushed_down(step: Step) -> None:
    game, _ = step.trainer.play(step.rollouts, step.teachers)
    advantages = step.trainer.advantages(step.rollouts, game)
    for group in step.rollouts.group_ids.unique():
        mine = step.rollouts.group_ids == group
        valid, invalid = advantages[mine & game.compared], advantages[mine & ~game.compared]
        assert bool((invalid < -1.4).all())
        if len(valid) and len(invalid):
            assert float(valid.min()) > float(invalid.max())


@pytest.mark.parametrize("side", ["teacher_scores", "student_scores"])
def test_a_score_that_is_not_finite_stops_both_steps(side: str, step: Step) -> None:
    """Whichever side's it is: policy and discriminator go on from the same step."""
    trainer = step.trainer
    game, _ = trainer.play(step.rollouts, step.teachers)
    getattr(game, side)[int(game.compared.nonzero()[0]) if side == "student_scores" else -1, 1] = float("inf")
    models = (trainer.policy.module, trainer.discriminator.module)
    before = [[parameter.detach().clone() for parameter in model.parameters()] for model in models]
    assert trainer.update(0, step.rollouts, game, trainer.stream.positions) == {}
    for model, values in zip(models, before, strict=True):
        assert all(torch.equal(parameter, value) for parameter, value in zip(model.parameters(), values, strict=True))
    (bad,) = read_json_lines(trainer.loop.directory / "bad_samples.jsonl")
    assert bad["samples"] == [record.id for record in step.rollouts.records]


def test_an_alignment_asks_for_what_the_warm_up_left(tmp_path: Path) -> None:
    """Before a model is loaded; and what alignment leaves says the same of itself."""
    run_stage("warmup", tmp_path / "warmup", "discriminator.use_images=false", "trainer.max_steps=1")
    path = f"discriminator.path={tmp_path / 'warmup'}"
    with pytest.raises(ConfigError, match=r"use_images=false \(here true\)"):
        run_stage("align", tmp_path / "align", path)
    assert not (tmp_path / "align").exists()
    short = ("discriminator.use_images=false", "trainer.max_steps=1")
    run_stage("align", tmp_path / "align", path, *short)
    run_stage("align", tmp_path / "again", f"discriminator.path={tmp_path / 'align'}", *short)
    with pytest.raises(ConfigError, match=r"use_images=false \(here true\)"):
        run_stage("align", tmp_path / "third", f"discriminator.path={tmp_path / 'again'}")
    with pytest.raises(ConfigError, match="no discriminator that was warmed up"):
        run_stage("align", tmp_path / "third", f"discriminator.path={trained_policy()}")


def test_groups_without_spread_does_not_depend_on_the_row_budget(folder: Path) -> None:
    """In three groups of four all rollouts say the same, in the last one one of them does not."""
    measured = []
    for name, overrides in {"whole": (), "cut": (SMALL_ROWS,)}.items():
        with trainer_of("align", folder / f"spread_{name}", *overrides) as trainer:
            step = sample(trainer)
            texts = [step.rollouts.record_of(index).response for index in range(len(step.rollouts.texts))]
            texts[-1] = step.rollouts.records[0].response
            game, metrics = trainer.play(replace(step.rollouts, texts=texts), step.teachers)
            measured.append({key: value for key, value in metrics.items() if key.endswith("groups_without_spread")})
            assert (max(game.batch.copies) > 1) == (name == "cut")
    assert measured[0] == measured[1]
    assert set(measured[0].values()) == {0.75}


def test_the_probe_is_the_share_of_true_texts_that_win_alone(folder: Path) -> None:
    """Each text in a row of its own, over the first seven held-out records."""
    with trainer_of("align", folder / "probe", "trainer.limit_val_samples=7") as trainer:
        found = trainer.probe.run()
        path, data = trainer.config.data.validation, trainer.config.data
        records = open_file(path, data, required=("probe_response",)).records[:7]
        margins = torch.zeros(7, len(KINDS))
        with trainer.discriminator.inference_mode():
            for number, record in enumerate(records):
                prompt = trainer.encoder.encode_prompt(record)
                for sign, text in ((1, record.response), (-1, record.probe_response)):
                    segments = response_segments(text, trainer.encoder, trainer.config.discriminator.view, sample=0)
                    margins[number] += sign * torch.stack([score(trainer, prompt, segment) for segment in segments])
        assert float(margins.abs().min()) > 1e-5, "no tie"
        for column, kind in enumerate(KINDS):
            name = kind.name.lower()
            assert found[f"{name}/content_probe"] == pytest.approx(float((margins[:, column] > 0).float().mean()))
            assert found[f"{name}/content_probe_margin"] == pytest.approx(float(margins[:, column].mean()), abs=1e-6)


def test_rollouts_differ_from_step_to_step_and_not_from_run_to_run(step: Step) -> None:
    def texts(number: int) -> Sequence[str]:
        trainer = step.trainer
        batch = list(zip(step.rollouts.records, step.rollouts.prompts, strict=True))
        return trainer.sampler.sample(batch, trainer.config.rollout, step=number).texts

    assert texts(0) == step.rollouts.texts
    assert sum(a == b for a, b in zip(texts(1), step.rollouts.texts, strict=True)) <= 1


def test_the_stage_says_when_the_discriminator_reads_no_content(tmp_path: Path) -> None:
    """The gate stands before the first step: no metrics, no checkpoint."""
    with pytest.raises(PrismError, match="content probe is 0") as caught:
        run_stage("align", tmp_path / "gated", "algorithm.min_content_probe=1.0")
    assert caught.value.where == "algorithm.min_content_probe"
    assert not (tmp_path / "gated" / "metrics.jsonl").exists()
    assert not (tmp_path / "gated" / "checkpoints").exists()
    run_stage("align", tmp_path / "open", "algorithm.min_content_probe=0.0", "trainer.max_steps=1")
    assert (tmp_path / "open" / "checkpoints" / "latest").exists()


def test_an_align_run_starts_from_the_policys_weights(folder: Path) -> None:
    with trainer_of("sft", folder / "same_policy", f"model.path={trained_policy()}") as sft:
        expected = {name: parameter.detach().clone() for name, parameter in sft.policy.module.named_parameters()}
    with trainer_of("align", folder / "start") as trainer:
        found = dict(trainer.policy.module.named_parameters())
        assert all(torch.equal(found[name], value) for name, value in expected.items())
