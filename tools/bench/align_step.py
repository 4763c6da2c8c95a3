"""What one alignment step costs here and done the plain way, on the same weights and the same rollouts. Prints JSON.

    OMP_NUM_THREADS=1 python tools/bench/align_step.py [--prompt-tokens 300] [--segment-tokens 60] [--rollouts 16] [--repeats 3]

Plain: every response with its own copy of the prompt and image, the teacher's two segments once per rollout, a scoring pass, a
second discriminator pass for the gradient, and a pass for the old log-probabilities: what the public PRISM code does. Ours: one
row per prompt, one discriminator pass, no old-log-probability pass. Both give the same gradients (the largest relative
difference is printed); rollout generation and optimizer steps are left out, they are the same. The model is the digits task's
with random weights, fp32.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import prism_nemo.engine  # noqa: F401  before megatron
from prism_nemo.algorithms.metrics import MetricSums
from prism_nemo.config.enums import Precision
from prism_nemo.config.schema import DiscriminatorConfig, ModelConfig, OptimizerConfig, ParallelConfig, RuntimeConfig
from prism_nemo.data.digits_model import write_base_model
from prism_nemo.engine.runtime import Runtime, session
from prism_nemo.models.base import TrainableModel, TrainingBatch
from prism_nemo.models.discriminator import DiscriminatorModel
from prism_nemo.models.policy import PolicyModel, PolicyOutput
from prism_nemo.packing.groups import EncodedPrompt, Group, Segment, SegmentKind
from prism_nemo.packing.positions import mrope_positions
from prism_nemo.packing.rows import PackedRow, make_row
from prism_nemo.stages.comparisons import TEACHER, Comparison, ComparisonBatch

VOCABULARY = range(8, 64)


def make_prompt(tokens: int, image_id: int, generator: torch.Generator) -> EncodedPrompt:
    """Random words behind one image of 16 merged tokens (8 x 8 patches)."""
    ids = torch.randint(VOCABULARY.start, VOCABULARY.stop, (tokens,), generator=generator)
    ids[3:19] = image_id
    mask = ids == image_id
    grid = torch.tensor([[1, 8, 8]])
    return EncodedPrompt(
        ids, mrope_positions(ids, mask, grid, spatial_merge_size=2), mask, torch.randn(64, 1536, generator=generator), grid
    )


def words(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(VOCABULARY.start, VOCABULARY.stop, (count,), generator=generator)


def policy_loss(row: PackedRow, output: PolicyOutput, *, advantages: Tensor, tokens: float) -> tuple[Tensor, MetricSums]:
    return -(advantages[row.sample_of_label] * output.log_probs).sum() / tokens, {}


class Step:
    """The passes of one alignment step over P prompts with n rollouts each, ours and the plain ones."""

    def __init__(self, arguments: argparse.Namespace, runtime: Runtime, directory: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        self.runtime, self.count = runtime, arguments.rollouts
        self.policy = PolicyModel(ModelConfig(path=str(directory), precision=Precision.fp32), ParallelConfig(), runtime)
        self.options = DiscriminatorConfig(path=str(directory), precision=Precision.fp32)
        self.discriminator = DiscriminatorModel(self.options, ParallelConfig(), runtime, seed=0)
        for model in (self.policy, self.discriminator):
            model.build_optimizer(OptimizerConfig(), 1)
            model.prepare_for_training()
        image_id = self.policy.module.shape.image_token_id
        self.prompts = [make_prompt(arguments.prompt_tokens, image_id, generator) for _ in range(arguments.prompts)]
        length, kinds = arguments.segment_tokens, (SegmentKind.PERCEPTION, SegmentKind.REASONING)
        self.responses = [words(2 * length, generator) for _ in range(arguments.prompts * self.count)]
        self.advantages = torch.randn(len(self.responses), generator=generator)
        self.comparisons = []
        for number, prompt in enumerate(self.prompts):
            teacher = tuple(Segment(words(length, generator), TEACHER, kind) for kind in kinds)
            students = tuple(
                tuple(
                    Segment(part, number * self.count + index, kind)
                    for part, kind in zip(response.split(length), kinds, strict=True)
                )
                for index, response in enumerate(self.responses[number * self.count : (number + 1) * self.count])
            )
            self.comparisons.append(Comparison(prompt, teacher, students))

    def policy_rows(self, *, plain: bool) -> list[PackedRow]:
        """One row a prompt with all its responses, or one sequence a response (micro-batches of one prompt's sequences)."""
        rows = []
        for number, prompt in enumerate(self.prompts):
            members = range(number * self.count, (number + 1) * self.count)
            segments = [Segment(self.responses[index], index) for index in members]
            groups = [Group(prompt, (segment,)) for segment in segments] if plain else [Group(prompt, tuple(segments))]
            rows.append(make_row(groups))
        return rows

    def game(self, *, plain: bool) -> ComparisonBatch:
        comparisons = self.comparisons
        if plain:  # the teacher's segments once per rollout, every segment with its own prompt
            comparisons = [replace(item, students=(student,)) for item in comparisons for student in item.students]
        batch = ComparisonBatch(comparisons, len(self.responses), self.options, self.runtime, max_tokens=1 << 30)
        if plain:
            batch.rows = [
                make_row(
                    [
                        _apart(segment, index, item)
                        for index, item in enumerate(comparisons[start : start + self.count], start)
                        for segment in (*item.teacher, *item.students[0])
                    ]
                )
                for start in range(0, len(comparisons), self.count)
            ]
        else:
            batch.rows = [
                make_row(
                    [
                        Group(
                            item.prompt,
                            tuple(replace(s, sample=TEACHER - index) for s in item.teacher)
                            + tuple(s for student in item.students for s in student),
                        )
                    ]
                )
                for index, item in enumerate(comparisons)
            ]
        return batch

    def ours(self) -> None:
        game = self.game(plain=False)
        self._train(self.discriminator, game.training_batch)
        self._train(self.policy, self._policy_batch(self.policy_rows(plain=False)))

    def plain(self) -> None:
        game = self.game(plain=True)
        self.discriminator.infer(game.rows)
        self._train(self.discriminator, game.training_batch)
        rows = self.policy_rows(plain=True)
        self.policy.infer(rows)
        self._train(self.policy, self._policy_batch(rows))

    def _policy_batch(self, rows: list[PackedRow]) -> TrainingBatch:
        tokens = float(sum(response.numel() for response in self.responses))
        return TrainingBatch(rows, partial(policy_loss, advantages=self.advantages, tokens=tokens))

    def _train(self, model: TrainableModel, batch: TrainingBatch) -> None:
        model.prepare_for_training_step()
        if isinstance(model, DiscriminatorModel):
            model.start_batch(batch.rows)
        model.get_loss_and_metrics(batch, forward_only=False)

    def gradients(self) -> list[Tensor]:
        return [p.main_grad.clone() for model in (self.policy, self.discriminator) for p in model.module.parameters()]


def _apart(segment: Segment, index: int, item: Comparison) -> Group:
    sample = TEACHER - index if segment.sample < 0 else segment.sample
    return Group(item.prompt, (replace(segment, sample=sample),))


def seconds(function: Callable[[], None]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--segment-tokens", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, session(ParallelConfig(), RuntimeConfig(num_threads=1)) as runtime:
        directory = Path(folder) / "model"
        write_base_model(directory, seed=0)
        step = Step(arguments, runtime, directory)
        # The router's balancing loss is per group: cutting groups apart changes it by design, so the comparison does without.
        step.options.moe_aux_loss_coeff = 0.0
        step.ours()
        ours = step.gradients()
        step.plain()
        pairs = zip(ours, step.gradients(), strict=True)
        difference = max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in pairs)
        times = {name: [] for name in ("ours", "plain")}
        for _ in range(arguments.repeats):  # side by side, so that a busy machine slows both
            times["ours"].append(seconds(step.ours))
            times["plain"].append(seconds(step.plain))
    best = {name: min(values) for name, values in times.items()}
    print(
        json.dumps(
            {
                **vars(arguments),
                "seconds_ours": round(best["ours"], 3),
                "seconds_plain": round(best["plain"], 3),
                "plain_over_ours": round(best["plain"] / best["ours"], 2),
                "largest_relative_gradient_difference": difference,
            }
        )
    )


if __name__ == "__main__":
    main()
