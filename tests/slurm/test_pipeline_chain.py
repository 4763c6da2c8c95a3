"""A pipeline as a chain of jobs: the stages of a small demo, one of which fails at first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from helpers.stages import tiny_task
from slurm.jobs import Jobs

from prism_nemo.cli import main

PIPELINE = """
device: cpu
overrides:
  - data.system_prompt=<caption> <think> <answer>
  - data.max_prompt_length=64
  - data.max_response_length=32
  - experiment.progress=false
  - experiment.tensorboard=false
export: rlvr
stages:
  - name: sft
    stage: sft
    overrides: [model.path={model}, model.precision=fp32, "data.train={data.public}", trainer.max_steps=40,
      trainer.global_batch_size=8, optimizer.lr=1e-2, optimizer.lr_decay_style=constant]
  - name: pairs
    stage: pairs
    overrides: ["model.path=${{policy:sft}}", model.precision=fp32, "data.train={data.teacher}", limit_samples=24,
      rollout.num_rollouts_per_prompt=2]
  - name: warm-up
    stage: warmup
    overrides: ["discriminator.path=${{policy:sft}}", discriminator.precision=fp32, "data.train=${{pairs:pairs}}",
      "data.image_root={data.root}", trainer.max_steps=4, trainer.global_batch_size=4]
  - name: align
    stage: align
    overrides: ["model.path=${{policy:sft}}", model.precision=fp32, "discriminator.path=${{discriminator:warm-up}}",
      discriminator.precision=fp32, "data.train={data.teacher}", trainer.max_steps=4, trainer.global_batch_size=4,
      rollout.num_rollouts_per_prompt=4]
  - name: rlvr
    stage: rlvr
    overrides: ["model.path=${{policy:align}}", model.precision=fp32, "data.train={prompts}", trainer.max_steps=2,
      trainer.global_batch_size=4, rollout.num_rollouts_per_prompt=4]
  - name: eval_rlvr
    stage: eval
    overrides: ["model.path=${{policy:rlvr}}", model.precision=fp32, "data.validation={data.test}"]
  - name: eval_sft
    stage: eval
    overrides: ["model.path=${{policy:sft}}", model.precision=fp32, "data.validation={data.test}"]
"""


def stages_submitted(log: str) -> dict[str, str]:
    """Job numbers by stage, from the log of the job that submitted them."""
    words = [line.split() for line in log.splitlines()]
    return {line[2].rstrip(":"): line[4].rstrip(",") for line in words if line[3:4] == ["job"] and line[2].endswith(":")}


def state_of(stage: Path) -> str:
    file = stage / "status.json"
    return str(json.loads(file.read_text())["state"]) if file.exists() else "absent"


def test_a_pipeline_is_a_chain_that_ends_where_a_stage_fails_and_goes_on_there(jobs: Jobs, tmp_path: Path) -> None:
    task = tiny_task()
    prompts = tmp_path / "prompts" / "prompts.jsonl"
    (jobs.folder / "mine.yaml").write_text(PIPELINE.format(model=task.model, data=task.data, prompts=prompts))
    arguments = ("--config", "mine.yaml", "experiment.dir=runs/mine")
    flags = {"PRISM_NEMO_SBATCH": "--gpus-per-node=1", "PRISM_NEMO_SBATCH_warm_up": "--nodes=2"}

    first = jobs.submit("pipeline", *arguments, **flags)
    assert jobs.end(first) == "COMPLETED", jobs.log(first)
    stages = stages_submitted(jobs.log(first))
    assert list(stages) == ["sft", "pairs", "warm-up", "align", "rlvr", "eval_rlvr", "eval_sft", "END"]
    run = jobs.folder / "runs" / "mine"
    jobs.until(stages["sft"], lambda: state_of(run / "sft") == "running")
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", stages["sft"])  # out of time: the others wait on
    status, said = jobs.call("pipeline", *arguments, **flags)
    assert status == 2
    assert f"jobs of this pipeline are there still: wait for them, or scancel {stages['sft']} " in said
    ends = {name: jobs.end(job) for name, job in stages.items()}
    assert ends == {
        **dict.fromkeys(("sft", "pairs", "warm-up", "align", "eval_sft"), "COMPLETED"),
        "rlvr": "FAILED",  # its prompts are not there yet
        **dict.fromkeys(("eval_rlvr", "END"), "CANCELLED"),
    }, jobs.log(first)
    assert jobs.restarts(stages["sft"]) == 1
    assert jobs.cluster.show(stages["warm-up"])["NumNodes"] == "2"
    assert str(prompts) in (jobs.folder / f"mine-rlvr-{stages['rlvr']}.log").read_text()

    shutil.copytree(task.data.root, prompts.parent)
    status, said = jobs.call("pipeline", *arguments, **flags)  # as on a login node
    assert status == 0, said
    stages = stages_submitted(said)
    assert list(stages) == ["rlvr", "eval_rlvr", "END"]
    assert jobs.end(stages["END"]) == "COMPLETED", jobs.log(stages["END"])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["rlvr"]["steps"] == 2
    assert summary["sft"]["steps"] == 40
    assert (run / "report.md").exists()
    assert main(["convert", "verify", "--hf", str(run / "hf"), "--checkpoint", str(run / "rlvr"), "--tensors-only"]) == 0


def test_end_names_the_stages_that_are_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "mine.yaml"
    task = tiny_task()
    config.write_text(PIPELINE.format(model=task.model, data=task.data, prompts=task.data.prompts))
    assert main(["pipeline", "--config", str(config), f"experiment.dir={tmp_path / 'run'}", "--end"]) == 2
    assert "not finished: sft, pairs, warm-up" in capsys.readouterr().err
