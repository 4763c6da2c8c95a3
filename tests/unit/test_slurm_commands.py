"""The exact command lines that the job scripts give to srun with pyxis, and to apptainer, neither of which can run here.

`srun`, `scontrol` and `apptainer` on the path are programs that write down how they were called.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).parents[2]
WRITES_DOWN = f"""#!{sys.executable}
import json, os, sys, time
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
time.sleep(60 if "serve" in sys.argv else 1)  # servers are ended; and written down before the run is over
"""
NAMES_NODES = "#!/bin/bash\n[[ $1 == show && $2 == hostnames ]] && printf 'n1\\nn2\\nn3\\n'\n"


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """That of a job on three nodes with eight GPUs each, as SLURM sets it."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"srun": WRITES_DOWN, "apptainer": WRITES_DOWN, "scontrol": NAMES_NODES}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "PRISM_NEMO_", "NCCL", "GLOO"))}
    return kept | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls.jsonl"),
        "PRISM_NEMO_HOME": str(HOME),
        "SLURM_JOB_ID": "12",
        "SLURM_JOB_NODELIST": "n[1-3]",
        "SLURM_JOB_NUM_NODES": "3",
        "SLURM_GPUS_PER_NODE": "h100:8",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_ON_NODE": "96",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }


def run(script: Path, *arguments: str, cwd: Path, environment: dict[str, str]) -> tuple[list[list[str]], str]:
    """The calls that a script makes, and what it says."""
    done = subprocess.run(["bash", script, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in Path(environment["CALLS"]).read_text().splitlines()], done.stderr


def test_srun_without_a_container(tmp_path: Path, environment: dict[str, str]) -> None:
    calls, said = run(HOME / "slurm/align.sh", "a=b c", cwd=tmp_path, environment=environment | {"PRISM_NEMO_SRUN": "--mpi=none"})
    log = f"{tmp_path}/logs/12/rank_%t.log"
    assert calls == [[
        "srun", "--nodes=3", "--relative=0", "--ntasks=24", "--ntasks-per-node=8", "--cpus-per-task=12",
        "--kill-on-bad-exit=1", "--wait=0", "--unbuffered", "--export=ALL",
        "--open-mode=append", f"--output={log}", f"--error={log}", "--mpi=none",
        "bash", f"{HOME}/slurm/rank.sh", "align", "a=b c",
    ]]  # fmt: skip
    assert "prism-nemo align a=b c on 3 node(s) n[1-3], 8 rank(s) each" in said


def test_pyxis_gets_the_image_and_sees_checkout_logs_and_the_current_folder(tmp_path: Path, environment: dict[str, str]) -> None:
    more = {"PRISM_NEMO_CONTAINER": "/images/prism.sqsh", "PRISM_NEMO_MOUNTS": "/data,/scratch:/tmp/scratch"}
    ((_, *arguments),), said = run(HOME / "slurm/align.sh", cwd=tmp_path, environment=environment | more)
    assert [argument for argument in arguments if argument.startswith("--container")] == [
        "--container-image=/images/prism.sqsh",
        f"--container-workdir={tmp_path}",
        f"--container-mounts={HOME}:{HOME},{tmp_path}:{tmp_path},{tmp_path}/logs/12:{tmp_path}/logs/12,"
        "/data:/data,/scratch:/tmp/scratch",
    ]
    assert "container /images/prism.sqsh" in said


def test_rollout_servers_get_the_last_nodes_and_the_container_too(tmp_path: Path, environment: dict[str, str]) -> None:
    more = {"PRISM_NEMO_CONTAINER": "prism.sqsh", "PRISM_NEMO_ROLLOUT_NODES": "2", "PRISM_NEMO_ROLLOUT_SERVERS": "1"}
    calls, _ = run(HOME / "slurm/rlvr.sh", cwd=tmp_path, environment=environment | more)
    ranks, servers = sorted(calls, key=lambda call: "serve" in call)
    port = 12000 + 12 * 37 + 1
    urls = [f"rollout.servers.urls=[http://n2:{port},http://n3:{port}]"]
    assert ranks[1:4] == ["--nodes=1", "--relative=0", "--ntasks=8"]
    assert ranks[-3:] == ["rlvr", "rollout.placement=separate", *urls]
    assert servers[1:4] == ["--nodes=2", "--relative=1", "--ntasks=2"]
    assert "--cpus-per-task=96" in servers
    assert "--container-image=prism.sqsh" in servers
    assert servers[-6:] == ["serve", "--of", "rlvr", "rollout.placement=separate", *urls, "serve.host=0.0.0.0"]


def test_apptainer_is_started_for_every_rank(tmp_path: Path, environment: dict[str, str]) -> None:
    more = {
        "PRISM_NEMO_CONTAINER": "/images/prism.sif", "PRISM_NEMO_MOUNTS": "/data", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "4", "PRISM_NEMO_FIRST_END": f"{tmp_path}/logs/first_end.0",
    }  # fmt: skip
    calls, _ = run(HOME / "slurm/rank.sh", "align", "a=b c", cwd=tmp_path, environment=environment | more)
    assert calls == [[
        "apptainer", "exec", "--nv", "--bind", f"{HOME},{tmp_path},{tmp_path}/logs,/data", "--pwd", str(tmp_path),
        "/images/prism.sif", "python3", "-m", "prism_nemo", "align", "a=b c",
    ]]  # fmt: skip
    calls, _ = run(HOME / "slurm/align.sh", cwd=tmp_path, environment=environment | more)
    assert not [argument for argument in calls[-1] if argument.startswith("--container")]


def test_the_network_is_what_was_named(tmp_path: Path, environment: dict[str, str]) -> None:
    shows = tmp_path / "bin" / "srun"
    shows.write_text("#!/bin/bash\nenv | grep -E '^(NCCL|GLOO|MASTER|CUDA_DEV|OMP)' >&2\n")
    done = subprocess.run(
        ["bash", HOME / "slurm/align.sh"], cwd=tmp_path, env=environment | {"PRISM_NEMO_NET": "ib0", "SLURM_RESTART_COUNT": "2"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    for setting in ("NCCL_SOCKET_IFNAME=ib0", "GLOO_SOCKET_IFNAME=ib0", "MASTER_ADDR=n1", f"MASTER_PORT={12000 + 12 * 37 + 2}"):
        assert setting in done.stderr.splitlines()
