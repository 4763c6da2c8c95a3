"""The shipped models and recommended layouts: each planned, fitting by that plan, and written as the plan says."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from prism_nemo.config.compose import load_config, options_for
from prism_nemo.config.layers import conf_root, option_names
from prism_nemo.config.layout import discriminator_layout
from prism_nemo.config.schema import AlignConfig
from prism_nemo.plan.hardware import ASSUMPTIONS, GPUS
from prism_nemo.plan.recommended import RECOMMENDED, Recommendation, file_text, plan_stage
from prism_nemo.plan.shapes import OFFICIAL_SIZES, read_shape

REQUIRED = {
    "sft": ["data.train=t.jsonl", "experiment.dir=d", "trainer.max_steps=1"],
    "align": ["discriminator.path=p", "data.train=t.jsonl", "experiment.dir=d"],
    "rlvr": ["data.train=t.jsonl", "experiment.dir=d"],
}


@pytest.mark.parametrize("recommended", RECOMMENDED, ids=lambda recommended: recommended.name)
def test_a_recommended_layout_fits_and_is_what_a_stage_loads(recommended: Recommendation) -> None:
    for stage in recommended.stages:
        job, plan = plan_stage(recommended, stage)
        assert plan.fits, f"{stage} needs {-plan.spare / 2**30:.1f} GiB more"
        assert job.cluster.gpu.name == recommended.gpu and job.cluster.world_size == 8 * recommended.nodes
        model = f"qwen3_vl_{recommended.size.lower().replace('-', '_')}"
        config = load_config(stage, [f"model={model}", f"parallel={recommended.name}", *REQUIRED[stage]])
        assert asdict(config.parallel) == asdict(plan.parallel)
        if isinstance(config, AlignConfig):
            assert config.discriminator_parallel.as_policy == (plan.own is None)
            cut = {**asdict(discriminator_layout(config)), "as_policy": None}
            assert cut == {**asdict((plan.own or plan).parallel), "as_policy": None}
        assert job.workload.row_tokens == config.trainer.max_tokens_per_row


@pytest.mark.parametrize("recommended", RECOMMENDED, ids=lambda recommended: recommended.name)
def test_the_file_says_what_the_plan_says(recommended: Recommendation) -> None:
    """`python -m prism_nemo.plan.recommended` writes the files anew after a change of the plan or of a stage's settings."""
    assert (conf_root() / "parallel" / f"{recommended.name}.yaml").read_text(encoding="utf-8") == file_text(recommended)


def test_layouts_of_two_models_are_options_of_align_alone() -> None:
    apart = [recommended.name for recommended in RECOMMENDED if recommended.own]
    assert apart == [name for name in (recommended.name for recommended in RECOMMENDED) if "_align_" in name]
    assert {option for option in option_names("parallel") if option not in options_for("sft", "parallel")} == set(apart)
    assert options_for("align", "parallel") == option_names("parallel")


def test_every_size_has_a_model_and_layouts_on_one_kind_of_cluster_or_several() -> None:
    assert {recommended.size for recommended in RECOMMENDED} == set(OFFICIAL_SIZES)
    planned = {name for name in option_names("parallel") if name.startswith("qwen3_vl_")}
    assert planned == {recommended.name for recommended in RECOMMENDED}
    for size in OFFICIAL_SIZES:
        for stage in REQUIRED:
            assert any(recommended.size == size and stage in recommended.stages for recommended in RECOMMENDED)
        config = load_config("sft", [f"model=qwen3_vl_{size.lower().replace('-', '_')}", *REQUIRED["sft"]])
        assert read_shape(config.model.path).name == size  # the path's name says the size


def test_the_documentation_has_every_assumption_and_gpu() -> None:
    text = (Path(__file__).parents[2] / "docs" / "planning.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    for name, value in asdict(ASSUMPTIONS).items():
        [row] = [row for row in rows if row[0].startswith(f"`{name}`")]
        assert float(row[1]) == value
    for gpu in GPUS.values():
        [row] = [row for row in rows if row[0] == gpu.name]
        numbers = [gpu.memory_gib, gpu.bf16_tflops, gpu.memory_tb_s, gpu.nvlink_gb_s, gpu.network_gb_s]
        assert [float(cell) for cell in row[1:]] == numbers
