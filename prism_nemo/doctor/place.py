"""Which rank this is, of how many, on which node; from torchrun's, slurm/rank.sh's or srun's variables."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from prism_nemo.errors import ConfigError

_SCONTROL_SECONDS = 5.0


@dataclass(frozen=True)
class Place:
    rank: int
    world_size: int
    local_rank: int
    ranks_per_node: int
    node: int  # its number
    node_name: str
    master_address: str
    master_port: int
    job: str  # ranks of another job are strangers

    @property
    def leads(self) -> bool:
        """Whether this rank does what is done once a node."""
        return self.local_rank == 0


def this_place(environment: Mapping[str, str] | None = None) -> Place:
    """Raises ConfigError when there are several ranks, and no word of where the first one is."""
    given = os.environ if environment is None else environment

    def number(*names: str, default: int) -> int:
        return next((int(given[name]) for name in names if given.get(name, "").isdigit()), default)

    # A batch script sees the variables of a task that it is not: without an address it is alone.
    by_srun = "MASTER_ADDR" in given
    world_size = number("WORLD_SIZE", *(["SLURM_NTASKS"] if by_srun else []), default=1)
    if world_size > 1 and not ("MASTER_ADDR" in given and given.get("MASTER_PORT", "").isdigit()):
        raise ConfigError(
            f"WORLD_SIZE is {world_size}, but MASTER_ADDR or MASTER_PORT is missing",
            where="the environment",
            remedy="start it with torchrun, or with srun through slurm/rank.sh; unset WORLD_SIZE to check this machine alone",
        )
    rank = number("RANK", *(["SLURM_PROCID"] if by_srun else []), default=0) if world_size > 1 else 0
    per_node = number("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", default=world_size // number("SLURM_NNODES", default=1) or 1)
    return Place(
        rank=rank,
        world_size=world_size,
        local_rank=number("LOCAL_RANK", "SLURM_LOCALID", default=rank % per_node) if world_size > 1 else 0,
        ranks_per_node=per_node,
        node=number("GROUP_RANK", "SLURM_NODEID", default=rank // per_node) if world_size > 1 else 0,
        node_name=given.get("SLURMD_NODENAME") or socket.gethostname(),
        master_address=given.get("MASTER_ADDR", "127.0.0.1"),
        master_port=number("MASTER_PORT", default=0),
        job=f"{given.get('SLURM_JOB_ID', '')}.{given.get('TORCHELASTIC_RUN_ID', '')}.{given.get('MASTER_PORT', '')}",
    )


def node_of_rank(rank: int, place: Place, known: Mapping[int, str]) -> str:
    """The name of the node of a rank that has not been heard of. known: the names, by number, of nodes that have."""
    node = rank // place.ranks_per_node
    if node in known:
        return known[node]
    names = _slurm_nodes()
    return names[node] if node < len(names) else f"node number {node}"


def _slurm_nodes() -> list[str]:
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        return []
    try:
        told = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=_SCONTROL_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return told.stdout.split()
