"""The command under torchrun, on two tensor-parallel ranks, against the same command on one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.stages import assert_same_metrics, run_stage, settings, trained_policy, written

from prism_nemo.cli import main
from prism_nemo.experiment import state_of

STEPS = "trainer.max_steps=2"


COMMAND = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "prism_nemo"]
ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "ignore"}


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=400, check=False)


def test_align_on_two_ranks_is_align_on_one(tmp_path: Path) -> None:
    run = tmp_path / "two"
    done = torchrun("align", *settings("align", run, STEPS, "parallel.tensor_model_parallel_size=2"))
    assert done.returncode == 0, done.stderr[-3000:]
    metrics, samples = written(run)
    expected_metrics, expected_samples = written(run_stage("align", tmp_path / "one", STEPS))
    assert [row["step"] for row in metrics] == [1, 2, 2]
    assert_same_metrics(metrics, expected_metrics, 1e-4)
    scores = ("score/perception", "score/reasoning")
    assert len(samples) == 8
    for found, want in zip(samples, expected_samples, strict=True):
        assert {name: value for name, value in found.items() if name not in scores} == {
            name: value for name, value in want.items() if name not in scores
        }
        assert [found[name] for name in scores] == pytest.approx([want[name] for name in scores], abs=1e-4)
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert main(["convert", "export", "--checkpoint", str(run), "--out", str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf" / "model.safetensors").stat().st_size > 100_000


def test_a_killed_rank_ends_the_job_which_names_it(tmp_path: Path) -> None:
    run, log = tmp_path / "run", tmp_path / "log.txt"
    trained_policy()
    with log.open("w") as output:
        arguments = ["rlvr", *settings("rlvr", run, "trainer.max_steps=1000")]
        job = subprocess.Popen([*COMMAND, *arguments], stdout=output, stderr=output, env=ENVIRONMENT)
        try:
            deadline = time.monotonic() + 240
            while not (run / "metrics.jsonl").exists():
                assert job.poll() is None and time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            began = time.monotonic()
            os.kill(_rank(job.pid, 1), signal.SIGKILL)
            assert job.wait(240) == 1
            assert time.monotonic() - began < 60
        finally:
            job.kill()
    cause = log.read_text().partition("Root Cause")[2]
    assert "rank      : 1 (" in cause and "Signal 9 (SIGKILL)" in cause, log.read_text()
    assert state_of(run).startswith(("died at step", "failed")), "not taken for one that runs"


def _rank(launcher: int, rank: int) -> int:
    """The process id of a rank of torchrun's."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"RANK={rank}".encode() in (process / "environ").read_bytes().split(b"\0"):
                return int(process.name)
        except OSError:
            continue
    raise AssertionError(f"torchrun has no rank {rank}")


def test_ranks_that_never_meet_say_so() -> None:
    """The other has died before. A launcher ends those that wait; without one it is the time limit of collectives."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    program = (
        "import datetime, torch\nfrom prism_nemo.engine import runtime\n"
        "runtime._join(torch.device('cpu'), datetime.timedelta(seconds=2))\n"
    )
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | place, timeout=240, check=False)
    assert done.returncode == 1
    assert "rank 0 has waited 0:00:02 in vain for all 2 ranks to meet at 127.0.0.1:" in done.stderr
    assert "1/2 clients joined" in done.stderr
