"""Sends a policy's weights to rollout servers in buckets: each is packed once, while those before it are read by all servers.

An update is a channel (`rollout/channel.py`) to each server: a frame that begins it and is answered with what the server is, one
that agrees on the path of the bytes, one for every bucket, which the server acknowledges when it has read it, and one at the end,
whose answer tells what became of it all.
How the bytes of a bucket travel is a `WeightPath`: they lie in shared memory, they follow their frame, or they are broadcast in a
process group of run and servers.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from prism_nemo.config.enums import WeightTransport
from prism_nemo.rollout.buckets import NUM_SLOTS, Bucket, BucketBuffer
from prism_nemo.rollout.weight_group import (
    GroupError,
    GroupInvitation,
    Rendezvous,
    WeightGroup,
    backend_of,
    identity_of,
    libraries_of,
)
from prism_nemo.rollout.weight_link import Link, Receiver, Refusal

_CPU = torch.device("cpu")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SentWeights:
    """An update, by its own id, and the servers that do not have it."""

    update_id: str
    refusals: dict[str, Refusal]  # by the server's name


class WeightSender:
    """Keeps its buffer and its process group between updates: memory that is mapped afresh costs as much as a copy."""

    def __init__(
        self,
        *,
        bucket_bytes: int,
        timeout_seconds: float,
        transport: WeightTransport = WeightTransport.auto,
        device: torch.device = _CPU,
    ) -> None:
        """`timeout_seconds`: for each bucket; a server that takes longer does not get the weights. `device`: of the tensors."""
        self._bucket_bytes = bucket_bytes
        self._timeout = timeout_seconds
        self._transport = transport
        self._device = device
        self._buffer: BucketBuffer | None = None
        self._shared_name: str | None = None
        self._shares: dict[str, bool] = {}  # by a server's instance, whether it has mapped the buffer
        self._group: WeightGroup | None = None
        self._members: list[str] = []  # instances, in the order of their ranks
        self._group_id = ""
        self._unexplained = False  # the last group failed, and no server could be blamed
        self._libraries_told: set[str] = set()  # what was logged about others
        self._told = ""  # which transport is in use, as it was logged last

    def send(self, tensors: Iterable[tuple[str, Tensor]], version: int, receivers: Sequence[Receiver]) -> SentWeights:
        """Reads all of `tensors`, whatever becomes of the servers: other ranks may be waiting for this one."""
        update_id = secrets.token_hex(8)
        links = [Link(receiver, update_id, self._timeout) for receiver in receivers]
        try:
            _each(links, lambda link: link.begin(version))
            in_group = self._in_group(links)
            buffer = self._prepare(receivers, self._device if in_group else _CPU)
            if in_group:
                self._open_group(links, buffer.bucket_bytes)
            else:
                self._open(links)
            buffer.hide()
            self._log_transport(links)
            count = 0

            for bucket in buffer.pack(tensors, lambda number: _wait_for(links, number - NUM_SLOTS, self._timeout)):
                for link in links:
                    link.start(bucket)
                if in_group:
                    self._broadcast(bucket, links)
                count += 1
            _each(links, lambda link: link.finish(count))
            if in_group and any(link.refusal is not None for link in links):
                self._leave_group()
                self._judge(links)
            else:
                self._unexplained = False
        finally:
            for link in links:
                link.close()
        return SentWeights(update_id, {link.receiver.name: link.refusal for link in links if link.refusal is not None})

    def close(self) -> None:
        if self._buffer is not None:
            self._buffer.hide()
            self._buffer = None
        self._leave_group()

    # Buffer and transport

    def _in_group(self, links: Sequence[Link]) -> bool:
        """Whether the bytes are broadcast; servers that cannot take part where they must refuse, with what to do."""
        if self._transport in (WeightTransport.shared_memory, WeightTransport.body):
            return False
        own, libraries, seen = identity_of(self._device), libraries_of(self._device), set[str]()
        able = self._device.type == "cuda"
        for link in links:
            if link.refusal is not None:
                continue
            same_kind = link.backend == backend_of(self._device)
            distinct = self._device.type != "cuda" or (link.device != own and link.device not in seen)
            seen.add(link.device)
            if not (same_kind and distinct):
                able = False
                if self._transport is WeightTransport.process_group:
                    link.refusal = _no_group(same_kind)
            elif link.libraries != libraries:
                self._note_libraries(link, libraries)
                able = False
        return able or self._transport is WeightTransport.process_group

    def _note_libraries(self, link: Link, libraries: str) -> None:
        """A group of two builds may hang, or worse; only who names it gets it."""
        if self._transport is WeightTransport.auto and self._device.type != "cuda":
            return  # it would not be in a group anyway
        told = f"{link.receiver.name} has {link.libraries}, the run {libraries}: "
        if self._transport is WeightTransport.process_group:
            told += "a process group of both, as rollout.servers.weight_transport asks, may fail or hang"
        else:
            told += "weights do not travel in a process group"
        if told not in self._libraries_told:
            self._libraries_told.add(told)
            _log.warning("%s", told)

    def _prepare(self, receivers: Sequence[Receiver], device: torch.device) -> BucketBuffer:
        """A buffer that every server either has mapped, or can map now, or cannot map at all."""
        if self._buffer is None or self._buffer.device != device:
            if self._buffer is not None:
                self._buffer.hide()
            self._buffer = BucketBuffer(self._bucket_bytes, device)
        elif device.type == "cpu" and any(receiver.instance not in self._shares for receiver in receivers):
            self._buffer.renew()
        else:
            return self._buffer
        self._shared_name, self._shares = self._buffer.name, {}
        return self._buffer

    def _open(self, links: Sequence[Link]) -> None:
        shared = None if self._transport is WeightTransport.body else self._shared_name
        _each(links, lambda link: link.agree({"shared": shared}))
        for link in links:
            if link.refusal is None and self._transport is WeightTransport.shared_memory and not link.shares:
                link.refusal = Refusal(
                    "it cannot map the run's shared memory",
                    final=True,
                    remedy="rollout.servers.weight_transport=auto, or one machine, one user and a /dev/shm with room for "
                    f"{NUM_SLOTS} times rollout.servers.weight_bucket_mb",
                )
        self._shares |= {link.receiver.instance: link.shares for link in links if link.refusal is None}

    def _log_transport(self, links: Sequence[Link]) -> None:
        used = sorted({link.transport for link in links if link.refusal is None})
        told = ", ".join(used)
        if used and told != self._told:
            _log.info("weights travel by %s", told)
            self._told = told

    # The process group

    def _open_group(self, links: Sequence[Link], bucket_bytes: int) -> None:
        """A group of all servers that are there: the one of the last update where they are the same."""
        ready = [link for link in links if link.refusal is None]
        members = [link.receiver.instance for link in ready]
        if self._group is not None and members == self._members:
            _each(ready, lambda link: link.agree({"group_id": self._group_id}))
            return
        self._leave_group()
        if not ready:
            return
        hosts = [link.local_host for link in ready]
        rendezvous = Rendezvous(hosts, self._timeout)
        self._group_id = rendezvous.group_id
        opened = []
        for rank, link in enumerate(ready, start=1):
            invitation = GroupInvitation(
                rendezvous.group_id,
                rendezvous.secret,
                backend_of(self._device),
                hosts[rank - 1],
                rendezvous.port,
                rank,
                len(ready) + 1,
                bucket_bytes,
                self._timeout,
            )
            opened.append(link.submit(partial(link.agree, {"group": invitation.header()})))
        try:
            store = rendezvous.open()
            self._group = WeightGroup(store, 0, len(ready) + 1, self._device, host=hosts[0], seconds=self._timeout)
            self._members = members
        except GroupError as error:
            self._fail_group(links, str(error))
        wait(opened)

    def _broadcast(self, bucket: Bucket, links: Sequence[Link]) -> None:
        if self._group is None:
            return
        try:
            self._group.broadcast(bucket.data, self._timeout, lambda: any(link.refusal is not None for link in links))
        except GroupError as error:
            self._fail_group(links, str(error))

    def _fail_group(self, links: Sequence[Link], what: str) -> None:
        self._leave_group()
        for link in links:
            link.give_up(what)

    def _judge(self, links: Sequence[Link]) -> None:
        """Where one server fails, the group does, and with it the update of all: who still answers is not to blame.

        When all of them answer, the group is formed again; when that happens twice in a row, they all are.
        """
        failed = [link for link in links if link.refusal is not None]
        with ThreadPoolExecutor(len(failed)) as threads:
            alive = list(threads.map(lambda link: link.is_alive(), failed))
        if self._unexplained and all(alive):
            return
        self._unexplained = all(alive)
        for link, answers in zip(failed, alive, strict=True):
            if answers and link.refusal is not None and not link.refusal.final:
                link.refusal = replace(link.refusal, at_fault=False)

    def _leave_group(self) -> None:
        if self._group is not None:
            self._group.abort()
            self._group = None


def _no_group(same_kind: bool) -> Refusal:
    problem = "shares a GPU with the run or another server" if same_kind else "computes on another kind of device"
    return Refusal(
        f"it {problem}, and the weights are to travel in a process group",
        final=True,
        remedy="rollout.servers.weight_transport=auto, or servers on GPUs of their own (CUDA_VISIBLE_DEVICES)",
    )


def _each(links: Sequence[Link], work: Callable[[Link], None]) -> None:
    """On every link, in its own thread, and done when this returns."""
    wait([link.submit(partial(work, link)) for link in links])


def _wait_for(links: Sequence[Link], number: int, seconds: float) -> None:
    """Until all servers have read that bucket."""
    deadline = time.monotonic() + seconds
    for link in links:
        link.attempt(partial(link.wait_for, number, deadline))
