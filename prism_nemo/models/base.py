"""What the policy and the discriminator share: a wrapped module, its optimizer, and NeMo-Aligner's training-step methods."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import torch

from prism_nemo.config.schema import OptimizerConfig, ParallelConfig
from prism_nemo.convert.hf import copy_assets
from prism_nemo.engine.optimizer import ModelOptimizer, StepResult, wrap_data_parallel
from prism_nemo.engine.runtime import Runtime
from prism_nemo.engine.step import LossFunction, reduce_loss_and_metrics, run_rows
from prism_nemo.models.qwen3_vl.model import Qwen3VLModel
from prism_nemo.packing.rows import PackedRow

Result = TypeVar("Result")


def in_own_layout(method: Callable[..., Result]) -> Callable[..., Result]:
    """A method of a model during which Megatron sees the process groups that this model is cut over."""

    @wraps(method)
    def within(self: Any, *args: Any, **kwargs: Any) -> Result:
        with self.runtime.layout.active():
            return method(self, *args, **kwargs)

    return within


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
        self,
        chunks: Sequence[Qwen3VLModel],
        hf_config: Mapping[str, Any],
        assets: Path,
        parallel: ParallelConfig,
        runtime: Runtime,
    ) -> None:
        """`chunks`: the whole model, or this pipeline rank's part of it (several parts when they are interleaved)."""
        self.hf_config = hf_config
        self.assets = assets
        self.parallel = parallel
        self.runtime = runtime
        with runtime.layout.active():
            self.ddp = [wrap_data_parallel(chunk.to(runtime.device), parallel) for chunk in chunks]
        self._optimizer: ModelOptimizer | None = None

    @property
    def optimizer(self) -> ModelOptimizer | None:
        return self._optimizer

    @property
    def chunks(self) -> list[Qwen3VLModel]:
        return [wrapped.module for wrapped in self.ddp]

    @property
    def module(self) -> Qwen3VLModel:
        """The first chunk: the only one, unless the pipeline is interleaved."""
        return self.ddp[0].module

    def forward_row(self, module: torch.nn.Module, row: PackedRow) -> Any:
        raise NotImplementedError

    def save_assets(self, directory: Path) -> None:
        """config.json of the model as it is now, tokenizer and processor of the model it came from."""
        copy_assets(self.assets, directory, config=self.hf_config, dtype=self.module.config.params_dtype)

    @in_own_layout
    def build_optimizer(self, config: OptimizerConfig, max_steps: int) -> None:
        self._optimizer = ModelOptimizer(self.ddp, config, self.parallel, max_steps)

    # SupervisedInterface

    def prepare_for_training(self) -> None:
        self._train(True)

    def finish_training(self) -> None:
        self._train(False)

    @in_own_layout
    def prepare_for_training_step(self) -> None:
        """Zeroes the gradients."""
        assert self._optimizer is not None, "build_optimizer comes first"
        self._optimizer.zero_grad()

    @in_own_layout
    def get_loss_and_metrics(self, batch: TrainingBatch, forward_only: bool) -> tuple[float, dict[str, float]]:
        """Loss and metrics of the global batch, the same on every rank; unless `forward_only`, gradients are accumulated."""
        results = run_rows(self.ddp, batch.rows, self.forward_row, batch.loss, self.runtime, forward_only=forward_only)
        return reduce_loss_and_metrics(results, self.runtime)

    @in_own_layout
    def finish_training_step(self) -> None:
        """Reduces the gradients over ranks."""
        assert self._optimizer is not None, "build_optimizer comes first"
        self._optimizer.finalize_gradients()

    @in_own_layout
    def optimizer_step(self, step: int) -> StepResult:
        """Clips and applies the gradients of step `step` (from 0), unless they are not finite."""
        assert self._optimizer is not None, "build_optimizer comes first"
        return self._optimizer.step(step)

    def prepare_for_validation_step(self) -> None:
        self._train(False)

    def finish_validation_step(self) -> None:
        self._train(True)

    # Inferrable

    def prepare_for_inference(self) -> None:
        self._train(False)

    def finish_inference(self) -> None:
        self._train(True)

    def _train(self, mode: bool) -> None:
        for chunk in self.chunks:
            chunk.train(mode)

    @in_own_layout
    def infer(self, rows: Sequence[PackedRow]) -> list[Any]:
        """`forward_row` of every row, without gradients, in evaluation mode; on every pipeline stage."""
        with self.inference_mode():
            outputs = run_rows(self.ddp, rows, self.forward_row, None, self.runtime, forward_only=True)
        outputs = self.runtime.broadcast_from_last_stage(outputs)
        assert isinstance(outputs, list)
        return outputs

    @contextmanager
    def inference_mode(self) -> Iterator[None]:
        """Evaluation mode without gradients; the mode is restored."""
        training = self.module.training
        self.prepare_for_inference()
        try:
            with torch.no_grad():
                yield
        finally:
            self._train(training)


def build_chunks(build: Callable[[int | None], Qwen3VLModel], parallel: ParallelConfig) -> list[Qwen3VLModel]:
    """This rank's part of a model: `build(vp_stage)` for every interleaved chunk, or once with None."""
    chunks = parallel.virtual_pipeline_model_parallel_size
    return [build(None)] if chunks is None else [build(index) for index in range(chunks)]


def freeze(module: torch.nn.Module) -> None:
    """The module's parameters get no gradient and no optimizer state."""
    for parameter in module.parameters():
        parameter.requires_grad_(False)
