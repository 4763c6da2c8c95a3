"""In a child: torch, its CUDA, and whether every GPU multiplies right. torch is imported only when it is asked for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from prism_nemo.doctor.finding import Finding, failed, ok
from prism_nemo.doctor.probe import say_at

if TYPE_CHECKING:
    import torch

_SIDE = {"cuda": 4096, "cpu": 512}
_REPEATS = 20
_NONZERO = 0.25


def torch_and_matmul(device: str, local_rank: int, local_ranks: int, expected_gpus: int | None) -> dict[str, Any]:
    """{"findings", "teraflops": {GPU: rate}, "cuda": how many GPUs this process sees}.

    device         auto, cpu or cuda, as runtime.device
    local_rank     of `local_ranks` of this node: it checks the GPU that would be its own; one rank alone checks all
    expected_gpus  that a job has been given on a node; None where nobody knows
    """
    say_at("importing torch")
    import torch

    visible = torch.cuda.device_count() if device != "cpu" else 0
    findings = [_versions(torch, visible)]
    if device == "cuda" and not torch.cuda.is_available():
        findings.append(failed("gpus", "torch finds no GPU that it can use", "the driver, CUDA_VISIBLE_DEVICES, --gpus or --nv"))
    elif visible or expected_gpus:
        findings.append(_count(visible, expected_gpus, local_ranks))
    numbers = range(visible) if local_ranks == 1 else [local_rank % visible] if visible else []
    rates = {}
    for number in numbers:
        # A rank that is bound to its own GPU knows it as the first.
        name = f"GPU {local_rank if visible == 1 else number}"
        finding, rates[name] = _multiply(torch.device("cuda", number), name)
        findings.append(finding)
    if not visible and local_rank == 0:
        findings.append(_multiply(torch.device("cpu"), "CPU")[0])
    return {"findings": [finding.to_json() for finding in findings], "teraflops": rates, "cuda": visible}


def _versions(torch: Any, visible: int) -> Finding:
    if not visible:
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
        return ok("torch", f"{torch.__version__}, built for {built}; no GPU is used")
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else "none"
    driver = torch._C._cuda_getDriverVersion()
    return ok(
        "torch",
        f"{torch.__version__}, CUDA {torch.version.cuda}, the driver's CUDA {driver // 1000}.{driver % 1000 // 10}, NCCL {nccl}",
    )


def _count(visible: int, expected: int | None, local_ranks: int) -> Finding:
    # A rank that is bound to its own GPU sees that one.
    wanted = expected if local_ranks == 1 else 1
    if wanted is not None and visible < wanted:
        return failed("gpus", f"torch sees {visible} of {wanted}", "CUDA_VISIBLE_DEVICES, nvidia-smi, dmesg | grep -i xid")
    return ok("gpus", f"torch sees {visible}")


def _multiply(device: torch.device, name: str) -> tuple[Finding, float]:
    """Matrices of -1, 0 and 1: every entry of their product is a whole number that bf16 holds exactly, in any order of sums.

    The product C = AB is right if Cx = A(Bx) for a random x of -1 and 1, but for one case in two, for each of several x. That is
    worked out on the CPU.
    """
    import torch

    say_at(f"multiplying on {name}")
    side = _SIDE[device.type]
    generator = torch.Generator().manual_seed(0)

    def signs(*shape: int) -> torch.Tensor:
        return torch.randint(0, 2, shape, generator=generator, dtype=torch.int8) * 2 - 1

    a, b = ((signs(side, side) * (torch.rand(side, side, generator=generator) < _NONZERO)).float() for _ in range(2))
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    on_device = a.to(device, kind), b.to(device, kind)
    products = [on_device[0] @ on_device[1] for _ in range(2)]
    _synchronize(device)
    began = time.perf_counter()
    for _ in range(_REPEATS):
        products[1] = on_device[0] @ on_device[1]
    _synchronize(device)
    rate = 2 * side**3 * _REPEATS / (time.perf_counter() - began) / 1e12
    x = signs(side, 16).float()
    wanted = a @ (b @ x)
    wrong = [int((product.float().cpu() @ x != wanted).any(dim=1).sum()) for product in products]
    if any(wrong):
        text = f"{max(wrong)} of {side} rows of a product are wrong"
        return failed(f"matmul {name}", text, "take this GPU out of service: dmesg | grep -i xid, nvidia-smi -q -d ECC"), rate
    described = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    return ok(f"matmul {name}", f"right, {rate:.3g} TFLOP/s{described}"), rate


def _synchronize(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
