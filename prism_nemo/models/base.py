"""What the policy and the discriminator share: a wrapped module, its optimizer, and NeMo-Aligner's training-step methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from prism_nemo.config.schema import OptimizerConfig, ParallelConfig
from prism_nemo.convert.hf import copy_assets
from prism_nemo.engine.optimizer import ModelOptimizer, StepResult, wrap_data_parallel
from prism_nemo.engine.runtime import Runtime
from prism_nemo.engine.step import LossFunction, reduce_loss_and_metrics, run_rows
from prism_nemo.models.qwen3_vl.model import Qwen3VLModel
from prism_nemo.packing.rows import PackedRow


@dataclass(frozen=True, eq=False)
class TrainingBatch:
    """One optimizer step's data of one data-parallel rank.

    `loss(row, output)` takes what the model's `forward_row` returned for a row, and returns the row's part of the loss, already
    divided by the counts of the **global** batch, and metric sums.
    """

    rows: Sequence[PackedRow]
    loss: LossFunction


class TrainableModel:
    """NeMo-Aligner's `SupervisedInterface` and `Inferrable` over packed rows. Subclasses say what a row's output is."""

    name: str  # the model's folder in a checkpoint

    def __init__(
        self, module: Qwen3VLModel, hf_config: Mapping[str, Any], assets: Path, parallel: ParallelConfig, runtime: Runtime
    ) -> None:
        self.hf_config = hf_config
        self.assets = assets
        self.parallel = parallel
        self.runtime = runtime
        module.to(runtime.device)
        self.ddp = wrap_data_parallel(module, parallel)
        self._optimizer: ModelOptimizer | None = None

    @property
    def optimizer(self) -> ModelOptimizer | None:
        return self._optimizer

    @property
    def module(self) -> Qwen3VLModel:
        return self.ddp.module

    def forward_row(self, module: torch.nn.Module, row: PackedRow) -> Any:
        raise NotImplementedError

    def save_assets(self, directory: Path) -> None:
        """config.json of the model as it is now, tokenizer and processor of the model it came from."""
        copy_assets(self.assets, directory, config=self.hf_config, dtype=self.module.config.params_dtype)

    def build_optimizer(self, config: OptimizerConfig, max_steps: int) -> None:
        self._optimizer = ModelOptimizer(self.ddp, config, self.parallel, max_steps)

    # SupervisedInterface

    def prepare_for_training(self) -> None:
        self.module.train()

    def finish_training(self) -> None:
        self.module.eval()

    def prepare_for_training_step(self) -> None:
        """Zeroes the gradients."""
        assert self._optimizer is not None, "build_optimizer comes first"
        self._optimizer.zero_grad()

    def get_loss_and_metrics(self, batch: TrainingBatch, forward_only: bool) -> tuple[float, dict[str, float]]:
        """Loss and metrics of the global batch, the same on every rank; unless `forward_only`, gradients are accumulated."""
        results = run_rows(self.ddp, batch.rows, self.forward_row, batch.loss, self.runtime, forward_only=forward_only)
        return reduce_loss_and_metrics(results, self.runtime)

    def finish_training_step(self) -> None:
        """Reduces the gradients over ranks."""
        assert self._optimizer is not None, "build_optimizer comes first"
        self._optimizer.finalize_gradients()

    def optimizer_step(self, step: int) -> StepResult:
        """Clips and applies the gradients of step `step` (from 0), unless they are not finite."""
        assert self._optimizer is not None, "build_optimizer comes first"
        return self._optimizer.step(step)

    def prepare_for_validation_step(self) -> None:
        self.module.eval()

    def finish_validation_step(self) -> None:
        self.module.train()

    # Inferrable

    def prepare_for_inference(self) -> None:
        self.module.eval()

    def finish_inference(self) -> None:
        self.module.train()

    def infer(self, rows: Sequence[PackedRow]) -> list[Any]:
        """`forward_row` of every row, without gradients, in evaluation mode."""
        with self.inference_mode():
            return run_rows(self.ddp, rows, self.forward_row, None, self.runtime, forward_only=True)

    @contextmanager
    def inference_mode(self) -> Iterator[None]:
        """Evaluation mode without gradients; the mode is restored."""
        training = self.module.training
        self.prepare_for_inference()
        try:
            with torch.no_grad():
                yield
        finally:
            self.module.train(training)


def freeze(module: torch.nn.Module) -> None:
    """The module's parameters get no gradient and no optimizer state."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
