"""What the kernel says at once: limits, shared memory."""

from __future__ import annotations

import os
import resource
from pathlib import Path

from prism_nemo.doctor.finding import Finding, failed, ok, warning

SHARED_MEMORY = Path("/dev/shm")
INFINIBAND = Path("/sys/class/infiniband")
_MIN_SHARED_GIB = 1.0
_MIN_FILES = 4096  # a process with several layouts holds some hundred, loaders and rollout servers more


def check_limits() -> list[Finding]:
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    shown = "unlimited" if files == resource.RLIM_INFINITY else str(files)
    if files != resource.RLIM_INFINITY and files < _MIN_FILES:
        remedy = f"ulimit -n {min(most, 65536) if most != resource.RLIM_INFINITY else 65536}; docker: --ulimit nofile=65536"
        findings = [warning("open files", f"{shown} a process", remedy)]
    else:
        findings = [ok("open files", f"{shown} a process")]
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    adapters = sorted(entry.name for entry in INFINIBAND.iterdir()) if INFINIBAND.is_dir() else []
    if locked == resource.RLIM_INFINITY:
        findings.append(ok("locked memory", "unlimited"))
    elif adapters:
        remedy = "ulimit -l unlimited, for SLURM in its daemons' limits; docker: --ulimit memlock=-1"
        text = f"{locked >> 10} KiB a process: NCCL registers more with {adapters[0]}"
        findings.append(failed("locked memory", text, remedy))
    else:
        findings.append(ok("locked memory", f"{locked >> 10} KiB a process, and no InfiniBand that needs more"))
    return findings


def check_shared_memory() -> list[Finding]:
    if not SHARED_MEMORY.is_dir():
        return [failed("/dev/shm", "is missing", "mount a tmpfs there")]
    usage = os.statvfs(SHARED_MEMORY)
    size, free = (blocks * usage.f_frsize / (1 << 30) for blocks in (usage.f_blocks, usage.f_bavail))
    text = f"{free:.1f} of {size:.1f} GiB free"
    if free < _MIN_SHARED_GIB:
        remedy = "docker: --shm-size=16g or --ipc=host; otherwise remove what is left there"
        return [warning("/dev/shm", f"{text}: NCCL and rollout servers pass data through it", remedy)]
    return [ok("/dev/shm", text)]
