"""Real runs as jobs on two nodes, left alone and disturbed in every way that a cluster knows: the same digits."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import run_ranks
from helpers.stages import run_configured, run_stage, settings, written
from slurm.cluster import NODES
from slurm.jobs import Jobs

from prism_nemo.config.compose import load_config
from prism_nemo.run_directory import read_json_lines

# So many steps that no quick machine is through before the last disturbance; a checkpoint behind every second one.
OPTIONS = ("trainer.max_steps=40", "trainer.save_interval=2", "trainer.val_check_interval=20", "data.shuffle=true")


def align(run: Path) -> list[str]:
    return settings("align", run, *OPTIONS)


def _run(values: list[str]) -> None:
    run_configured("align", load_config("align", values))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Metrics and samples of two ranks on one machine, without SLURM, that nobody stopped."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    run_ranks(_run, 2, align(run))
    return written(run)


def test_two_nodes_are_two_ranks_on_one_machine(jobs: Jobs, unbroken: Any) -> None:
    run = jobs.folder / "run"
    job = jobs.submit("align", *align(run), flags="--nodes=2")
    assert jobs.end(job) == "COMPLETED", jobs.log(job)
    assert jobs.restarts(job) == 0
    assert written(run) == unbroken


def steps_logged(run: Path) -> int:
    file = run / "metrics.jsonl"
    return sum(1 for _ in read_json_lines(file)) if file.exists() else 0


def is_saving(run: Path) -> bool:
    """Whether a checkpoint is being written."""
    return any((run / "checkpoints").glob(".*.partial"))


def test_preempted_at_random_moments_and_requeued_it_is_the_same_run(jobs: Jobs, unbroken: Any) -> None:
    draw = random.Random(os.environ.get("PRISM_NEMO_TEST_SEED", "7"))
    run = jobs.folder / "run"
    job = jobs.submit("align", *align(run), flags="--nodes=2")

    def running() -> str:
        jobs.cluster.wait(job, states=["RUNNING"], seconds=100)
        return jobs.cluster.show(job)["Restarts"]

    moments = ["start", "save", "step", "start", "step"]
    for number, moment in enumerate(moments):
        assert running() == str(number)
        done = steps_logged(run)
        if moment == "start":  # imports, rendezvous, models
            time.sleep(draw.uniform(0, 6))
        if moment == "save":
            jobs.until(job, lambda: is_saving(run))
        if moment == "step":
            jobs.until(job, lambda: steps_logged(run) > done)  # noqa: B023  (called at once)
            time.sleep(draw.uniform(0, 0.5))
        assert jobs.cluster.show(job)["JobState"] == "RUNNING", f"it was over before it was disturbed\n{jobs.log(job)}"
        jobs.preempt()
    assert jobs.end(job) == "COMPLETED", jobs.log(job)
    assert jobs.restarts(job) == len(moments)
    assert written(run) == unbroken


def test_nodes_that_are_taken_away_and_that_fail_cost_no_step(jobs: Jobs, unbroken: Any) -> None:
    run = jobs.folder / "run"
    job = jobs.submit("align", *align(run), flags="--nodes=2")
    jobs.until(job, lambda: steps_logged(run) >= 1)
    jobs.cluster.run("scontrol", "update", f"nodename={NODES[0]}", "state=down", "reason=test")
    jobs.until(job, lambda: jobs.cluster.show(job)["JobState"] == "PENDING")
    jobs.until(job, lambda: not jobs.cluster.steps(NODES[0]))  # or SLURM finds the job there twice, and holds it
    jobs.cluster.run("scontrol", "update", f"nodename={NODES[0]}", "state=resume")
    jobs.until(job, lambda: jobs.cluster.show(job)["JobState"] == "RUNNING")
    assert jobs.restarts(job) == 1
    done = steps_logged(run)
    jobs.until(job, lambda: steps_logged(run) >= done + 2)
    with jobs.cluster.node_without_power(NODES[1]):
        # The other rank sees it first; SLURM declares the node down somewhat later, and starts the job again when there are two.
        jobs.until(job, lambda: jobs.cluster.show(job)["JobState"] == "PENDING")
        jobs.until(job, lambda: "down" in jobs.cluster.run("sinfo", "-h", "-N", "-n", NODES[1], "-o", "%T"))
    assert jobs.end(job) == "COMPLETED", jobs.log(job)
    assert jobs.restarts(job) >= 2
    assert written(run) == unbroken


def test_rollout_servers_on_a_node_of_the_same_job(jobs: Jobs, tmp_path: Path) -> None:
    values = settings("rlvr", jobs.folder / "run", "trainer.max_steps=6")
    job = jobs.submit("rlvr", *values, flags="--nodes=2", PRISM_NEMO_ROLLOUT_NODES="1")
    jobs.until(job, lambda: steps_logged(jobs.folder / "run") >= 2)

    def servers() -> list[int]:
        return [number for number in jobs.cluster.processes(NODES[1]) if {"-m", "serve"} <= set(_command(number))]

    (server,) = servers()
    os.killpg(os.getpgid(server), signal.SIGTERM)  # as SLURM does before a preemption, while the run saves with its help
    jobs.until(job, lambda: steps_logged(jobs.folder / "run") >= 3)
    assert servers() == [server]
    os.kill(server, signal.SIGKILL)  # it is started again, and gets the weights again
    assert jobs.end(job) == "COMPLETED", jobs.log(job)
    assert jobs.restarts(job) == 0
    assert "it is started again" in jobs.rank_log(job, "server_0")
    metrics, samples = written(jobs.folder / "run")
    expected_metrics, expected_samples = written(run_stage("rlvr", tmp_path / "alone", "trainer.max_steps=6"))
    assert samples == expected_samples
    assert [row["loss"] for row in metrics] == [row["loss"] for row in expected_metrics]


def _command(process: int) -> list[str]:
    return Path(f"/proc/{process}/cmdline").read_text().split("\0")
