"""The job scripts around a run: what they start, what they say, and what they do about every way in which it may end."""

from __future__ import annotations

import subprocess
from pathlib import Path

from slurm.jobs import HOME, Jobs

# A stand-in that saves a step at every start, as a run does, and notes where.
SAVE = (
    "mkdir -p run/checkpoints; echo step_$SLURM_RESTART_COUNT >run/checkpoints/latest; "
    "echo $PWD/run >$PRISM_NEMO_DIRECTORY_FILE; "
)


def test_a_job_says_what_it_runs_and_numbers_its_ranks(jobs: Jobs) -> None:
    job = jobs.stand_in("", "model=qwen3_vl_4b", "data.system_prompt=two words", flags="--nodes=2 --gpus-per-node=2")
    assert jobs.end(job) == "COMPLETED"
    first, *rest = jobs.log(job).splitlines()
    commit = subprocess.run(["git", "-C", HOME, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    for part in (f"job {job}: prism-nemo align model=qwen3_vl_4b data.system_prompt=two\\ words on 2 node(s) prism-a,prism-b",
                 "2 rank(s) each", f"commit {commit}", "container none"):  # fmt: skip
        assert part in first
    assert rest[-1].endswith("finished")
    asked = "align model=qwen3_vl_4b data.system_prompt=two words"
    assert [jobs.rank_log(job, f"rank_{rank}") for rank in range(4)] == [
        f"{asked}: rank {rank} of 4, local {rank % 2}, on prism-{'ab'[rank // 2]}, start 0, GPUs 0,1\n" for rank in range(4)
    ]
    assert jobs.rank_log(job).strip() in rest  # the first rank's words stand in the job's log too


def test_what_fails_is_tried_again_and_given_up_without_progress(jobs: Jobs) -> None:
    crashing = jobs.stand_in("exit 3", "experiment.dir=run1", PRISM_NEMO_MAX_FAILURES="2")
    going_on = jobs.stand_in(
        SAVE + '[[ ${SLURM_RESTART_COUNT:-0} -ge 2 ]] || exit 3', "--config", "mine.yaml", PRISM_NEMO_MAX_FAILURES="1"
    )  # fmt: skip
    assert jobs.end(crashing) == "FAILED"
    assert jobs.restarts(crashing) == 1
    log = jobs.log(crashing)
    assert log.count("rank 0 on prism-") == 2
    assert "with status 3" in log
    assert log.endswith("failed (status 3), as 2 times in a row without progress: it is not started again\n")
    assert jobs.end(going_on) == "COMPLETED"
    assert jobs.restarts(going_on) == 2


def test_a_job_on_a_node_that_is_not_healthy_does_not_start(jobs: Jobs) -> None:
    does = "[[ $SLURMD_NODENAME == prism-a ]] && exit 0; echo a fan has stopped; exit 1"
    job = jobs.stand_in(does, "experiment.dir=run", flags="--nodes=2", PRISM_NEMO_DOCTOR="1")
    assert jobs.end(job) == "FAILED"
    assert jobs.restarts(job) == 0
    assert "doctor align experiment.dir=run: rank 1 of 2" in jobs.log(job)
    assert "a fan has stopped" in jobs.log(job)
    assert not (jobs.folder / "logs" / job / "rank_0.log").exists()


def test_a_mistake_is_told_and_not_tried_again(jobs: Jobs) -> None:
    job = jobs.submit("align", "model.path=nowhere", "data.train=x", "experiment.dir=run", "trainer.max_stpes=2")
    assert jobs.end(job) == "FAILED"
    assert jobs.restarts(job) == 0
    assert "did you mean trainer.max_steps" in jobs.log(job)
    assert "it is not tried again" in jobs.log(job)


def test_a_killed_rank_ends_the_job_which_names_it(jobs: Jobs) -> None:
    does = '[[ -z ${SLURM_RESTART_COUNT:-} ]] || exit 0; [[ $RANK == 1 ]] && kill -9 $$; trap "" TERM USR1; sleep 900'
    job = jobs.stand_in(does, flags="--nodes=2")
    assert jobs.end(job) == "COMPLETED"  # long before the other one's sleep is over
    assert jobs.restarts(job) == 1
    assert "rank 1 on prism-b ended first, with status 137" in jobs.log(job)


def test_an_element_of_an_array_is_requeued_alone(jobs: Jobs) -> None:
    does = '[[ $SLURM_ARRAY_TASK_ID == 7 && -z ${SLURM_RESTART_COUNT:-} ]] && exit 3 || exit 0'  # fmt: skip
    job = jobs.stand_in(does, "runtime.seed=%a", "experiment.dir=runs/%a", flags="--array=6-7")
    for element, restarts in ((6, 0), (7, 1)):
        assert jobs.end(f"{job}_{element}") == "COMPLETED"
        assert jobs.restarts(f"{job}_{element}") == restarts
        assert f"align runtime.seed={element} experiment.dir=runs/{element}:" in jobs.rank_log(f"{job}_{element}")


def test_before_the_end_of_its_time_a_job_saves_and_is_queued_again(jobs: Jobs) -> None:
    does = 'trap "exit 75" USR1; ' + SAVE + "[[ -n ${SLURM_RESTART_COUNT:-} ]] && exit 0; while true; do sleep 0.1; done"
    job = jobs.stand_in(does, "experiment.dir=run", PRISM_NEMO_MAX_FAILURES="1")
    jobs.until(job, (jobs.folder / "run" / "checkpoints" / "latest").exists)
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", job)  # as SLURM does, by --signal=B:USR1@...
    assert jobs.end(job) == "COMPLETED"
    assert jobs.restarts(job) == 1
    assert "SIGUSR1: the run saves" in jobs.log(job)
    assert "told to stop: it is queued again" in jobs.log(job), jobs.log(job)


def test_a_cancelled_job_saves_and_stays_cancelled(jobs: Jobs) -> None:
    does = 'trap "echo saved; exit 75" USR1 TERM; ' + SAVE + "while true; do sleep 0.1; done"
    job = jobs.stand_in(does, "experiment.dir=run")
    jobs.until(job, (jobs.folder / "run" / "checkpoints" / "latest").exists)
    jobs.cluster.run("scancel", job)
    assert jobs.end(job) == "CANCELLED"
    jobs.cluster.wait_until_gone(job)
    assert jobs.end(job) == "CANCELLED"
    assert "SLURM has ended the job" in jobs.log(job)
    assert "saved" in jobs.rank_log(job)


def test_rollout_servers_share_the_gpus_of_the_last_nodes(jobs: Jobs) -> None:
    does = "[[ -z $PRISM_NEMO_SERVE_PORT ]] || { [[ $SLURM_LOCALID == 1 && ! -f died ]] && touch died && exit 9; sleep 900; }; "
    does += "until [[ -f died ]]; do sleep 0.1; done; sleep 3"
    job = jobs.stand_in(
        does, "experiment.dir=run", flags="--nodes=2 --gpus-per-node=4",
        PRISM_NEMO_ROLLOUT_NODES="1", PRISM_NEMO_ROLLOUT_SERVERS="2", PRISM_NEMO_RANKS="1",
    )  # fmt: skip
    assert jobs.end(job) == "COMPLETED"
    words = jobs.rank_log(job).split()
    (urls,) = [word for word in words if word.startswith("rollout.servers.urls=")]
    ports = [int(url.rsplit(":", 1)[1]) for url in urls.removeprefix("rollout.servers.urls=[").removesuffix("]:").split(",")]
    assert ports == [ports[0], ports[0] + 1]
    assert "rank 0 of 1" in jobs.rank_log(job)
    assert not (jobs.folder / "logs" / job / "rank_1.log").exists()
    for number in range(2):
        log = jobs.rank_log(job, f"server_{number}")
        assert "serve --of align experiment.dir=run" in log
        assert f"serve.host=0.0.0.0 serve.port={ports[number]}:" in log
        assert "on prism-b" in log
        assert f"GPUs {'0,1' if number == 0 else '2,3'}" in log
    assert "ended with status 9: it is started again" in jobs.rank_log(job, "server_1")


def test_the_scripts_pass_their_command_and_need_their_checkout(jobs: Jobs, tmp_path: Path) -> None:
    scripts = ["sft", "pairs", "warmup", "rlvr", "eval", "generate", "convert"]
    started = {script: jobs.stand_in("", "--given", "x", script=script) for script in scripts}
    lost = jobs.stand_in("", PRISM_NEMO_HOME=str(HOME / "docs"))
    for script, job in started.items():
        assert jobs.end(job) == "COMPLETED"
        assert jobs.rank_log(job).startswith(f"{script} --given x: rank 0 of 1")
    assert jobs.end(lost) == "FAILED"
    status, said = jobs.call("align")
    assert status == 2
    assert "sbatch slurm/align.sh" in said
