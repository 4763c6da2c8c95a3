"""GPUs as nvidia-smi tells of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from prism_nemo.doctor.finding import Finding, failed, ok, skipped, warning

_BASIC = "index,name,driver_version,memory.total,memory.used"
_ECC = "index,ecc.errors.uncorrected.volatile.total"
_THROTTLE = "index,clocks_event_reasons.active", "index,clocks_throttle_reasons.active"  # the second: drivers before 535
_SLOWED = {0x8: "hardware slowdown", 0x20: "too hot (software)", 0x40: "too hot (hardware)", 0x80: "power brake"}
_USED_MIB = 2048  # more than a driver and an idle context take


def check_nvidia_smi(limit: float) -> list[Finding]:
    """Findings of every GPU that nvidia-smi shows; none where the machine has no sign of a GPU. limit: seconds a question.

    In a child: a process that the kernel cannot end would be waited for without a limit.
    """
    if shutil.which("nvidia-smi") is None:
        if Path("/dev/nvidiactl").exists():
            return [
                warning(
                    "nvidia-smi", "is not installed, though there is a GPU", "ECC errors and throttling are not seen: install it"
                )
            ]
        return []
    try:
        rows = _query(_BASIC, limit)
    except subprocess.TimeoutExpired:
        text = f"does not answer within {limit:g} s"
        return [failed("nvidia-smi", text, "a GPU or the driver hangs: dmesg | grep -i xid; the node needs a restart")]
    except (OSError, subprocess.CalledProcessError) as error:
        output = getattr(error, "stdout", "") or str(error)
        return [failed("nvidia-smi", " ".join(str(output).split())[:200], "the driver: dmesg | grep -i -e nvrm -e xid")]
    findings = [ok("nvidia-smi", f"{len(rows)} x {rows[0][1]}, driver {rows[0][2]}")] if rows else []
    if not rows:
        return [failed("nvidia-smi", "shows no GPU", "the driver: dmesg | grep -i nvrm")]
    busy = [f"GPU {index} {used} of {total} MiB" for index, _, _, total, used in rows if used.isdigit() and int(used) > _USED_MIB]
    if busy:
        findings.append(
            warning("GPU memory", f"in use before the run: {', '.join(busy)}", "nvidia-smi shows the processes that hold it")
        )
    else:
        findings.append(ok("GPU memory", f"{rows[0][3]} MiB each, free"))
    return [*findings, _ecc(limit), _throttled(limit)]


def _ecc(limit: float) -> Finding:
    try:
        rows = _query(_ECC, limit)
    except (OSError, subprocess.SubprocessError):
        return skipped("ECC", "nvidia-smi does not tell")
    wrong = [f"GPU {index}: {count}" for index, count in rows if count.isdigit() and int(count)]
    if wrong:
        return failed(
            "ECC", f"uncorrected errors since the driver's start: {', '.join(wrong)}", "reset the GPU, or take it out of service"
        )
    if not any(count.isdigit() for _, count in rows):
        return skipped("ECC", "is off, or these GPUs have none")
    return ok("ECC", "no uncorrected errors")


def _throttled(limit: float) -> Finding:
    for fields in _THROTTLE:
        try:
            rows = _query(fields, limit)
        except (OSError, subprocess.SubprocessError):
            continue
        slowed = []
        for index, mask in rows:
            reasons = [reason for bit, reason in _SLOWED.items() if _number(mask) & bit]
            if reasons:
                slowed.append(f"GPU {index}: {', '.join(reasons)}")
        if slowed:
            return warning("throttling", "; ".join(slowed), "cooling and power of this node: every other rank waits for it")
        return ok("throttling", "no GPU is slowed down")
    return skipped("throttling", "nvidia-smi does not tell")


def _number(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        return 0


def _query(fields: str, limit: float) -> list[list[str]]:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit, check=True)
    return [
        row
        for line in done.stdout.splitlines()
        if len(row := [cell.strip() for cell in line.split(",")]) == fields.count(",") + 1
    ]


def expected_gpus() -> int | None:
    """How many GPUs a job has been given on this node, as SLURM says; None where nobody does."""
    given = os.environ.get("SLURM_GPUS_ON_NODE", "")
    return int(given) if given.isdigit() else None
