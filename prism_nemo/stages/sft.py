"""Supervised fine-tuning: cross-entropy on the response tokens of demonstrations.

prism-nemo sft model.path=Qwen3-VL-4B-Instruct data.train=demonstrations.jsonl experiment.dir=runs/sft
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from prism_nemo.algorithms.metrics import MetricSums, mean_of
from prism_nemo.config.schema import SFTConfig
from prism_nemo.config.validate import validate
from prism_nemo.data.chat import ChatEncoder
from prism_nemo.data.open import open_stream
from prism_nemo.data.records import Record
from prism_nemo.engine.runtime import Runtime, session
from prism_nemo.evaluation.held_out import open_held_out
from prism_nemo.models.base import TrainingBatch
from prism_nemo.models.policy import PolicyModel, PolicyOutput
from prism_nemo.packing.groups import Group, Segment
from prism_nemo.packing.rows import PackedRow, pack_rows
from prism_nemo.stages.loop import StageLoop


class SFTTrainer:
    """One optimizer step per global batch of demonstrations, packed into rows."""

    def __init__(self, config: SFTConfig, runtime: Runtime, loop: StageLoop) -> None:
        self.config = config
        self.runtime = runtime
        self.loop = loop
        self.policy = PolicyModel(config.model, config.parallel, runtime)
        self.policy.build_optimizer(config.optimizer, config.trainer.max_steps)
        self.models = {"policy": self.policy}
        self.encoder = ChatEncoder.from_directory(self.policy.assets, config.data, image_root=None)
        self.stream = open_stream(config, self.encode, required=("response",))
        self.held_out = open_held_out(
            config.data, self.encode, runtime, required=("response",), limit=config.trainer.limit_val_samples
        )

    def encode(self, record: Record) -> Group:
        """One demonstration: its prompt, and the response as the only segment."""
        assert record.response is not None
        return Group(self.encoder.encode_prompt(record), (Segment(self.encoder.encode_response(record.response), sample=0),))

    def fit(self) -> None:
        self.policy.prepare_for_training()
        for step in self.loop.steps(self):
            samples = self.loop.next_batch(self.stream)
            batch = self.batch([group for _, group in samples])

            self.policy.prepare_for_training_step()
            loss, metrics = self.policy.get_loss_and_metrics(batch, forward_only=False)
            self.policy.finish_training_step()
            update = self.policy.optimizer_step(step)

            self.loop.guard(update.applied, "the gradient", [record.id for record, _ in samples], at_fault=update.at_fault)
            self.loop.end_step({"loss": loss, **metrics, "grad_norm": update.grad_norm, "learning_rate": update.learning_rate})
        self.policy.finish_training()

    def run_validation(self) -> dict[str, float]:
        """Loss on held-out demonstrations; nothing without a validation file."""
        if not self.held_out.total:
            return {}
        batch = self.batch([self.encode(record) for record in self.held_out.mine])
        with self.policy.inference_mode():
            loss, metrics = self.policy.get_loss_and_metrics(batch, forward_only=True)
        return {"loss": loss, **metrics}

    def batch(self, groups: Sequence[Group]) -> TrainingBatch:
        """Rows, and their loss over the tokens of the global batch."""
        rows = pack_rows(groups, max_tokens=self.config.trainer.max_tokens_per_row, pad_multiple=self.runtime.row_multiple)
        tokens = torch.tensor([float(sum(row.num_labels for row in rows))], dtype=torch.float64)
        global_tokens = max(1.0, float(self.runtime.sum_over_data_parallel(tokens)))
        return TrainingBatch(rows, partial(cross_entropy, global_tokens=global_tokens))

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self.stream.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.stream.load_state_dict(state["stream"])


def cross_entropy(row: PackedRow, output: PolicyOutput, *, global_tokens: float) -> tuple[torch.Tensor, MetricSums]:
    """`-sum log p(label) / global_tokens` of one row."""
    metrics: MetricSums = {"label_probability": mean_of(output.log_probs.detach().exp())}
    if output.entropy is not None:
        metrics["entropy"] = mean_of(output.entropy)
    return -output.log_probs.sum() / global_tokens, metrics


def run(config: SFTConfig) -> None:
    """The `sft` command."""
    validate(config)
    with session(config.parallel, config.runtime) as runtime, StageLoop("sft", config, runtime) as loop:
        SFTTrainer(config, runtime, loop).fit()
