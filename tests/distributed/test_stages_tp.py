"""Whole stages on two ranks against one: every way to cut a model, with the optimizer spread, and changing the layout.

All runs on two ranks happen in one launch, which holds one outer session as the pipeline does. In fp32 the numbers agree up to
rounding, the sampled texts exactly.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from helpers.rows import one_rank
from helpers.stages import MODULES, assert_same_metrics, run_stage, settings, trained_policy, written
from torch import Tensor

from prism_nemo.config.compose import load_config
from prism_nemo.config.enums import Device, Precision
from prism_nemo.config.schema import DiscriminatorConfig, ParallelConfig, RuntimeConfig
from prism_nemo.engine.runtime import initialize, session
from prism_nemo.models.discriminator import DiscriminatorModel
from prism_nemo.models.weights import export_hf_tensors

STEPS = 3
TP = ("parallel.tensor_model_parallel_size=2",)
SP = (*TP, "parallel.sequence_parallel=true")
DP: tuple[str, ...] = ()
PP = ("parallel.pipeline_model_parallel_size=2",)
CP = ("parallel.context_parallel_size=2",)
EP = ("parallel.expert_model_parallel_size=2",)  # the discriminator's experts over two data-parallel ranks
APART = ("discriminator_parallel.as_policy=false",)
SPREAD = ("parallel.use_distributed_optimizer=true",)
VALIDATED = ("trainer.val_check_interval=2", "trainer.limit_val_samples=7")  # a number that does not divide


@dataclass(frozen=True)
class Case:
    """A stage, what it is asked beside `settings`, and the layout of the two ranks."""

    stage: str
    overrides: tuple[str, ...]
    layout: tuple[str, ...]


SHORT = (f"trainer.max_steps={STEPS}",)
DEDICATED = "discriminator.routing=dedicated"
# Groups are drawn, replaced and dealt to the ranks anew: which ones, and into which mini-batch, must not depend on the ranks.
DAPO = (
    "algorithm=dapo",
    "algorithm.generation_batch_size=6",
    "algorithm.overlong_buffer_length=16",
    "algorithm.num_mini_batches=2",
    "algorithm.policy_loss.kl_coefficient=0.01",
    "algorithm.policy_loss.rollout_correction=token",
    "optimizer.lr_warmup_iters=0",
)
GSPO = ("algorithm=gspo", "algorithm.num_mini_batches=4", "algorithm.policy_loss.rollout_correction=sequence")
MIXED = ("algorithm.reward=verified_plus_signed", "algorithm.num_mini_batches=2")
CASES = {
    "sft_spread": Case("sft", SHORT, SPREAD),
    "warmup_tp": Case("warmup", (*SHORT, *VALIDATED), TP),
    "warmup_dp": Case("warmup", (*SHORT, *VALIDATED), DP),
    "align_tp": Case("align", (*SHORT, *VALIDATED), TP),
    "align_sp": Case("align", (*SHORT, DEDICATED), SP),
    "align_dp": Case("align", (*SHORT, *VALIDATED), DP),
    "align_spread": Case("align", SHORT, SPREAD),
    "sft_pp": Case("sft", SHORT, PP),
    "sft_cp": Case("sft", SHORT, CP),
    "warmup_ep": Case("warmup", (*SHORT, *VALIDATED), EP),
    "align_pp": Case("align", (*SHORT, *VALIDATED), PP),
    "align_cp": Case("align", (*SHORT, *VALIDATED), CP),
    "align_ep": Case("align", (*SHORT, "discriminator.routing=dedicated"), EP),
    "align_tp_beside_dp": Case("align", (*SHORT, *VALIDATED), (*TP, *APART)),
    "align_dp_beside_tp": Case("align", SHORT, (*APART, "discriminator_parallel.tensor_model_parallel_size=2")),
    "align_pp_beside_ep": Case("align", SHORT, (*PP, *APART, "discriminator_parallel.expert_model_parallel_size=2")),
    "rlvr_pp": Case("rlvr", SHORT, PP),
    "rlvr_tp": Case("rlvr", SHORT, TP),
    "rlvr_dp": Case("rlvr", (*SHORT, "trainer.max_tokens_per_row=100"), DP),  # the ranks have different numbers of rows
    "rlvr_dapo_tp": Case("rlvr", (*SHORT, *DAPO), TP),
    "rlvr_dapo_dp": Case("rlvr", (*SHORT, *DAPO), DP),
    "rlvr_gspo_dp": Case("rlvr", (*SHORT, *GSPO), DP),
    "rlvr_dr_grpo_dp": Case("rlvr", (*SHORT, "algorithm=dr_grpo"), DP),
    "align_mixed_tp": Case("align", (*SHORT, *MIXED), TP),
    "align_mixed_dp": Case("align", (*SHORT, *MIXED), DP),
}

# Runs that change their layout: behind step 2 from one rank to two, behind step 4 back.
MOVES = {
    "sft_tp": Case("sft", (), TP),
    "sft_tp_bf16": Case("sft", ("model.precision=bf16",), TP),
    "sft_dp": Case("sft", (), DP),
    "sft_spread": Case("sft", SPREAD, DP),
    "align_tp": Case("align", (), TP),
    "align_pp": Case("align", (), PP),
    "align_ep": Case("align", SPREAD, EP),
    "sft_cp": Case("sft", SPREAD, CP),
    "rlvr_dp": Case("rlvr", (), DP),
}
MOVED_STEPS = (2, 4, 6)


def steps(count: int) -> tuple[str, str]:
    """A constant rate: `max_steps` may change from session to session, and the schedule with it."""
    return f"trainer.max_steps={count}", "optimizer.lr_decay_style=constant"


UPCYCLED = DiscriminatorConfig(precision=Precision.fp32, expert_noise_std=0.1, router_init_std=0.2)


def upcycled_weights(path: str, parallel: ParallelConfig) -> dict[str, Tensor]:
    runtime = initialize(parallel, RuntimeConfig(device=Device.cpu))
    model = DiscriminatorModel(replace(UPCYCLED, path=path), parallel, runtime, seed=4)
    return {name: tensor.clone() for name, tensor in export_hf_tensors(model.chunks, model.hf_config, score_head=True)}


def on_two_ranks(jobs: list[tuple[str, list[str]]], upcycle_from: str) -> dict[str, Tensor]:
    """Runs stages, each given by its name and settings; what they measure lies in their run directories."""
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    with session(parallel, RuntimeConfig(device=Device.cpu)):
        weights = upcycled_weights(upcycle_from, parallel)
        for stage, overrides in jobs:
            importlib.import_module(f"prism_nemo.stages.{MODULES.get(stage, stage)}").run(load_config(stage, overrides))
    return weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("two_ranks")


@cache
def dedicated_discriminator(folder: Path) -> Path:
    return run_stage("warmup", folder / "dedicated_warmup", DEDICATED)


def given(case: Case, folder: Path) -> tuple[str, ...]:
    """What the case is asked, with a discriminator that was warmed up alike."""
    if DEDICATED in case.overrides:
        return (*case.overrides, f"discriminator.path={dedicated_discriminator(folder)}")
    return case.overrides


@pytest.fixture(scope="module")
def launched(folder: Path) -> list[dict[str, Tensor]]:
    """Everything that runs on two ranks, after the first sessions of the runs that move."""
    jobs = [(case, settings(case.stage, folder / name, *given(case, folder), *case.layout)) for name, case in CASES.items()]
    for name, case in MOVES.items():
        run = folder / "moved" / name
        run_stage(case.stage, run, *case.overrides, *steps(MOVED_STEPS[0]))
        jobs.append((case, settings(case.stage, run, *case.overrides, *case.layout, *steps(MOVED_STEPS[1]))))
    jobs.append((Case("eval", (), DP), settings("eval", folder / "eval", "limit_samples=7", "rollout.max_batch_size=2")))
    jobs.sort(key=lambda job: next(iter(job[0].layout), ""), reverse=True)  # building the groups anew takes its time
    return run_ranks(on_two_ranks, 2, [(case.stage, values) for case, values in jobs], str(trained_policy()), timeout_seconds=400)


def texts(samples: list[dict[str, Any]]) -> dict[tuple[int, str], list[str]]:
    """Responses by step and record."""
    found: dict[tuple[int, str], list[str]] = {}
    for row in samples:
        found.setdefault((row["step"], row["id"]), []).append(row["response"])
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_stage_on_two_ranks_measures_what_one_rank_does(name: str, launched: list[Mapping[str, Any]], folder: Path) -> None:
    case = CASES[name]
    metrics, samples = written(folder / name)
    run = folder / "one_rank" / f"{case.stage} {' '.join(case.overrides)}".replace("/", "-")
    if not run.exists():
        run_stage(case.stage, run, *given(case, folder))
    expected_metrics, expected_samples = written(run)
    trained = [row for row in metrics if row["prefix"] == "train"]
    assert len(trained) == STEPS
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in trained)
    for row in (*metrics, *expected_metrics):
        if any("num_mini_batches" in override for override in case.overrides):
            row.pop("ratio_is_one", None)  # whether a ratio near 1 is exactly 1 is a matter of rounding
    assert_same_metrics(metrics, expected_metrics, 1e-4)
    if case.stage == "rlvr":  # before rounding has grown through updates, the loss over ranks is the loss of one
        assert metrics[0]["loss"] == pytest.approx(expected_metrics[0]["loss"], rel=0, abs=1e-6)
    assert len(samples) == len(expected_samples)
    assert texts(samples) == texts(expected_samples)


@pytest.mark.parametrize("name", MOVES)
def test_a_run_goes_on_at_another_layout_and_back(name: str, launched: list[Mapping[str, Any]], folder: Path) -> None:
    """Weights, moments and step counters are cut and put together again; without any of them the losses would part."""
    case = MOVES[name]
    moved = folder / "moved" / name
    assert max(row["step"] for row in written(moved)[0]) == MOVED_STEPS[1]
    run_stage(case.stage, moved, *case.overrides, *steps(MOVED_STEPS[2]))
    stayed = run_stage(case.stage, folder / "stayed" / name, *case.overrides, *steps(MOVED_STEPS[2]))
    metrics, expected = ([row for row in written(run)[0] if row["prefix"] == "train"] for run in (moved, stayed))
    assert len(metrics) == MOVED_STEPS[2]
    assert_same_metrics(metrics, expected, 3e-2 if "bf16" in name else 3e-4)


def test_an_evaluations_samples_are_of_all_ranks(launched: list[Mapping[str, Any]], folder: Path) -> None:
    alone = run_stage("eval", folder / "eval_alone", "limit_samples=7", "rollout.max_batch_size=2")
    (_, samples), (_, expected) = written(folder / "eval"), written(alone)
    assert len(samples) == len(expected) == 14
    assert sorted(samples, key=str) == sorted(expected, key=str)


def test_upcycling_does_not_depend_on_the_layout(launched: list[Mapping[str, Any]]) -> None:
    one_rank()
    expected = upcycled_weights(str(trained_policy()), ParallelConfig())
    assert "value_head.weight" in expected
    for found in launched:
        assert found.keys() == expected.keys()
        assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []
