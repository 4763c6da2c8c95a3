"""Stages on every rollout engine: the same run on each, and the next batch generated ahead."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from helpers.stages import run_stage, tiny_task, write_tiny_model

from prism_nemo.experiment import read_metrics

VLLM = ("rollout.engine=vllm", "rollout.vllm.draws=shared", "rollout.vllm.kv_cache_gb=0.1")
SEPARATE = ("rollout.placement=separate",)
AHEAD = (*SEPARATE, "rollout.max_staleness=1", "algorithm.policy_loss.rollout_correction=token")


@cache
def wide_policy() -> Path:
    """A trained policy with heads that vLLM's CPU kernels know."""
    root = tiny_task().model.parent
    write_tiny_model(root / "wide", head_dim=32)
    return run_stage("sft", root / "wide_sft", f"model.path={root / 'wide'}")


def rlvr(directory: Path, *overrides: str) -> list[dict[str, Any]]:
    return run("rlvr", directory, "runtime.seed=1", *overrides)


def run(stage: str, directory: Path, *overrides: str) -> list[dict[str, Any]]:
    """Its metrics, without times and what became of servers."""
    run_stage(stage, directory, f"model.path={wide_policy()}", *overrides)
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "servers/"))} for row in read_metrics(directory)]


def same_but_for_the_sampler(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> None:
    """The rollouts are the same, so all that is trained is the same to the last digit; what the samplers computed is near.

    (A random number within 1e-7 of the edge between two tokens would part the runs: with this seed there is none.)
    """
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if name.startswith("mismatch/"):
                assert other[name] == pytest.approx(value, abs=1e-6), name
            else:
                assert other[name] == value, name


@pytest.mark.vllm
def test_a_run_on_vllm_is_the_run_on_megatron(tmp_path: Path) -> None:
    same_but_for_the_sampler(rlvr(tmp_path / "megatron"), rlvr(tmp_path / "vllm", *VLLM))


@pytest.mark.vllm
def test_stages_of_one_process_use_one_engine_after_the_other(tmp_path: Path) -> None:
    """A pipeline's stages would each leave one behind. What the stage before left in it does not show."""
    from prism_nemo.rollout.vllm import start

    first = rlvr(tmp_path / "first", *VLLM, "trainer.max_steps=2")
    engines = len(start._engines)
    assert rlvr(tmp_path / "second", *VLLM, "trainer.max_steps=2") == first
    assert len(start._engines) == engines


@pytest.mark.vllm
def test_and_on_servers_of_vllm(tmp_path: Path) -> None:
    same_but_for_the_sampler(rlvr(tmp_path / "megatron"), rlvr(tmp_path / "vllm", *VLLM, *SEPARATE))


@pytest.mark.vllm
def test_alignment_on_vllm(tmp_path: Path) -> None:
    runs = [run("align", tmp_path / name, "trainer.max_steps=3", *values) for name, values in (("megatron", ()), ("vllm", VLLM))]
    same_but_for_the_sampler(*runs)


def test_servers_give_the_run_that_training_processes_give(tmp_path: Path) -> None:
    same_but_for_the_sampler(rlvr(tmp_path / "separate", *SEPARATE), rlvr(tmp_path / "colocated"))


@pytest.mark.parametrize(("stage", "first"), [("align", "discriminator/loss"), ("rlvr", "reward")])
def test_one_step_off(stage: str, first: str, tmp_path: Path) -> None:
    """The first step is the synchronous one; the others train on rollouts of the weights before, weighted for that."""
    ahead, sync = (
        [row for row in run(stage, tmp_path / name, *values) if row["prefix"] == "train"]
        for name, values in (("ahead", AHEAD), ("sync", SEPARATE))
    )
    assert len(ahead) == len(sync) > 2
    assert [row["staleness"] for row in ahead] == [0.0, *[1.0] * (len(ahead) - 1)]
    assert all(row["staleness"] == 0.0 for row in sync)
    assert ahead[0][first] == sync[0][first]
    assert sync[1]["mismatch/abs_log_ratio"] < 1e-5 < ahead[1]["mismatch/abs_log_ratio"]


@pytest.mark.parametrize("stage", ["align", "rlvr"])
def test_one_step_off_goes_on_exactly_where_it_stopped(stage: str, tmp_path: Path) -> None:
    """What was begun for the next step before the stop is trained on after it, and nothing is sampled twice."""
    overrides = (*AHEAD, "optimizer.lr_decay_style=constant", "trainer.max_steps=4", "trainer.save_interval=2")
    if stage == "align":
        overrides += ("discriminator_optimizer.lr_decay_style=constant",)
    whole, stopped = (run(stage, tmp_path / name, *overrides) for name in ("whole", "stopped"))
    assert stopped == whole
    checkpoints = tmp_path / "stopped" / "checkpoints"
    (checkpoints / "latest").write_text("step_00000002")
    saved = json.loads((checkpoints / "step_00000002" / "trainer.json").read_text())
    assert len(saved["trainer"]["begun"]) == 16
    assert run(stage, tmp_path / "stopped", *overrides) == whole


def test_one_step_off_with_groups_that_are_replaced(tmp_path: Path) -> None:
    """All generation batches of a step are of the same weights; the same run again is the same."""
    dapo = ("algorithm=dapo", "algorithm.overlong_buffer_length=8", "optimizer.lr_warmup_iters=0", "trainer.max_steps=3")
    once, again = (rlvr(tmp_path / name, *AHEAD, *dapo) for name in ("once", "again"))
    assert once == again
    assert [row["staleness"] for row in once] == [0.0, 1.0, 1.0]
    assert max(row["dynamic_sampling/generation_batches"] for row in once) > 1
