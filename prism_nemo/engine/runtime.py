"""Process, device, process groups, seeds: the one place that knows about them."""

from __future__ import annotations

import datetime
import math
import os
import pickle
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from prism_nemo.config.enums import Device
from prism_nemo.config.schema import ParallelConfig, RuntimeConfig
from prism_nemo.engine import layouts, watch
from prism_nemo.engine.layouts import Layout
from prism_nemo.errors import ConfigError, LayoutError, PrismError

T = TypeVar("T")


@dataclass
class RowLengths:
    """What packed rows are padded to: every rank that shares a row gets a slice, and FP8 wants slices of certain lengths."""

    slices: int  # ranks that share a row's tokens
    multiple: int  # of every row's length, in tokens

    @classmethod
    def of(cls, parallel: ParallelConfig) -> RowLengths:
        """Context-parallel ranks take two pieces of a row each."""
        tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
        return cls(tp * cp, tp * (2 * cp if cp > 1 else 1))

    def require(self, tokens_per_rank: int) -> None:
        """From now on a slice is also a multiple of this."""
        self.multiple = math.lcm(self.multiple, self.slices * tokens_per_rank)


@dataclass(frozen=True)
class Runtime:
    """This process's place in one layout. Data-parallel ranks hold different samples; all others hold parts of the same model."""

    layout: Layout
    device: torch.device
    rank: int
    world_size: int
    data_parallel_rank: int
    data_parallel_size: int
    row_lengths: RowLengths

    @property
    def row_multiple(self) -> int:
        """Packed rows are padded to a multiple of this."""
        return self.row_lengths.multiple

    def require_tokens_per_rank(self, tokens: int) -> None:
        """A model that runs here needs every rank's slice of a row to be a multiple of this; asked before rows are packed."""
        self.row_lengths.require(tokens)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum_over_data_parallel(self, values: Tensor) -> Tensor:
        """Element-wise sum over data-parallel ranks (float64 recommended); the same on every rank."""
        if self.data_parallel_size > 1:
            values = values.to(self.device)
            dist.all_reduce(values, group=self._data_parallel_group(gloo=False))
        return values

    def max_over_data_parallel(self, value: int) -> int:
        if self.data_parallel_size == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._data_parallel_group(gloo=False))
        return int(tensor)

    def max_over_all(self, value: int) -> int:
        """The largest value over all ranks."""
        if self.world_size == 1:
            return value
        tensor = torch.tensor(value, device=self.device)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor)

    def gather_objects(self, value: Any) -> list[Any]:
        """One value per data-parallel rank, in rank order, on every rank."""
        if self.data_parallel_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.data_parallel_size
        dist.all_gather_object(gathered, value, group=self._data_parallel_group(gloo=True))
        return gathered

    def gather_objects_over_all(self, value: Any) -> list[Any]:
        """One value per rank, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def exchange_objects(self, outgoing: list[Any]) -> list[Any]:
        """`outgoing[r]` goes to rank r; what every rank sent here, in rank order."""
        if self.world_size == 1:
            return outgoing
        parcels = [torch.frombuffer(bytearray(pickle.dumps(item)), dtype=torch.uint8) for item in outgoing]
        sizes = torch.tensor([parcel.numel() for parcel in parcels], device=self.device)
        arriving = torch.empty_like(sizes)
        dist.all_to_all_single(arriving, sizes)
        received = torch.empty(int(arriving.sum()), dtype=torch.uint8, device=self.device)
        dist.all_to_all_single(received, torch.cat(parcels).to(self.device), arriving.tolist(), sizes.tolist())
        return [pickle.loads(parcel.numpy().tobytes()) for parcel in received.cpu().split(arriving.tolist())]

    def broadcast_from_last_stage(self, value: Any) -> Any:
        """The last pipeline stage's value on every stage."""
        with self.layout.active():
            stages = parallel_state.get_pipeline_model_parallel_group()
        if stages.size() == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, group_src=stages.size() - 1, group=stages)
        return box[0]

    def _data_parallel_group(self, *, gloo: bool) -> dist.ProcessGroup:
        with self.layout.active():
            if gloo:
                return parallel_state.get_data_parallel_group_gloo(with_context_parallel=False)
            return parallel_state.get_data_parallel_group(with_context_parallel=False)

    def broadcast_from_main(self, value: Any) -> Any:
        """The main rank's value on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    @property
    def is_leader(self) -> bool:
        """Whether this rank speaks for those that hold one model: it is the one in the main rank's data-parallel group."""
        return bool(self.gather_objects(self.rank)[0] == 0)

    def share_from_leader(self, make: Callable[[], T]) -> T:
        """What `make()` returns on the leader of the ranks that hold one model, on all of them; the others do not call it.

        A PrismError that it raises anywhere is raised on every rank. A collective over all ranks.
        """
        if self.world_size == 1:
            return make()
        made: list[T | None] = [None]
        problem: PrismError | None = None
        if self.is_leader:
            try:
                made = [make()]
            except PrismError as error:
                problem = error
        for found in self.gather_objects_over_all(problem):
            if found is not None:
                raise found
        group = self.layout.model_group
        if group is not None:
            dist.broadcast_object_list(made, group=group, group_src=0)
        return cast(T, made[0])

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def cuda_capability(device: torch.device) -> tuple[tuple[int, int], str | None]:
    """The compute capability of a CUDA device, and the CUDA version that torch was built for."""
    return torch.cuda.get_device_capability(device), torch.version.cuda


def on_wire(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The tensor where the group's backend can send it from: NCCL sends from a GPU, and models are built on the CPU."""
    return tensor.cuda() if dist.get_backend(group) == "nccl" else tensor


def resolve_device(device: Device) -> torch.device:
    """`auto` is CUDA where there is one. Raises ConfigError when CUDA is asked for and absent."""
    if device == Device.cuda and not torch.cuda.is_available():
        raise ConfigError("CUDA was asked for, but torch finds no CUDA device", where="runtime.device", remedy="use auto or cpu")
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if device == Device.cpu:
        raise ConfigError(
            "the CPU was asked for, but torch sees a CUDA device, and Megatron then uses it",
            where="runtime.device",
            remedy="start the process with CUDA_VISIBLE_DEVICES= (the prism-nemo command does that by itself)",
        )
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def initialize(parallel: ParallelConfig, config: RuntimeConfig) -> Runtime:
    """Joins the ranks (those of torchrun, or this process alone), cuts them into groups and seeds every generator.

    Calling it again with the same layout only seeds anew; another one becomes the active one. Raises LayoutError when the ranks
    do not divide.
    """
    device = resolve_device(config.device)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    if not dist.is_initialized():
        _join(device, datetime.timedelta(minutes=config.distributed_timeout_minutes))
    world_size = dist.get_world_size()
    model_parallel = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    if world_size % model_parallel:
        raise LayoutError(
            f"{world_size} ranks do not divide by tensor x pipeline x context parallel size {model_parallel}",
            where="parallel",
            remedy=f"start a multiple of {model_parallel} ranks (torchrun --nproc-per-node), or change the sizes",
        )
    layout = layouts.use(parallel, config.distributed_timeout_minutes)
    seed_everything(config.seed)
    return _place(layout, parallel, device)


def beside(runtime: Runtime, parallel: ParallelConfig, config: RuntimeConfig) -> Runtime:
    """This process's place in another layout over the same ranks, for a model that is cut differently; `runtime` stays active.

    The generators are seeded anew, unless it is the same layout. A collective.
    """
    if layouts.sizes_of(parallel) == runtime.layout.sizes:
        return runtime
    with runtime.layout.active():
        layout = layouts.use(parallel, config.distributed_timeout_minutes)
        seed_everything(config.seed)
        other = _place(layout, parallel, runtime.device)
    seed_everything(config.seed)
    return other


def _place(layout: Layout, parallel: ParallelConfig, device: torch.device) -> Runtime:
    """Reads this process's place off the active layout."""
    return Runtime(
        layout=layout,
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        row_lengths=RowLengths.of(parallel),
    )


def _join(device: torch.device, timeout: datetime.timedelta) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:
        try:
            dist.init_process_group(backend, timeout=timeout)
        except dist.DistError as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise watch.RankLost(
                f"rank {os.environ['RANK']} has waited {timeout} in vain for all {os.environ.get('WORLD_SIZE')} ranks to meet at "
                f"{where}: one has died before or was never started ({next(iter(str(error).splitlines()), '')})"
            ) from error
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)


def seed_everything(seed: int) -> None:
    """Seeds Python, NumPy, torch and Megatron's tensor-parallel generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def rng_state() -> dict[str, Any]:
    """The state of every generator, in types that `torch.load(weights_only=True)` reads back."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "tracker": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restores what `rng_state` returned."""
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["tracker"])


def shutdown() -> None:
    """Leaves the process groups; safe to call twice."""
    layouts.forget_all()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def session(parallel: ParallelConfig, config: RuntimeConfig) -> Iterator[Runtime]:
    """`initialize`, and on the way out of the outermost session `shutdown`. The outermost one watches the other ranks meanwhile.

    Raises RankLost where a collective fails because of another rank.
    """
    if dist.is_initialized():
        yield initialize(parallel, config)
        return
    _join(resolve_device(config.device), datetime.timedelta(minutes=config.distributed_timeout_minutes))
    watch.begin(config.lost_rank_seconds, config.stuck_rank_seconds)  # first: to cut the ranks into groups takes all of them
    try:
        yield initialize(parallel, config)
    except BaseException as error:
        cause = watch.explain(error)
        if cause is error:
            raise
        raise cause from error
    finally:
        watch.end()
        shutdown()
