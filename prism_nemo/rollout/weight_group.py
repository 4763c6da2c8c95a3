"""A process group of a run and its rollout servers, over which the bytes of weights are broadcast.

It is apart from the groups that either side computes with: a store, a rendezvous and a backend of its own. The run is rank 0. On
CUDA it is NCCL, and bytes go from GPU to GPU; on a CPU it is gloo. What happens when a member dies or freezes is decided by who
waits for it: nothing here waits longer than it is told to, and a group that has failed once is of no use any more.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from prism_nemo.rollout.wire import WireError
from prism_nemo.waiting import waiting

_POLL_SECONDS = (5e-5, 2e-3)  # between looks at what is under way, longer each time


class GroupError(Exception):
    """The group could not be formed, or a broadcast did not come through."""


@dataclass(frozen=True)
class GroupInvitation:
    """What a server needs to know to join.

    The keys under which the members meet begin with `secret`, so that groups do not mix; who reaches the store can list them.
    """

    group_id: str
    secret: str
    backend: str  # nccl or gloo
    host: str  # of the run, as this server reaches it
    port: int
    rank: int
    size: int
    bucket_bytes: int
    seconds: float  # for all to join, and for a bucket

    def header(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, header: Any) -> GroupInvitation:
        """Raises WireError."""
        try:
            found = cls(**header)
        except TypeError as error:
            raise WireError(f"no invitation to a process group: {error}") from error
        texts = (found.group_id, found.secret, found.backend, found.host)
        numbers = (found.port, found.rank, found.size, found.bucket_bytes)
        if not all(type(text) is str for text in texts) or not all(type(number) is int for number in numbers):
            raise WireError("no invitation to a process group")
        in_range = 0 < found.port < 1 << 16 and 0 < found.rank < found.size and 0 < found.bucket_bytes < 1 << 40
        if not in_range or not isinstance(found.seconds, int | float) or not 0 < found.seconds < 1e6:
            raise WireError("no invitation to a process group")
        return found


def backend_of(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def identity_of(device: torch.device) -> str:
    """Of the device, across processes and machines: NCCL has no two ranks on one GPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else device.type


def libraries_of(device: torch.device) -> str:
    """What forms the group at this end. Different builds of torch or, on CUDA, of NCCL may not understand each other."""
    nccl = f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if device.type == "cuda" else ""
    return f"torch {torch.__version__}{nccl}"


class Rendezvous:
    """The run's store, where the members of one group meet. It listens where the servers can reach it, and no further."""

    def __init__(self, hosts: list[str], seconds: float) -> None:
        """`hosts`: the run's own addresses, as its servers see them."""
        own = set(hosts)
        self._listener = socket.create_server((own.pop() if len(own) == 1 else "", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self.group_id, self.secret = secrets.token_hex(8), secrets.token_hex(16)
        self._seconds = seconds

    def open(self) -> dist.Store:
        store = dist.TCPStore(
            "localhost",
            self.port,
            is_master=True,
            timeout=timedelta(seconds=self._seconds),
            wait_for_workers=False,
            master_listen_fd=self._listener.detach(),
            use_libuv=True,
        )
        return dist.PrefixStore(self.secret, store)


def join_store(invitation: GroupInvitation) -> dist.Store:
    """Raises GroupError."""
    try:
        store = dist.TCPStore(
            invitation.host,
            invitation.port,
            is_master=False,
            timeout=timedelta(seconds=invitation.seconds),
            wait_for_workers=False,
        )
    except RuntimeError as error:
        raise GroupError(f"the run's store at {invitation.host}:{invitation.port} cannot be reached: {error}"[:500]) from error
    return dist.PrefixStore(invitation.secret, store)


class WeightGroup:
    """One member's end."""

    @waiting("servers in a process group for weights")
    def __init__(self, store: dist.Store, rank: int, size: int, device: torch.device, *, host: str, seconds: float) -> None:
        """Returns when all have joined. `host`: the address of this end, over which gloo connects. Raises GroupError."""
        self.size = size
        self._device = device
        self._broken = False
        try:
            self._group: Any = _backend(store, rank, size, device, host, timedelta(seconds=seconds))
            self.broadcast(torch.zeros(1, dtype=torch.uint8, device=device), seconds)  # connects NCCL
        except (RuntimeError, ValueError) as error:
            raise GroupError(f"the process group for weights could not be formed: {error}"[:500]) from error

    @waiting("servers in a process group for weights")
    def broadcast(self, data: Tensor, seconds: float, given_up: Callable[[], bool] = lambda: False) -> None:
        """The run's bytes, uint8 on the device, into `data` of every member; returns when this end is done.

        Raises GroupError after `seconds`, when `given_up()`, and when another member is gone: then the group is of no more use.
        """
        deadline, pause = time.monotonic() + seconds, _POLL_SECONDS[0]
        try:
            if self._broken:
                raise GroupError("the process group has failed before")
            work = self._group.broadcast([data], dist.BroadcastOptions())
            while not work.is_completed():
                if given_up():
                    raise GroupError("the broadcast was given up")
                if time.monotonic() > deadline:
                    raise GroupError(f"the broadcast did not end within {seconds:g} s")
                time.sleep(pause)
                pause = min(2 * pause, _POLL_SECONDS[1])
            work.wait()  # raises what went wrong; on CUDA the stream waits, which the host has done
        except GroupError:
            self.abort()
            raise
        except RuntimeError as error:
            self.abort()
            raise GroupError(f"the broadcast failed: {error}"[:500]) from error

    def abort(self) -> None:
        """Ends what is under way, here and, as the connections close, at the others. Safe to call twice."""
        if not self._broken:
            self._broken = True
            group, self._group = self._group, None
            threading.Thread(target=_end, args=(group,), daemon=True).start()  # may wait for what it ends


def _end(group: Any) -> None:
    group.abort()


def _backend(store: dist.Store, rank: int, size: int, device: torch.device, host: str, limit: timedelta) -> Any:
    if device.type != "cuda":
        gloo: Any = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        gloo._timeout = limit
        gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        return dist.ProcessGroupGloo(store, rank, size, gloo)
    # The process must outlive a member: without this NCCL's watchdog ends it.
    before = os.environ.get(_ERROR_HANDLING)
    os.environ[_ERROR_HANDLING] = "0"
    try:
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = limit
        return dist.ProcessGroupNCCL(store, rank, size, nccl)
    finally:
        os.environ.pop(_ERROR_HANDLING)
        if before is not None:
            os.environ[_ERROR_HANDLING] = before


_ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
