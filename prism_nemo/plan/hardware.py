"""GPUs, and every number of the time estimate that is an assumption, each with a name. None was measured by this project."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from prism_nemo.errors import ConfigError

GIB = 1 << 30


@dataclass(frozen=True)
class GPU:
    """Data-sheet numbers of one GPU in its usual eight-GPU machine, dense (without sparsity)."""

    name: str
    memory_gib: float  # what CUDA reports as its total
    bf16_tflops: float
    fp32_tflops: float  # TF32 is not used
    memory_tb_s: float
    nvlink_gb_s: float  # one direction
    network_gb_s: float  # one direction, a GPU's share of the machine's network cards


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("a100-40gb", 39.4, 312, 19.5, 1.55, 300, 25),
        GPU("a100", 79.1, 312, 19.5, 2.0, 300, 25),
        GPU("h100", 79.1, 989, 67, 3.35, 450, 50),
        GPU("h200", 139.7, 989, 67, 4.8, 450, 50),
        GPU("b200", 178.0, 2250, 80, 8.0, 900, 50),
    )
}


@dataclass(frozen=True)
class Assumptions:
    """What the estimates rest on beside arithmetic. Shares are of the data sheet's numbers."""

    matmul_share: float = 0.50  # of the peak: large matrix products
    expert_matmul_share: float = 0.30  # one expert at a time, few tokens each
    attention_share: float = 0.30  # FlexAttention with a block mask
    vision_share: float = 0.30  # hidden size 1024 or 1152
    elementwise_passes: float = 3.0  # times that what is kept for backward is read or written in all, unfused
    memory_share: float = 0.60  # of the memory's bandwidth
    nvlink_share: float = 0.60  # of the links' bandwidth
    network_share: float = 0.60  # of the network's bandwidth
    launch_us: float = 6.0  # of the host, for one kernel
    layer_kernels: float = 40.0  # of a language layer's forward pass, experts aside; twice that backward
    expert_kernels: float = 9.0  # of one expert's forward pass
    collective_us: float = 20.0  # latency of one collective
    optimizer_bytes: float = 34.0  # read and written for one parameter's update, norm and clipping
    host_gb_s: float = 25.0  # between GPU and host, for an offloaded optimizer
    framework_gib: float = 3.0  # CUDA context, cuBLAS and NCCL
    fragmentation: float = 0.06  # of all else: held by the caching allocator and not usable
    expert_imbalance: float = 1.25  # the busiest rank's routed tokens over the mean


ASSUMPTIONS = Assumptions()


def read_gpu(name: str) -> GPU:
    """Raises ConfigError, naming the GPUs there are."""
    plain = name.lower().removesuffix("-80gb").removesuffix("-sxm")
    if plain not in GPUS:
        close = difflib.get_close_matches(plain, GPUS, n=1)
        raise ConfigError(
            f"there are no figures for a GPU called `{name}`",
            where="--gpu",
            remedy=(f"did you mean {close[0]}? " if close else "") + f"One of {', '.join(GPUS)}",
        )
    return GPUS[plain]
