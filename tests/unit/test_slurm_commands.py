"""The exact command lines that the job scripts give to srun with pyxis, and to apptainer, neither of which can run here.

`srun`, `scontrol` and `apptainer` on the path are programs that write down how they were called.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def run(script: Path, *arguments: str, cwd: Path, environment: dict[str, str]) -> tuple[list[list[str]], str]:
    """The calls that a script makes, and what it says."""
    done = subprocess.run(["bash", script, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in Path(environment["CALLS"]).read_text().splitlines()], done.stderr


def test_srun_without_a_container(tmp_path: Path, environment: dict[str, str]) -> None:
    calls, said = run(HOME / "slurm/align.sh", "a=b c", cwd=tmp_path, environment=environment | {"PRISM_NEMO_SRUN": "--mpi=none"})
    log = f"{tmp_path}/logs/12/rank_%t.log"
    assert calls == [[
        "srun", "--nodes=3", "--relative=0", "--ntasks=24", "--ntasks-per-node=8", "--distribution=block", "--cpus-per-task=12",
        "--kill-on-bad-exit=1", "--wait=0", "--unbuffered", "--export=ALL",
        "--open-mode=append", f"--output={log}", f"--error={log}", "--mpi=none",
        "bash", f"{HOME}/slurm/rank.sh", "align", "a=b c",
    ]]  # fmt: skip
    assert r"prism-nemo align a=b\ c on 3 node(s) n[1-3], 8 rank(s) each" in said


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


def server_of(environment: dict[str, str], program: Path, cwd: Path, **more: str) -> list[str]:
    """How rank.sh starts the third of four rollout servers of a node; the program that it starts refuses with status 2."""
    program.write_text(WRITES_DOWN.replace('time.sleep(60 if "serve" in sys.argv else 1)', "sys.exit(2)"))
    program.chmod(0o755)
    place = {
        "SLURM_PROCID": "2",
        "SLURM_LOCALID": "2",
        "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_NTASKS": "4",
        "SLURMD_NODENAME": "n1",
    }
    place |= {"PRISM_NEMO_SERVE_PORT": "900", "PRISM_NEMO_FIRST_END": f"{cwd}/first_end"}
    command = ["bash", HOME / "slurm/rank.sh", "serve", "--of", "rlvr"]
    assert subprocess.run(command, cwd=cwd, env=environment | place | more, timeout=60).returncode == 2
    assert (cwd / "first_end").read_text() == "server_2 2 n1\n"
    (call,) = [json.loads(line) for line in Path(environment["CALLS"]).read_text().splitlines()]
    return call


def test_rollout_servers_run_in_a_python_of_their_own(tmp_path: Path, environment: dict[str, str]) -> None:
    serve = tmp_path / "bin" / "serve-python"
    call = server_of(environment, serve, tmp_path, PRISM_NEMO_SERVE_PYTHON=str(serve), PRISM_NEMO_PYTHON="/no/python")
    assert call == ["serve-python", "-m", "prism_nemo", "serve", "--of", "rlvr", "serve.port=902"]


def test_in_apptainer_the_image_names_the_python_of_servers(tmp_path: Path, environment: dict[str, str]) -> None:
    """A shell in the container decides: outside of it nobody knows what the image sets."""
    call = server_of(environment, tmp_path / "bin" / "apptainer", tmp_path, PRISM_NEMO_CONTAINER="/images/prism.sif")
    assert call[:3] == ["apptainer", "exec", "--nv"]
    inside = call[call.index("/images/prism.sif") + 1 :]
    assert inside[3:] == ["python3", "-m", "prism_nemo", "serve", "--of", "rlvr", "serve.port=902"]
    for variable, python in (("/bin/echo", "-m prism_nemo"), ("", "")):
        kept = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PRISM_NEMO_SERVE_PYTHON": variable}
        (tmp_path / "python3").write_text("#!/bin/sh\necho own\n")
        (tmp_path / "python3").chmod(0o755)
        done = subprocess.run(inside, env=kept, capture_output=True, text=True, timeout=60)
        assert done.stdout.startswith(python or "own"), done


def test_a_python_that_is_not_there_is_not_tried_for_ever(tmp_path: Path, environment: dict[str, str]) -> None:
    place = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS_PER_NODE": "1", "PRISM_NEMO_SERVE_PORT": "900"}
    place |= {"PRISM_NEMO_FIRST_END": f"{tmp_path}/first_end", "PRISM_NEMO_SERVE_PYTHON": "/no/python"}
    command = ["bash", HOME / "slurm/rank.sh", "serve", "--of", "rlvr"]
    done = subprocess.run(command, cwd=tmp_path, env=environment | place, capture_output=True, text=True, timeout=60)
    assert done.returncode == 127
    assert "/no/python" in done.stderr


@pytest.mark.parametrize(
    ("variable", "value", "least"),
    [("PRISM_NEMO_RANKS", "0", 1), ("PRISM_NEMO_ROLLOUT_NODES", "all", 0), ("PRISM_NEMO_MAX_FAILURES", "-1", 1)],
)
def test_what_is_no_number_is_refused(variable: str, value: str, least: int, tmp_path: Path, environment: dict[str, str]) -> None:
    command = ["bash", HOME / "slurm/align.sh"]
    done = subprocess.run(command, cwd=tmp_path, env=environment | {variable: value}, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"{variable}={value}: it is to be a number of at least {least}" in done.stderr
    assert not Path(environment["CALLS"]).exists()


def test_a_script_submitted_from_elsewhere_says_what_it_needs(tmp_path: Path, environment: dict[str, str]) -> None:
    kept = {name: value for name, value in environment.items() if name != "PRISM_NEMO_HOME"}
    for script in ("align", "convert", "pipeline"):
        done = subprocess.run(
            ["bash", HOME / "slurm" / f"{script}.sh"], cwd=tmp_path, env=kept, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 2
        assert "submit from it, or export PRISM_NEMO_HOME" in done.stderr


def test_only_an_array_replaces_its_index(tmp_path: Path, environment: dict[str, str]) -> None:
    calls, _ = run(HOME / "slurm/align.sh", "data.system_prompt=100%accurate", cwd=tmp_path, environment=environment)
    assert calls[0][-1] == "data.system_prompt=100%accurate"
    element = {"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "7"}
    calls, _ = run(HOME / "slurm/align.sh", "experiment.dir=runs/%a/%a", cwd=tmp_path, environment=environment | element)
    assert calls[-1][-1] == "experiment.dir=runs/7/7"


def test_the_network_is_what_was_named(tmp_path: Path, environment: dict[str, str]) -> None:
    shows = tmp_path / "bin" / "srun"
    shows.write_text("#!/bin/bash\nenv | grep -E '^(NCCL|GLOO|MASTER|CUDA_DEV|OMP)' >&2\n")
    done = subprocess.run(
        ["bash", HOME / "slurm/align.sh"], cwd=tmp_path, env=environment | {"PRISM_NEMO_NET": "ib0", "SLURM_RESTART_COUNT": "2"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    for setting in ("NCCL_SOCKET_IFNAME=ib0", "GLOO_SOCKET_IFNAME=ib0", "MASTER_ADDR=n1", f"MASTER_PORT={12000 + 12 * 37 + 2}"):
        assert setting in done.stderr.splitlines()


def test_a_job_whose_time_is_up_before_it_has_saved_is_queued_again(tmp_path: Path, environment: dict[str, str]) -> None:
    shows = (
        NAMES_NODES
        + "[[ $1 == requeue ]] && echo $2 >requeued\n[[ $2 == job ]] && echo 'JobState=COMPLETING Reason=TimeLimit X=Y'\n"
    )
    (tmp_path / "bin" / "scontrol").write_text(shows)
    job = subprocess.Popen(
        ["bash", HOME / "slurm/align.sh"],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until(Path(environment["CALLS"]).exists)  # it runs
    job.send_signal(signal.SIGTERM)
    until((tmp_path / "requeued").exists)
    job.terminate()  # it waits for SLURM to end it
    said = job.communicate(timeout=60)[1]
    assert (tmp_path / "requeued").read_text() == "12\n"
    assert "out of time before the run had saved: it is queued again" in said
