"""Alignment: the policy learns to write like the teacher because a discriminator scores its perception and its reasoning.

    prism-nemo align model.path=runs/sft discriminator.path=runs/warmup data.train=teacher.jsonl experiment.dir=runs/align

One step, as the algorithm describes it: sample rollouts; score every segment of every rollout and of the teacher's response;
update the discriminator to tell them apart and the policy to be taken for the teacher. Two identities make a step cheap, both
exact: the scores of the game are those of the discriminator's own forward pass, so one pass scores and accumulates its gradient;
and with one optimizer step per batch the old log-probabilities are the new ones, so there is no pass for them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prism_nemo.algorithms.advantages import mixed_advantages, prism_advantages
from prism_nemo.algorithms.metrics import mean_of
from prism_nemo.config.enums import AlignReward
from prism_nemo.config.layout import discriminator_layout
from prism_nemo.config.schema import AlignConfig
from prism_nemo.config.validate import validate
from prism_nemo.data.chat import ChatEncoder
from prism_nemo.data.open import open_stream
from prism_nemo.data.records import Record
from prism_nemo.data.segments import KINDS, response_segments
from prism_nemo.engine.runtime import Runtime, beside, session
from prism_nemo.engine.step import reduce_metrics
from prism_nemo.errors import DataError, PrismError
from prism_nemo.evaluation.accuracy import HeldOutPrompts
from prism_nemo.models.discriminator import DiscriminatorModel
from prism_nemo.models.policy import OutputDistribution, PolicyModel
from prism_nemo.packing.groups import EncodedPrompt, Segment, without_images
from prism_nemo.rewards.grader import Grader, check_answer
from prism_nemo.rollout.ahead import unpacked
from prism_nemo.rollout.base import build_engine
from prism_nemo.rollout.batch import RolloutBatch
from prism_nemo.rollout.sampler import PendingRollouts, Sampler
from prism_nemo.stages.ahead import BegunSteps, Saved
from prism_nemo.stages.comparisons import TEACHER, Comparison, ComparisonBatch
from prism_nemo.stages.crossing import Crossing, Scores
from prism_nemo.stages.loop import StageLoop
from prism_nemo.stages.policy_update import PolicyUpdate
from prism_nemo.stages.probe import ContentProbe


@dataclass(frozen=True, eq=False)
class AlignPrompt:
    """A prompt with the teacher's segments."""

    prompt: EncodedPrompt
    teacher: tuple[Segment, ...]


@dataclass(frozen=True, eq=False)
class AlignBatch:
    """A step's prompts, which stood at `positions` of the global batch, and their rollouts on the way."""

    prompts: list[tuple[Record, AlignPrompt]]
    positions: Sequence[int]
    first: PendingRollouts


class AlignTrainer:
    """One step of policy and discriminator per global batch of prompts."""

    def __init__(self, config: AlignConfig, runtime: Runtime, loop: StageLoop, grader: Grader) -> None:
        self.config = config
        self.runtime = runtime
        self.loop = loop
        self.policy = PolicyModel(config.model, config.parallel, runtime)
        self.policy.build_optimizer(config.optimizer, config.trainer.max_steps)
        layout = discriminator_layout(config)
        own_runtime = beside(runtime, layout, config.runtime)
        self.discriminator = DiscriminatorModel(config.discriminator, layout, own_runtime, seed=config.runtime.seed)
        self.discriminator.build_optimizer(config.discriminator_optimizer, config.trainer.max_steps)
        self.models = {"policy": self.policy, "discriminator": self.discriminator}
        self.encoder = ChatEncoder.from_directory(self.policy.assets, config.data, image_root=None)
        self.policy.distribution = OutputDistribution(config.rollout.temperature, self.encoder.banned_token_ids)
        engine = build_engine(config.rollout, self.policy, config.data, loop.directory)
        self.sampler = Sampler(engine, self.encoder, grader, runtime, config.runtime.seed)
        self.policy_update = PolicyUpdate(self.policy, config)
        verified = config.algorithm.reward is not AlignReward.discriminator
        self.stream = open_stream(config, self.encode, required=("response", "answer") if verified else ("response",))
        self.begun = BegunSteps(config, loop, self.policy, self.sampler, self.stream, self.begin)
        self.probe = ContentProbe(self.discriminator, self.encoder, config, own_runtime)
        self.held_out = HeldOutPrompts(self.sampler, config.data, limit=config.trainer.limit_val_samples)

    def encode(self, record: Record) -> AlignPrompt:
        assert record.response is not None
        if record.answer is not None:
            check_answer(record)  # training does not look at it, the metrics do
        view = self.config.discriminator.view
        return AlignPrompt(
            self.encoder.encode_prompt(record), response_segments(record.response, self.encoder, view, sample=TEACHER)
        )

    def fit(self) -> None:
        self.policy.prepare_for_training()
        self.discriminator.prepare_for_training()
        self.check_content_probe()
        for step in self.loop.steps(self):
            with self.loop.timed("rollout"):
                batch = self.begun.take(step)
                rollouts = batch.first.result()
                self.begun.go_on(step)
            with self.loop.timed("discriminator"):
                scores, game_metrics = self.play(rollouts, [encoded.teacher for _, encoded in batch.prompts])
            with self.loop.timed("policy"):
                metrics = self.update(step, rollouts, scores, batch.positions)

            self.loop.end_step(
                {**metrics, **game_metrics},
                rollouts.samples(self.config.trainer.log_samples, self.sample_columns(scores)),
            )
        self.policy.finish_training()
        self.discriminator.finish_training()

    def begin(self, step: int, saved: Saved | None) -> AlignBatch:
        """Draws the prompts of step `step` and starts to sample; `saved` are sampled already."""
        prompts = self.loop.next_batch(self.stream)
        positions = self.stream.positions
        given = None if saved is None else unpacked(saved, positions)
        batch = [(record, encoded.prompt) for record, encoded in prompts]
        return AlignBatch(prompts, positions, self.sampler.begin(batch, self.config.rollout, step=step, given=given))

    def play(self, rollouts: RolloutBatch, teachers: list[tuple[Segment, ...]]) -> tuple[Scores, dict[str, float]]:
        """One pass of the discriminator: the scores of every segment and, unless it is frozen, its gradient."""
        students = [self.student_segments(rollouts.texts[index], index) for index in range(len(rollouts.texts))]
        comparisons = []
        for number, (prompt, teacher) in enumerate(zip(rollouts.prompts, teachers, strict=True)):
            own = tuple(
                segments
                for rollout, segments in zip(rollouts.rollouts, students, strict=True)
                if rollout.prompt_index == number and segments is not None
            )
            comparisons.append(
                Comparison(prompt if self.config.discriminator.use_images else without_images(prompt), teacher, own)
            )
        crossing = Crossing(comparisons, len(students), policy=self.runtime, discriminator=self.discriminator.runtime)
        game = ComparisonBatch(
            crossing.comparisons,
            crossing.num_students,
            self.config.discriminator,
            self.discriminator.runtime,
            max_tokens=self.config.trainer.max_tokens_per_row,
        )
        self.discriminator.prepare_for_training_step()
        self.discriminator.start_batch(game.rows)
        frozen = self.config.algorithm.discriminator_steps_frozen
        loss, metrics = self.discriminator.get_loss_and_metrics(game.training_batch, forward_only=frozen)
        game.share_scores()
        spread = reduce_metrics(game.spread(), self.discriminator.runtime)
        metrics = {"loss": loss, **metrics, **spread, **self.discriminator.router_metrics()}
        return crossing.back(game), {f"discriminator/{name}": value for name, value in metrics.items()}

    def student_segments(self, text: str, index: int) -> tuple[Segment, ...] | None:
        """A rollout's segments; None for one that is not in the format (or too long), which is not scored."""
        try:
            return response_segments(text, self.encoder, self.config.discriminator.view, sample=index)
        except DataError:
            return None

    def advantages(self, rollouts: RolloutBatch, scores: Scores) -> Tensor:
        """fp32 [B], from the group-normalised scores of both segments; an invalid rollout is pushed down."""
        algorithm = self.config.algorithm
        alone = algorithm.reward is AlignReward.discriminator
        student = scores.student_scores.clamp(-algorithm.score_clip, algorithm.score_clip)
        alignment = prism_advantages(
            student[:, 0],
            student[:, -1],  # with one score for the whole response, the same one
            scores.compared,
            rollouts.group_ids,
            perception_weight=algorithm.perception_weight,
            reasoning_weight=algorithm.reasoning_weight,
            format_penalty=algorithm.format_penalty if alone else 0.0,
        )
        if alone:
            return alignment
        rewards = [reward for reward in rollouts.rewards if reward is not None]  # every record has an answer
        return mixed_advantages(
            alignment,
            scores.compared,
            torch.tensor([reward.accuracy == 1.0 for reward in rewards], dtype=torch.bool),
            torch.tensor([reward.score for reward in rewards]),
            rollouts.group_ids,
            reward=algorithm.reward,
            alignment_weight=algorithm.alignment_weight,
            wrong_penalty=algorithm.wrong_penalty,
            format_penalty=algorithm.format_penalty,
        )

    def update(self, step: int, rollouts: RolloutBatch, scores: Scores, positions: Sequence[int]) -> dict[str, float]:
        """The policy's gradient from the scores, then both optimizer steps; none when a score is not finite."""
        ids = [record.id for record in rollouts.records]
        finite = self.own_scores_are_finite(scores)
        if self.runtime.max_over_all(int(not finite)):  # without the discriminator's step the policy takes none either
            self.loop.guard(False, "a score", ids, at_fault=not finite)
            return {}
        advantages = self.advantages(rollouts, scores)
        update = self.policy_update.run(step, rollouts, advantages, positions)
        applied, at_fault, result = update.applied, update.at_fault, update.metrics
        if not self.config.algorithm.discriminator_steps_frozen:
            self.discriminator.finish_training_step()
            discriminator_step = self.discriminator.optimizer_step(step)
            applied, at_fault = applied and discriminator_step.applied, at_fault or discriminator_step.at_fault
            result["discriminator/grad_norm"] = discriminator_step.grad_norm
        self.loop.guard(applied, "a gradient", ids, at_fault=at_fault)
        sums = {**rollouts.metrics(), "advantage_magnitude": mean_of(advantages.abs())}
        sums |= {**rollouts.staleness(step), **self.sampler.metrics()}
        return {**result, **reduce_metrics(sums, self.runtime)}

    def own_scores_are_finite(self, scores: Scores) -> bool:
        """This rank's, the teachers' too."""
        return bool(scores.student_scores[scores.compared].isfinite().all() & scores.teacher_scores.isfinite().all())

    def sample_columns(self, scores: Scores) -> dict[str, list[Any]]:
        """The scores of every rollout by segment, for samples.jsonl; null where there is none."""
        columns = {}
        for column, kind in enumerate(scores.kinds):
            values = scores.student_scores[:, column].tolist()
            columns[f"score/{kind.name.lower()}"] = [value if value == value else None for value in values]
        return columns

    def check_content_probe(self) -> None:
        """Refuses to start when the discriminator does not read content (`algorithm.min_content_probe`)."""
        minimum = self.config.algorithm.min_content_probe
        if minimum is None:
            return
        found = self.probe.run()
        for kind in KINDS[self.config.discriminator.view]:
            name = kind.name.lower()
            value = found.get(f"{name}/content_probe")
            if value is None:
                raise PrismError(
                    f"there is a gate for the content probe of {name}, and nothing to measure it on",
                    where="algorithm.min_content_probe, data.validation",
                    remedy="give held-out records a `response` and a `probe_response`, or set algorithm.min_content_probe=null",
                )
            if not (value >= minimum and math.isfinite(found[f"{name}/content_probe_margin"])):
                raise PrismError(
                    f"the discriminator's content probe is {value:.3f} for {name}, the gate is {minimum}",
                    where="algorithm.min_content_probe",
                    remedy="warm it up longer, on pairs whose teacher and student write in one style; or lower the gate",
                )

    def run_validation(self) -> dict[str, float]:
        """The content probe, and the policy's accuracy on held-out prompts where the answers are known."""
        metrics = {f"discriminator/{name}": value for name, value in self.probe.run().items()}
        self.begun.update_weights()
        return {**metrics, **self.held_out.accuracy(self.config.rollout)}

    def state_dict(self) -> dict[str, Any]:
        return self.begun.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.begun.load_state_dict(state)


def run(config: AlignConfig) -> None:
    """The `align` command."""
    validate(config)
    with (
        Grader(config.reward) as grader,
        session(config.parallel, config.runtime) as runtime,
        StageLoop("align", config, runtime) as loop,
    ):
        trainer = AlignTrainer(config, runtime, loop, grader)
        with closing(trainer.sampler):
            trainer.fit()
