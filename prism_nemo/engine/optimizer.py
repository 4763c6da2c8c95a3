"""Megatron's DDP and AdamW around a model, one guarded step at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import MegatronModule

from prism_nemo.config.enums import DecayStyle
from prism_nemo.config.schema import OptimizerConfig, ParallelConfig
from prism_nemo.engine.chunks import chunks_of


def wrap_data_parallel(module: MegatronModule, parallel: ParallelConfig) -> DistributedDataParallel:
    """The module (one chunk) with gradient buffers in fp32, summed (never averaged) over data-parallel ranks."""
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        average_in_collective=False,
    )
    return DistributedDataParallel(module.config, config, module)


def learning_rate(step: int, config: OptimizerConfig, max_steps: int) -> float:
    """The rate of optimizer step `step` (from 0): linear warm-up from 0, then constant, linear or cosine decay to `min_lr`."""
    warmup = config.lr_warmup_iters or round(config.lr_warmup_fraction * max_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.lr_decay_style == DecayStyle.constant:
        return config.lr
    progress = min(1.0, (step - warmup) / max(1, max_steps - warmup))
    remaining = 1.0 - progress if config.lr_decay_style == DecayStyle.linear else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.min_lr + (config.lr - config.min_lr) * remaining


def _set_with_own_step(part: DistributedOptimizer, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
    """megatron-core 0.16.1 looks for AdamW's step counters among a checkpoint's tensors; they are not there, and set already."""
    own = part._get_main_param_and_optimizer_states(model_param)
    steps = {"step": own["step"].clone()} if "step" in own else {}
    DistributedOptimizer._set_main_param_and_optimizer_states(part, model_param, {**steps, **tensors})


@dataclass(frozen=True)
class StepResult:
    """`applied` is false when the gradient was not finite; nothing was changed then. `at_fault`: this rank's own part was not."""

    applied: bool
    grad_norm: float
    learning_rate: float
    at_fault: bool = False


class ModelOptimizer:
    """AdamW with fp32 master weights and moments over a wrapped model; what is one-dimensional (biases, norms) does not decay."""

    def __init__(
        self,
        model: DistributedDataParallel | Sequence[DistributedDataParallel],
        config: OptimizerConfig,
        parallel: ParallelConfig,
        max_steps: int,
    ) -> None:
        """`model`: the wrapped module, or under interleaved pipelining all chunks of this rank."""
        self.config = config
        self.max_steps = max_steps
        self.chunks = list(chunks_of(model))
        self.num_updates = 0  # steps applied; with none there are no moments
        self._own_sum = torch.zeros(())  # of this rank's gradients before those of others came to them
        dtype = self.chunks[0].config.params_dtype
        self.optimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                min_lr=config.min_lr,
                weight_decay=config.weight_decay,
                adam_beta1=config.adam_beta1,
                adam_beta2=config.adam_beta2,
                adam_eps=config.adam_eps,
                clip_grad=config.clip_grad,
                bf16=dtype == torch.bfloat16,
                params_dtype=dtype,
                use_distributed_optimizer=parallel.use_distributed_optimizer,
            ),
            self.chunks,
        )

    def prepare_for_loading(self, updates: int) -> None:
        """Empty moments where there are none, which Megatron loads into, and step counters, which checkpoints do not hold."""
        for part in self.optimizer.chained_optimizers:
            part.init_state_fn(part.optimizer, part.config)
            if isinstance(part, DistributedOptimizer):
                part._set_main_param_and_optimizer_states = partial(_set_with_own_step, part)
        self.set_num_updates(updates)

    def start_anew(self) -> None:
        """As if no step had been taken from the weights that the model has now."""
        for part in self.optimizer.chained_optimizers:
            part.optimizer.state.clear()
        self.optimizer.reload_model_params()
        self.num_updates = 0

    def set_num_updates(self, updates: int) -> None:
        """Sets the step counters: torch's AdamW has a tensor for each parameter (a shared one would advance once per parameter),
        fused ones a number for each group.
        """
        self.num_updates = updates
        for part in self.optimizer.chained_optimizers:
            if isinstance(part.optimizer, torch.optim.Optimizer) and not hasattr(part.optimizer, "multi_tensor_adam"):
                for state in part.optimizer.state.values():
                    state["step"] = torch.tensor(float(updates))
            for group in part.optimizer.param_groups:
                if "step" in group:
                    group["step"] = updates

    def zero_grad(self) -> None:
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def finalize_gradients(self) -> None:
        """Sums gradients over data-parallel ranks, and over tensor-parallel ones where a parameter is replicated."""
        buffers = [buffer for chunk in self.chunks for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
        # Not finite where a part is not. Stays on the device: only a step that fails looks at it.
        self._own_sum = torch.stack([buffer.grad_data.sum(dtype=torch.float32) for buffer in buffers]).sum()
        finalize_model_grads(self.chunks)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The state is where the model is; with `cpu_offload` it comes there for as long as this lasts."""
        if not self.config.cpu_offload:
            yield
            return
        for part in self.optimizer.chained_optimizers:
            part.restore_from_cpu()
        try:
            yield
        finally:
            for part in self.optimizer.chained_optimizers:
                part.offload_to_cpu()

    def step(self, step: int) -> StepResult:
        """Clips by the global norm and updates; with a non-finite norm it leaves everything as it is."""
        with self.on_device():
            return self._step(step)

    def _step(self, step: int) -> StepResult:
        rate = learning_rate(step, self.config, self.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_mult", 1.0)
            # Megatron marks biases and norms with 0 and leaves it to its scheduler, which is not used here, to apply the mark.
            group["weight_decay"] = self.config.weight_decay * group.get("wd_mult", 1.0)
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.get_grad_norm())
        if not math.isfinite(norm):
            return StepResult(False, norm, rate, at_fault=not bool(self._own_sum.isfinite()))
        if self.config.clip_grad > 0:
            for part in self.optimizer.chained_optimizers:
                parameters = part.get_parameters()
                if parameters:
                    clip_grad_by_total_norm_fp32(parameters, max_norm=self.config.clip_grad, total_norm=norm)
        self.optimizer.step_with_ready_grads()
        self.num_updates += 1
        return StepResult(True, norm, rate)
