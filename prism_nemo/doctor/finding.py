"""What a check found, and how findings are shown."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    ok = "ok"
    skipped = "skipped"  # was not tried, and the text says why
    warning = "warning"  # training may work, slower or not for long
    failed = "failed"  # training would not work


@dataclass(frozen=True)
class Finding:
    """One check on one node: what was seen and, unless all is well, what to do."""

    check: str
    status: Status
    text: str
    remedy: str = ""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Finding:
        return cls(values["check"], Status(values["status"]), values["text"], values["remedy"])

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def ok(check: str, text: str) -> Finding:
    return Finding(check, Status.ok, text)


def skipped(check: str, text: str) -> Finding:
    return Finding(check, Status.skipped, text)


def warning(check: str, text: str, remedy: str) -> Finding:
    return Finding(check, Status.warning, text, remedy)


def failed(check: str, text: str, remedy: str) -> Finding:
    return Finding(check, Status.failed, text, remedy)


def is_healthy(findings: Sequence[Finding]) -> bool:
    return all(finding.status is not Status.failed for finding in findings)


def verdict(findings: Sequence[Finding]) -> str:
    """`healthy`, or how many checks failed and warn."""
    counts = {status: sum(finding.status is status for finding in findings) for status in (Status.failed, Status.warning)}
    told = [
        f"{counts[Status.failed]} failed" if counts[Status.failed] else "",
        f"{counts[Status.warning]} warning{'s' * (counts[Status.warning] > 1)}" if counts[Status.warning] else "",
    ]
    return ", ".join(filter(None, ["" if counts[Status.failed] else "healthy", *told]))


def as_text(nodes: Mapping[str, Sequence[Finding]]) -> str:
    """A line a check and node, then a verdict a node."""
    width = max(len(node) for node in nodes)
    checks = max(len(finding.check) for findings in nodes.values() for finding in findings)
    lines = []
    for node, findings in nodes.items():
        for finding in findings:
            remedy = f": {finding.remedy}" if finding.remedy else ""
            lines.append(f"{node:<{width}}  {finding.status:<7}  {finding.check:<{checks}}  {finding.text}{remedy}")
    lines += [f"{node:<{width}}  {verdict(findings)}" for node, findings in nodes.items()]
    return "".join(line + "\n" for line in lines)


def as_json(nodes: Mapping[str, Sequence[Finding]]) -> str:
    report = {
        "healthy": all(is_healthy(findings) for findings in nodes.values()),
        "nodes": {
            node: {"verdict": verdict(findings), "healthy": is_healthy(findings), "checks": [one.to_json() for one in findings]}
            for node, findings in nodes.items()
        },
    }
    return json.dumps(report, indent=2) + "\n"
