"""What ranks check together: the shared folder, ways between nodes, clocks, all-reduces. Each a few rounds of a meeting."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prism_nemo.doctor.finding import Finding, failed, ok, warning
from prism_nemo.doctor.meeting import Meeting, Round, listen
from prism_nemo.doctor.place import Place
from prism_nemo.doctor.probe import Probe, ProbeFailed

_CONNECT_SECONDS = 3.0
_CONNECTIONS = 32
_CLOCK_SECONDS = 2.0


class Absent(Exception):
    """Ranks are missing in a round."""

    def __init__(self, found: Round) -> None:
        super().__init__()
        self.round = found


def say(meeting: Meeting, value: Any) -> list[Any]:
    """What every rank says. Raises Absent when one does not."""
    found = meeting.exchange(value)
    if found.missing:
        raise Absent(found)
    return found.values


def check_clock(place: Place, meeting: Meeting) -> list[Finding]:
    if not place.leads or place.world_size == place.ranks_per_node:
        return []
    offset = meeting.clock_offset()
    if abs(offset) > _CLOCK_SECONDS:
        text = f"is {abs(offset):.1f} s {'behind' if offset > 0 else 'ahead of'} the first node's"
        return [warning("clock", text, "start an NTP service: file times and logs of nodes do not agree")]
    return [ok("clock", f"{abs(offset) * 1e3:.0f} ms from the first node's")]


def check_shared_folder(place: Place, meeting: Meeting, path: str, leaders: dict[int, str], limit: float) -> list[Finding]:
    """leaders: the names of nodes, by number. Every rank takes part in the rounds, a node's first rank does the work."""
    findings: list[Finding] = []

    def tried(name: str, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except ProbeFailed as problem:
            findings.append(failed(name, str(problem), "the file system at experiment.dir: df, mount, dmesg"))
            return None

    first = place.rank == 0
    folder = None
    if first:
        arguments = {"path": path, "name": f".prism-nemo-doctor-{secrets.token_hex(6)}"}
        folder = tried("shared folder", Probe("share_folder", arguments, limit=limit).result)
    folder = say(meeting, folder)[0]
    if folder is None:
        return findings
    lock = Probe("share_lock_hold", {"folder": folder}, limit=4 * limit) if first else None
    if lock:
        tried("locks", lambda: lock.wait_until("holding the lock"))
    if place.leads:
        write = Probe("share_write", {"folder": folder, "node": place.node}, limit=limit)
        behind = tried("shared folder", write.result)
        if behind is not None and abs(behind) > _CLOCK_SECONDS:
            text = f"the file system's clock is {behind:+.1f} s from this node's"
            findings.append(warning("file times", text, "start an NTP service on both"))
    say(meeting, None)
    if place.leads and not findings:
        read = Probe("share_read", {"folder": folder, "nodes": {str(node): name for node, name in leaders.items()}}, limit=limit)
        # The first node's own process holds the lock: asking there shows that there are locks at all.
        attempt = Probe("share_lock_try", {"folder": folder}, limit=limit)
        for name, probe in (("shared folder", read), ("locks", attempt)):
            findings += map(Finding.from_json, tried(name, probe.result) or [])
    say(meeting, None)
    if lock:
        lock.kill()
        with contextlib.suppress(ProbeFailed):
            Probe("share_remove", {"folder": folder}, limit=limit).result()
    return findings


def check_ways(place: Place, meeting: Meeting, address: str, names: dict[int, str]) -> list[Finding]:
    """Whether every node's ports can be reached from every other. address: of this node; names: of nodes, by number."""
    if len(names) == 1:
        return []
    listener = _listen() if place.leads else None
    theirs = say(meeting, (place.node, address, listener.getsockname()[1]) if listener else None)
    others = [(node, host, port) for node, host, port in filter(None, theirs) if node != place.node]
    findings = []
    if place.leads:
        with ThreadPoolExecutor(_CONNECTIONS) as pool:
            problems = list(pool.map(_reach, others))
        unreached = [f"{names[node]} ({problem})" for (node, _, _), problem in zip(others, problems, strict=True) if problem]
        if unreached:
            text = f"no way from {address} to {', '.join(unreached[:8])}{', ...' if len(unreached) > 8 else ''}"
            findings.append(
                failed("ports", text, "a firewall, or the wrong network: set PRISM_NEMO_NET to the interface between nodes")
            )
        else:
            findings.append(ok("ports", f"{len(others)} other node(s) can be reached from {address}"))
    say(meeting, None)
    if listener:
        listener.close()
    return findings


def _listen() -> socket.socket:
    listener = listen("", 0)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                listener.accept()[0].close()

    threading.Thread(target=accept, daemon=True).start()
    return listener


def _reach(other: tuple[int, str, int]) -> str | None:
    _, host, port = other
    try:
        socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
    except OSError as error:
        return f"{host} port {port}: {error}"
    return None


def check_all_reduce(
    place: Place, meeting: Meeting, nodes: list[list[int]], gpus: int, limit: float
) -> tuple[list[Finding], Any]:
    """Findings of this rank, and what it measured. nodes: the ranks of each. gpus: that this rank sees."""
    on_gpu = all(count > 0 for count in say(meeting, gpus))
    port = say(meeting, free_port() if place.rank == 0 else None)[0]
    return run_all_reduce(place, meeting, nodes, gpus if on_gpu else 0, limit, port)


def run_all_reduce(
    place: Place, meeting: Meeting, nodes: list[list[int]], gpus: int, limit: float, port: int
) -> tuple[list[Finding], Any]:
    """This rank's part. port: where the first rank waits. gpus: 0 for gloo on the CPU."""

    def in_vain() -> str | None:
        missing = meeting.missing()
        return f"rank {', '.join(map(str, missing[:8]))} is missing" if missing else None

    arguments = {
        "rank": place.rank,
        "nodes": nodes,
        "address": place.master_address,
        "port": port,
        "device_index": place.local_rank % gpus if gpus else None,
        "limit": limit,
    }
    environment = {"TORCHELASTIC_USE_AGENT_STORE": "False"} | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})
    try:
        told = Probe("all_reduce", arguments, limit=limit, environment=environment).result(in_vain)
    except ProbeFailed as problem:
        remedy = "a rank that ended is the cause for others; else NCCL_DEBUG=INFO, PRISM_NEMO_NET, and the checks above"
        return [failed("all-reduce", f"rank {place.rank} {problem}", remedy)], None
    wrong = [name for name in ("node", "all") if told[name] and not told[name]["right"]]
    if wrong:
        remedy = "do not train here: a GPU or link gives wrong sums (NCCL_P2P_DISABLE=1 tells whether it is the link)"
        return [failed("all-reduce", f"rank {place.rank} got wrong sums ({', '.join(wrong)})", remedy)], told
    return [], told


def free_port() -> int:
    with listen("", 0) as listener:
        return int(listener.getsockname()[1])
