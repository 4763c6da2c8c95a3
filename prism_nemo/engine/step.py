"""Forward and backward over packed rows through Megatron's pipeline schedules, and the one place that scales losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from prism_nemo.algorithms.metrics import MetricSums, finalize, merge
from prism_nemo.engine.runtime import Runtime
from prism_nemo.packing.rows import PackedRow, make_row

Forward = Callable[[torch.nn.Module, PackedRow], Any]
LossFunction = Callable[[PackedRow, Any], tuple[Tensor, MetricSums]]


def scale_loss(loss: Tensor) -> Tensor:
    """The loss of one micro-batch as Megatron must see it: unchanged.

    Loss functions divide their sums by the **global** counts, so the batch's loss is the plain sum over micro-batches and
    data-parallel ranks. Megatron would divide by the number of micro-batches and average over ranks; `calculate_per_token_loss`
    in the models' configurations and the three-part return below turn both off, and no token count is handed to
    `finalize_model_grads`. Whatever scaling is ever needed belongs here.
    """
    return loss


def run_rows(
    model: Sequence[DistributedDataParallel],
    rows: Sequence[PackedRow],
    forward: Forward,
    loss_function: LossFunction | None,
    runtime: Runtime,
    *,
    forward_only: bool,
) -> list[Any]:
    """Runs every row as one micro-batch through this rank's chunks and, unless `forward_only`, accumulates gradients.

    Returns, on the last pipeline stage, one item per row: (loss, metrics) of `loss_function(row, output)`, or without a loss
    function the output of `forward(module, row)` itself. Ranks with fewer rows than others run empty ones, whose results are
    dropped, so that no rank misses a collective.
    """
    count = runtime.max_over_data_parallel(len(rows))
    if count == 0:
        return []
    if len(model) > 1:  # interleaved chunks take micro-batches in turns of as many as there are stages
        count += -count % model[0].module.config.pipeline_model_parallel_size
    width = model[0].module.shape.vision.patch_width
    padding = [make_row([], pad_multiple=runtime.row_multiple, patch_size=width) for _ in range(count - len(rows))]
    results = _schedule(
        model, [*rows, *padding], forward, loss_function, runtime.device, num_microbatches=count, forward_only=forward_only
    )
    return results[: len(rows)]


def _schedule(
    model: Sequence[DistributedDataParallel],
    rows: Sequence[PackedRow],
    forward: Forward,
    loss_function: LossFunction | None,
    device: torch.device,
    *,
    num_microbatches: int,
    forward_only: bool,
) -> list[Any]:
    def forward_step(iterator: Iterator[PackedRow], chunk: DistributedDataParallel) -> tuple[Any, Callable[..., Any]]:
        row = next(iterator).to(device)
        output = forward(chunk, row)
        if loss_function is None and chunk.module.post_process:  # Megatron wants a tensor, whatever is collected
            return torch.zeros((), device=device), lambda _, non_loss_data: output
        return output, partial(finish, row)

    def finish(row: PackedRow, output: Any) -> Any:
        assert loss_function is not None
        loss, metrics = loss_function(row, output)
        return scale_loss(loss), torch.zeros((), dtype=torch.int), (loss.detach(), metrics)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(rows) for _ in model],
        model=list(model),
        num_microbatches=num_microbatches,
        seq_length=1,  # rows have variable lengths: Megatron exchanges shapes
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=loss_function is None,
    )


def reduce_loss_and_metrics(results: Sequence[tuple[Tensor, MetricSums]], runtime: Runtime) -> tuple[float, dict[str, float]]:
    """Loss and metrics of the whole batch, the same on every rank: sums over rows and data-parallel ranks, then one division."""
    loss = 0.0
    sums: MetricSums = {}
    for row_loss, metrics in results:
        loss += float(row_loss)
        sums = merge(sums, {name: (float(total), float(count)) for name, (total, count) in metrics.items()})
    loss, sums = runtime.broadcast_from_last_stage((loss, sums))
    return sum(runtime.gather_objects(loss)), reduce_metrics(sums, runtime)


def reduce_metrics(sums: MetricSums, runtime: Runtime) -> dict[str, float]:
    """Metrics over all data-parallel ranks, the same on every rank. A collective."""
    merged: MetricSums = {}
    for rank_sums in runtime.gather_objects({name: (float(total), float(count)) for name, (total, count) in sums.items()}):
        merged = merge(merged, rank_sums)
    return finalize(merged)


def run_stages(chunks: Sequence[Any], run: Callable[[Any], Tensor], device: torch.device) -> Tensor | None:
    """One forward pass through all pipeline stages, one chunk after the other; the last chunk's output on the last stage.

    `run(chunk)` does a chunk's part; hidden states of any shape go from each to the next. Without gradients. A collective of the
    pipeline's ranks.
    """
    size, rank = parallel_state.get_pipeline_model_parallel_world_size(), parallel_state.get_pipeline_model_parallel_rank()
    if size == 1:
        return run(chunks[0])
    output = None
    for index, chunk in enumerate(chunks):
        for stage in range(size):
            if stage == rank:
                if not (index == 0 and stage == 0):
                    chunk.set_input_tensor(_receive(chunk.config.pipeline_dtype, device))
                output = run(chunk)
                if not (index == len(chunks) - 1 and stage == size - 1):
                    _send(output)
                    output = None
    return output


def _send(hidden: Tensor) -> None:
    following = parallel_state.get_pipeline_model_parallel_next_rank()
    dist.send(torch.tensor(hidden.shape, device=hidden.device), following)
    dist.send(hidden.contiguous(), following)


def _receive(dtype: torch.dtype, device: torch.device) -> Tensor:
    previous = parallel_state.get_pipeline_model_parallel_prev_rank()
    shape = torch.empty(3, dtype=torch.int64, device=device)
    dist.recv(shape, previous)
    hidden = torch.empty(shape.tolist(), dtype=dtype, device=device)
    dist.recv(hidden, previous)
    return hidden
