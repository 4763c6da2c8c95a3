"""Every YAML file in conf/ is loaded, in the checkout and as a wheel carries it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import prism_nemo
from prism_nemo.config.compose import SCHEMAS, load_config, options_for
from prism_nemo.config.layers import conf_root, group_names, option_names
from prism_nemo.config.ranges import check_ranges

REPOSITORY = Path(prism_nemo.__file__).parent.parent
MANDATORY = {
    "sft": ["model.path=m", "data.train=t.jsonl", "trainer.max_steps=1", "experiment.dir=d"],
    "pairs": ["model.path=m", "data.train=t.jsonl", "experiment.dir=d"],
    "warmup": ["discriminator.path=m", "data.train=t.jsonl", "experiment.dir=d"],
    "align": ["model.path=m", "discriminator.path=p", "data.train=t.jsonl", "experiment.dir=d"],
    "rlvr": ["model.path=m", "data.train=t.jsonl", "experiment.dir=d"],
    "eval": ["model.path=m", "data.validation=t.jsonl", "experiment.dir=d"],
    "curate": ["data.train=t.jsonl", "teacher.base_url=http://localhost:1/v1", "teacher.model=m", "experiment.dir=d"],
    "generate": ["model.path=m", "data.train=t.jsonl", "experiment.dir=d"],
    "serve": ["model.path=m"],
    "pipeline": ["experiment.dir=d"],
}
COMBINATIONS = [
    (stage, f"{group}={option}") for stage in SCHEMAS for group in sorted(group_names()) for option in options_for(stage, group)
]


def test_every_file_belongs_to_a_stage_or_to_a_group_of_one() -> None:
    files = {str(path.relative_to(conf_root())) for path in conf_root().rglob("*.yaml")}
    used = {choice for _, choice in COMBINATIONS}
    assert files == {f"{stage}.yaml" for stage in SCHEMAS} | {f"{choice.replace('=', '/')}.yaml" for choice in used}


@pytest.mark.parametrize("stage", SCHEMAS)
def test_stages_load(stage: str) -> None:
    config = load_config(stage, MANDATORY[stage])
    assert isinstance(config, SCHEMAS[stage])
    check_ranges(config)


@pytest.mark.parametrize(("stage", "choice"), COMBINATIONS)
def test_groups_load_in_every_stage_that_they_fit(stage: str, choice: str) -> None:
    check_ranges(load_config(stage, [*MANDATORY[stage], choice]))


def test_groups_fit_where_they_should() -> None:
    assert options_for("rlvr", "algorithm") == option_names("algorithm") == ["dapo", "dr_grpo", "grpo", "gspo"]
    assert options_for("align", "algorithm") == []
    assert options_for("align", "parallel") == option_names("parallel")
    of_one_model = [name for name in option_names("parallel") if "_align_" not in name]  # the others cut the discriminator too
    assert options_for("sft", "parallel") == options_for("rlvr", "parallel") == of_one_model
    assert {"single", "tp2", "tp2_sp", "tp4", "tp8"} <= set(option_names("parallel"))
    assert options_for("pipeline", "demo") == ["digits", "rlvr"]


def test_a_wheels_files_are_found_inside_the_package(tmp_path: Path) -> None:
    package = tmp_path / "site" / "prism_nemo"
    shutil.copytree(REPOSITORY / "prism_nemo" / "config", package / "config")
    for name in ("__init__.py", "errors.py", "json_files.py", "printable.py"):
        shutil.copy(REPOSITORY / "prism_nemo" / name, package / name)
    shutil.copytree(REPOSITORY / "conf", package / "conf")
    code = (
        "from prism_nemo.config.layers import conf_root; from prism_nemo.config.compose import load_config\n"
        f"print(conf_root()); print(load_config('rlvr', {MANDATORY['rlvr']!r}).trainer.max_steps)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == [str(package / "conf"), "1500"]
