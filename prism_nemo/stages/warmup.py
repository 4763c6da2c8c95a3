"""Discriminator warm-up: Bradley-Terry on teacher/student pairs, one perception and one reasoning comparison each.

prism-nemo warmup discriminator.path=Qwen3-VL-2B-Instruct data.train=pairs.jsonl experiment.dir=runs/warmup
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prism_nemo.config.discriminator import TRAINED_WITH, trained_with
from prism_nemo.config.schema import WarmupConfig
from prism_nemo.config.validate import validate
from prism_nemo.data.chat import ChatEncoder
from prism_nemo.data.open import open_stream
from prism_nemo.data.records import Record
from prism_nemo.data.segments import response_segments
from prism_nemo.engine.runtime import Runtime, session
from prism_nemo.models.discriminator import DiscriminatorModel
from prism_nemo.packing.groups import without_images
from prism_nemo.stages.comparisons import TEACHER, Comparison, ComparisonBatch
from prism_nemo.stages.loop import StageLoop
from prism_nemo.stages.probe import ContentProbe


class WarmupTrainer:
    """One optimizer step per global batch of pairs."""

    def __init__(self, config: WarmupConfig, runtime: Runtime, loop: StageLoop) -> None:
        self.config = config
        self.runtime = runtime
        self.loop = loop
        self.discriminator = DiscriminatorModel(config.discriminator, config.parallel, runtime, seed=config.runtime.seed)
        for chunk in self.discriminator.chunks:
            chunk.head_dropout = config.discriminator.head_dropout
        self.discriminator.hf_config = {**self.discriminator.hf_config, TRAINED_WITH: trained_with(config.discriminator)}
        self.discriminator.build_optimizer(config.optimizer, config.trainer.max_steps)
        self.models = {"discriminator": self.discriminator}
        self.encoder = ChatEncoder.from_directory(self.discriminator.assets, config.data, image_root=None)
        self.stream = open_stream(config, self.encode, required=("response", "student_response"))
        self.probe = ContentProbe(self.discriminator, self.encoder, config, runtime)

    def encode(self, record: Record) -> Comparison:
        """One pair: the teacher's segments and the student's, made by the same function."""
        assert record.response is not None and record.student_response is not None
        prompt = self.encoder.encode_prompt(record)
        view = self.config.discriminator.view
        return Comparison(
            prompt if self.config.discriminator.use_images else without_images(prompt),
            teacher=response_segments(record.response, self.encoder, view, sample=TEACHER),
            students=(response_segments(record.student_response, self.encoder, view, sample=0),),
        )

    def fit(self) -> None:
        self.discriminator.prepare_for_training()
        for step in self.loop.steps(self):
            samples = self.loop.next_batch(self.stream)
            batch = self.batch([comparison for _, comparison in samples])

            self.discriminator.prepare_for_training_step()
            self.discriminator.start_batch(batch.rows)
            loss, metrics = self.discriminator.get_loss_and_metrics(batch.training_batch, forward_only=False)
            self.discriminator.finish_training_step()
            update = self.discriminator.optimizer_step(step)

            self.loop.guard(update.applied, "the gradient", [record.id for record, _ in samples], at_fault=update.at_fault)
            self.loop.end_step(
                {
                    "loss": loss,
                    **metrics,
                    **self.discriminator.router_metrics(),
                    "grad_norm": update.grad_norm,
                    "learning_rate": update.learning_rate,
                }
            )
        self.discriminator.finish_training()

    def batch(self, comparisons: Sequence[Comparison]) -> ComparisonBatch:
        """The pairs as one batch, each student's segments numbered by its pair."""
        numbered = [comparison.numbered(index) for index, comparison in enumerate(comparisons)]
        return ComparisonBatch(
            numbered, len(numbered), self.config.discriminator, self.runtime, max_tokens=self.config.trainer.max_tokens_per_row
        )

    def run_validation(self) -> dict[str, float]:
        """The content probe on held-out prompts."""
        return self.probe.run()

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self.stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])


def run(config: WarmupConfig) -> None:
    """The `warmup` command."""
    validate(config)
    with session(config.parallel, config.runtime) as runtime, StageLoop("warmup", config, runtime) as loop:
        WarmupTrainer(config, runtime, loop).fit()
