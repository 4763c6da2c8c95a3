"""In a child: an all-reduce among a node's ranks, and among all."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from prism_nemo.doctor.probe import say_at

_MEGABYTES = {"nccl": 256, "gloo": 8}
_REPEATS = 5


def all_reduce(
    rank: int, nodes: list[list[int]], address: str, port: int, device_index: int | None, limit: float
) -> dict[str, Any]:
    """{"backend", "node": {"ranks", "right", "gb_per_second"}, "all": the same}; a scope of one rank is None.

    nodes          the ranks of every node
    address, port  where the first rank waits for the others
    device_index   of this rank's GPU; None: the CPU, over gloo
    limit          seconds after which a collective gives up

    The rate is of the data that a rank sends: 2 (n - 1) / n times the buffer, over the time.
    """
    say_at("importing torch")
    import torch
    import torch.distributed as dist

    backend = "gloo" if device_index is None else "nccl"
    device = torch.device("cpu" if device_index is None else f"cuda:{device_index}")
    if device_index is not None:
        torch.cuda.set_device(device)
    world_size = sum(map(len, nodes))
    say_at(f"meeting the others at {address} port {port}")
    timeout = timedelta(seconds=limit)
    store = dist.TCPStore(address, port, world_size, is_master=rank == 0, timeout=timeout)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
    groups = [dist.new_group(ranks, timeout=timeout) for ranks in nodes if len(nodes) > 1]
    say_at("in the all-reduce of this node")
    own = next(number for number, ranks in enumerate(nodes) if rank in ranks)
    node = _measure(nodes[own], groups[own] if groups else None, device, backend)
    say_at("in the all-reduce of all nodes")
    everybody = _measure(list(range(world_size)), None, device, backend) if len(nodes) > 1 else None
    return {"backend": backend, "node": node, "all": everybody}


def _measure(ranks: list[int], group: Any, device: Any, backend: str) -> dict[str, Any] | None:
    import torch
    import torch.distributed as dist

    if len(ranks) == 1:
        return None
    # Whole numbers whose sums fp32 holds exactly, up to 9,000 ranks; other ones in every place.
    numbers = torch.arange(_MEGABYTES[backend] << 18, device=device, dtype=torch.int32) % 251
    wanted = (numbers * sum(rank % 7 + 1 for rank in ranks)).float()
    own = (numbers * (dist.get_rank() % 7 + 1)).float()
    buffer = own.clone()
    dist.all_reduce(buffer, group=group)
    right = bool(torch.equal(buffer, wanted))
    seconds = []
    for _ in range(_REPEATS):
        buffer.copy_(own)
        _synchronize(device)
        began = time.perf_counter()
        dist.all_reduce(buffer, group=group)
        _synchronize(device)
        seconds.append(time.perf_counter() - began)
        right = right and bool(torch.equal(buffer, wanted))
    sent = 2 * (len(ranks) - 1) / len(ranks) * buffer.numel() * buffer.element_size()
    return {"ranks": len(ranks), "right": right, "gb_per_second": sent / min(seconds) / 1e9}


def _synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
