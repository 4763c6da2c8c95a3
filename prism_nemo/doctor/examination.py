"""The order of checks over all ranks, and what becomes of the findings of each."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from prism_nemo.doctor.finding import Finding, failed, is_healthy, ok, skipped, warning
from prism_nemo.doctor.local import Local, check_locally
from prism_nemo.doctor.meeting import Alone, Guest, Host, Meeting, MeetingLost, Round
from prism_nemo.doctor.place import Place, node_of_rank
from prism_nemo.doctor.subject import Subject
from prism_nemo.doctor.together import (
    Absent,
    check_all_reduce,
    check_clock,
    check_shared_folder,
    check_ways,
    free_port,
    run_all_reduce,
)

_PROBE_SHARE = 0.75  # of a round's limit: who waits for a child must still be in time for the others
_SLOW_SHARE = 0.7  # of the median of all
_RANK_REMEDY = "its log, or whether the node is up: sinfo -R, dmesg"

Nodes = dict[str, list[Finding]]


@dataclass
class _Report:
    """What a rank tells the first one at the end."""

    node: int
    name: str
    findings: list[Finding] = field(default_factory=list)
    teraflops: dict[str, float] = field(default_factory=dict)
    rates: dict[str, Any] | None = None  # as `all_reduce` returns them

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "findings": [finding.to_json() for finding in self.findings]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> _Report:
        return cls(**{**values, "findings": [Finding.from_json(one) for one in values["findings"]]})


def examine(place: Place, subject: Subject, limit: float) -> tuple[Nodes, bool]:
    """What is to be shown by this rank (nothing, but by the first one as long as it lives), and whether all nodes are healthy."""
    report = _Report(place.node, place.node_name)
    local: Future[Local] = Future()
    # A thread that an interrupted process does not wait for.
    threading.Thread(target=_fill, args=(local, place, subject, _PROBE_SHARE * limit), daemon=True).start()
    host = None
    try:
        host = Host(place, limit) if place.rank == 0 and place.world_size > 1 else None
        meeting: Meeting = Guest(place, limit) if place.world_size > 1 else Alone()
        arrived = meeting.exchange([place.node, place.node_name])
        report.findings += local.result().findings
        report.teraflops = local.result().teraflops
        names, absent = _together(place, subject, meeting, arrived, report, local.result(), limit)
        reports = meeting.gather(report.to_json())
        nodes = _merged(place, reports, names, absent) if place.rank == 0 else {}
        healthy = all(map(is_healthy, nodes.values()))
        healthy = bool(meeting.exchange(healthy).values[0])
        meeting.leave()
    except MeetingLost as lost:
        if not place.leads:
            return {}, False
        remedy = f"the first rank's log and node; MASTER_ADDR and MASTER_PORT, and PRISM_NEMO_NET. {_RANK_REMEDY}"
        return {place.node_name: [*local.result().findings, failed("ranks", str(lost), remedy)]}, False
    if host:
        host.close()
    return nodes, healthy


def _fill(local: Future[Local], place: Place, subject: Subject, limit: float) -> None:
    try:
        local.set_result(check_locally(place, subject, quick=False, limit=limit))
    except BaseException as error:  # is raised where it is asked for
        local.set_exception(error)


def _together(
    place: Place, subject: Subject, meeting: Meeting, arrived: Round, report: _Report, local: Local, limit: float
) -> tuple[dict[int, str], Round | None]:
    """Adds to the report. Returns the names of nodes, by number, and the round in which ranks were missing, if there was one."""
    names = _names([value for value in arrived.values if value])
    findings = report.findings
    try:
        if arrived.missing:
            raise Absent(arrived)
        findings += check_clock(place, meeting)
        if subject.folders:
            findings += check_shared_folder(place, meeting, subject.folders[0], names, _PROBE_SHARE * limit)
        if isinstance(meeting, Guest):
            findings += check_ways(place, meeting, meeting.address, names)
            ranks: dict[int, list[int]] = {}
            for rank, (node, _) in enumerate(arrived.values):
                ranks.setdefault(node, []).append(rank)
            more, report.rates = check_all_reduce(place, meeting, list(ranks.values()), local.gpus, _PROBE_SHARE * limit)
            findings += more
        else:
            findings += _alone(place, local.gpus, report, _PROBE_SHARE * limit)
    except Absent as absent:
        return names, absent.round
    return names, None


def _alone(place: Place, gpus: int, report: _Report, limit: float) -> list[Finding]:
    """Without other ranks: one process a GPU here, and two of the CPU where there is none."""
    if gpus == 1:
        return [skipped("all-reduce", "one GPU")]
    count = gpus or 2
    port = free_port()
    places = [replace(place, rank=rank, local_rank=rank, world_size=count, master_address="127.0.0.1") for rank in range(count)]
    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(lambda one: run_all_reduce(one, Alone(), [list(range(count))], gpus, limit, port), places))
    report.rates = results[0][1]
    return [finding for findings, _ in results for finding in findings]


def _names(arrived: Sequence[Sequence[Any]]) -> dict[int, str]:
    """The name of every node, by number; its number in it too where several have one name."""
    names: dict[int, str] = dict(sorted(map(tuple, arrived)))
    several = {name for name in names.values() if list(names.values()).count(name) > 1}
    return {node: f"{name}[{node}]" if name in several else name for node, name in names.items()}


def _merged(place: Place, gathered: Round, names: dict[int, str], absent: Round | None) -> Nodes:
    """Every node's findings, those that its ranks share once."""
    reports = [_Report.from_json(value) for value in gathered.values if value]
    nodes: Nodes = {name: [] for name in names.values()}
    for report in reports:
        mine = nodes[names[report.node]]
        mine += [finding for finding in report.findings if finding not in mine]
    missing = {**dict.fromkeys(gathered.silent, "does not answer"), **dict.fromkeys(gathered.ended, "has ended")}
    if absent:
        missing = {**dict.fromkeys(absent.silent, "does not answer"), **dict.fromkeys(absent.ended, "has ended"), **missing}
    told = {}
    for rank, what in sorted(missing.items()):
        node = node_of_rank(rank, place, names)
        told[rank] = f"rank {rank} on {node}"
        nodes.setdefault(node, []).append(failed("ranks", f"rank {rank} of {place.world_size} {what}", _RANK_REMEDY))
    if missing:
        text = f"not tried: {', '.join(list(told.values())[:8])}{', ...' if len(told) > 8 else ''} missing"
        for findings in nodes.values():
            if not any(finding.check == "all-reduce" for finding in findings):
                findings.append(skipped("all-reduce", text))
    _add_slow_gpus(nodes, reports, names)
    _add_rates(nodes, reports, names)
    return nodes


def _add_slow_gpus(nodes: Nodes, reports: Sequence[_Report], names: Mapping[int, str]) -> None:
    rates = [rate for report in reports for rate in report.teraflops.values()]
    if not rates:
        return
    usual = statistics.median(rates)
    for report in reports:
        for gpu, rate in report.teraflops.items():
            if rate < _SLOW_SHARE * usual:
                text = f"{rate:.3g} TFLOP/s, {rate / usual:.0%} of what most give"
                nodes[names[report.node]].append(
                    warning(f"speed {gpu}", text, "throttling, or another process on it: nvidia-smi")
                )


def _add_rates(nodes: Nodes, reports: Sequence[_Report], names: Mapping[int, str]) -> None:
    """The slowest rank's rate of each node, against the other nodes'."""
    for scope, check in (("node", "all-reduce, node"), ("all", "all-reduce, all")):
        slowest: dict[int, dict[str, Any]] = {}
        for report in reports:
            found = (report.rates or {}).get(scope)
            if found and found["right"] and found["gb_per_second"] < slowest.get(report.node, found)["gb_per_second"] + 1e-12:
                slowest[report.node] = {**found, "backend": report.rates["backend"]} if report.rates else found
        if not slowest:
            continue
        usual = statistics.median(found["gb_per_second"] for found in slowest.values())
        for node, found in slowest.items():
            text = f"{found['ranks']} ranks over {found['backend']}: right, {found['gb_per_second']:.3g} GB/s a rank"
            if found["gb_per_second"] < _SLOW_SHARE * usual:
                more = f"{text}, {found['gb_per_second'] / usual:.0%} of what most nodes give"
                nodes[names[node]].append(warning(check, more, "NCCL_DEBUG=INFO shows the way it takes; nvidia-smi topo -m"))
            else:
                nodes[names[node]].append(ok(check, text))
