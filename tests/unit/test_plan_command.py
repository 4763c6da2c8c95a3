"""`prism-nemo plan` as a user meets it."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.qwen3_vl_configs import official_config, tiny_config

from prism_nemo import cli
from prism_nemo.config.compose import load_config
from prism_nemo.config.layers import GLOBAL_PACKAGE
from prism_nemo.config.layout import discriminator_layout
from prism_nemo.config.schema import AlignConfig, ParallelConfig
from prism_nemo.errors import LayoutError
from prism_nemo.plan.activations import Recompute
from prism_nemo.plan.command import GivenLayout, add_arguments, parse_layout, read_job
from prism_nemo.plan.layouts import Layout, describe_layout, layout_of
from prism_nemo.plan.search import RECOMPUTE, candidates, evaluate, search
from prism_nemo.plan.shapes import OFFICIAL_SIZES

GIB = 1 << 30


def plan(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What the command prints as JSON."""
    assert cli.main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(["plan", *arguments]) == 2
    return capsys.readouterr().err


def arguments(*given: str) -> argparse.Namespace:
    parser = cli.Parser("plan")
    add_arguments(parser)
    return parser.parse_args(given)


def run_alone(*arguments: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """The command in a process of its own and the packages it imported."""
    code = (
        "import sys; from prism_nemo.cli import main; status = main(sys.argv[1:]);"
        "print(*sys.modules, file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, env={**os.environ, "RANK": "0"}
    )
    modules = done.stderr.splitlines()[-1]
    return done, {name.partition(".")[0] for name in modules.split()}


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["plan", "--help"], 0),
        (["plan", "--model", "9B", "--stage", "sft"], 2),
        (["plan", "--model", "8B", "--stage", "sft"], 0),
    ],
)
def test_help_mistakes_and_a_whole_search_import_nothing_heavy(arguments: list[str], status: int) -> None:
    done, modules = run_alone(*arguments)
    assert done.returncode == status
    assert not modules & {"torch", "megatron", "transformers", "numpy"}


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--help"]) == 0
    text = capsys.readouterr().out
    parser = cli.Parser("plan")
    add_arguments(parser)
    for action in parser._actions:
        assert f"  {action.option_strings[0]} " in text or f"  {action.option_strings[0]}\n" in text
    for size in OFFICIAL_SIZES:
        assert size in text


def test_the_table_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "--model", "8B", "--stage", "align", "--gpu", "h200")
    assert found["models"] == {"8B": 8767123696, "2B discriminator with 4 experts": 5298657280}
    for layout in found["plans"]:
        memory = layout["memory"]
        peak = memory["phases"][memory["peak_phase"]]
        assert peak["total"] == max(phase["total"] for phase in memory["phases"].values())
        assert peak["total"] == pytest.approx(sum(value for name, value in peak.items() if name != "total"))
        assert memory["total"] == pytest.approx(sum(memory["state"].values()) + peak["total"] + memory["overhead"])
        assert layout["fits"] and memory["total"] <= memory["capacity"] == 139.7 * GIB
        phases = {name: value for name, value in layout["seconds"].items() if name not in ("total", "communication")}
        assert layout["seconds"]["total"] == pytest.approx(sum(phases.values()))
    times = [layout["seconds"]["total"] for layout in found["plans"]]
    assert times == sorted(times)


def test_defaults_are_the_stages_own_settings(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "--model", "2B", "--stage", "rlvr", "--gpu", "h200")["workload"]
    stage = load_config("rlvr", ["model.path=m", "data.train=t.jsonl", "experiment.dir=d"])
    expected = {
        "prompt_tokens": stage.data.max_prompt_length,
        "response_tokens": stage.data.max_response_length,
        "rollouts": stage.rollout.num_rollouts_per_prompt,
        "global_batch": stage.trainer.global_batch_size,
        "row_tokens": stage.trainer.max_tokens_per_row,
        "max_batch_size": stage.rollout.max_batch_size,
    }
    assert {name: found[name] for name in expected} == expected


def test_text_shows_the_best_in_full_and_the_others_in_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", "Qwen3-VL-8B-Instruct", "--stage", "rlvr", "--gpu", "h200", "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("rlvr of 8B (8.77B parameters) on 1 x 8 h200 (139.7 GiB each)")
    assert any(line.startswith("  policy: weights") for line in lines)
    assert any("<- the peak" in line for line in lines)
    assert any("sampling needs rollout.max_batch_size=" in line for line in lines)
    assert any("not verified on hardware" in line for line in lines)
    assert len(lines) - next(i for i, line in enumerate(lines) if line.startswith("  layout ")) == 3


@pytest.mark.parametrize("stage", ["sft", "rlvr"])
def test_the_best_layout_becomes_a_file_that_loads(stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine.yaml"
    found = plan(capsys, "--model", "4B", "--stage", stage, "--out", str(out))
    written = yaml.safe_load(out.read_text())
    overrides = [f"parallel.{key}={value}" for key, value in written.items()]
    required = ["model.path=m", "data.train=t.jsonl", "experiment.dir=d", "trainer.max_steps=1"]
    assert asdict(load_config(stage, [*required, *overrides]).parallel) == found["plans"][0]["parallel"]
    assert cli.main(["plan", "--model", "4B", "--stage", stage, "--out", str(out)]) == 0  # the same again does no harm
    assert "the file exists" in error(capsys, "--model", "2B", "--stage", stage, "--out", str(out))


def test_a_given_layout(capsys: pytest.CaptureFixture[str]) -> None:
    [layout] = plan(capsys, "--model", "30B-A3B", "--stage", "sft", "--gpu", "b200", "--layout", "tp=2,ep=4,sp=true")["plans"]
    assert layout["parallel"]["expert_model_parallel_size"] == 4 and layout["parallel"]["use_distributed_optimizer"]
    assert (layout["layout"], layout["data_parallel_size"]) == ("tp=2 ep=4 sp", 4)


BOTH = ["--layout", "tp=4,ep=8,sp", "--discriminator-layout", "tp=2,sp,recompute=mlp"]


def test_a_layout_of_each_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "mine.yaml"
    asked = ["--model", "30B-A3B", "--stage", "align", "--gpu", "b200", "--out", str(out)]
    [layout] = plan(capsys, *asked, *BOTH)["plans"]
    own = layout["discriminator"]
    assert layout["layout"] == "tp=4 ep=8 sp; discriminator tp=2 sp recompute=mlp"
    assert (layout["data_parallel_size"], own["data_parallel_size"], layout["recompute"], own["recompute"]) == (
        2,
        4,
        "none",
        "mlp",
    )

    # as an option of `parallel`, which it is to be copied to: both sections of align, no keys of the others
    assert out.read_text().startswith(GLOBAL_PACKAGE)
    loaded = load_config(
        "align", ["model.path=m", "discriminator.path=d", "data.train=t.jsonl", "experiment.dir=d"], config_file=out
    )
    assert isinstance(loaded, AlignConfig)
    assert asdict(loaded.parallel) == layout["parallel"]
    assert asdict(discriminator_layout(loaded)) == {**own["parallel"], "as_policy": False}


def test_a_discriminators_layout_is_searched_where_it_is_not_given(capsys: pytest.CaptureFixture[str]) -> None:
    """A policy of 128 experts beside a discriminator of 4: far quicker with experts over more ranks than 4."""
    asked = ["--model", "30B-A3B", "--stage", "align", "--nodes", "2", "--top", "1000"]
    plans = plan(capsys, *asked)["plans"]
    apart = [found for found in plans if found["discriminator"]]
    shared = [found for found in plans if not found["discriminator"]]
    assert apart[0]["parallel"]["expert_model_parallel_size"] == 16
    assert all(found["parallel"]["expert_model_parallel_size"] <= 4 for found in shared)
    if shared:
        assert apart[0]["seconds"]["total"] < shared[0]["seconds"]["total"]
    fixed = plan(capsys, *asked, "--discriminator-layout", "tp=4,sp,recompute=full")["plans"]
    assert {found["discriminator"]["layout"] for found in fixed} == {"tp=4 sp recompute=full"}
    assert fixed[0]["seconds"]["total"] >= plans[0]["seconds"]["total"]


def test_the_search_leaves_no_better_layout_of_the_discriminator_out() -> None:
    """Against all of them beside every layout of the policy: what is not looked at is slower, or does not fit."""
    job = read_job(arguments("--model", "4B", "--stage", "align", "--gpus-per-node", "4", "--gpu", "a100"))
    found = {describe_layout(Layout(plan.parallel, plan.settings)): plan for plan in search(job)}
    for layout in candidates(job):
        every = []
        for tp, ep, again in itertools.product((1, 2, 4), (1, 2, 4), RECOMPUTE):
            own = layout_of(job.settings, tp=tp, ep=ep, replicas=4 // tp, recompute=again)
            with suppress(LayoutError):
                every.append(evaluate(job, layout, own))
        with suppress(LayoutError):
            every.append(evaluate(job, layout))
        fitting = [plan.time.total for plan in every if plan.fits]
        kept = found.get(describe_layout(layout))
        assert (kept is not None) == bool(every)
        assert (kept is not None and kept.fits) == bool(fitting)
        if fitting and kept:
            assert kept.time.total == min(fitting)


def test_offloading_names_both_optimizers(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["plan", "--model", "2B", "--stage", "align", "--gpu", "b200", "--global-batch", "8", "--layout"]
    assert cli.main([*asked, "offload"]) == 0
    text = capsys.readouterr().out
    assert "with optimizer.cpu_offload=true" in text and "with discriminator_optimizer.cpu_offload=true" in text
    assert cli.main([*asked, "tp=1", "--discriminator-layout", "tp=2,offload"]) == 0
    text = capsys.readouterr().out
    assert "with optimizer.cpu_offload" not in text and "with discriminator_optimizer.cpu_offload=true" in text


def test_a_given_layout_that_does_not_fit_is_shown_and_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--model", "8B", "--stage", "sft", "--layout", "tp=1"]) == 2
    captured = capsys.readouterr()
    assert "DOES NOT FIT" in captured.out
    assert "the layout does not fit" in captured.err and "this one does: " in captured.err


def test_when_nothing_fits_the_error_says_how_much_is_missing_and_what_would_help(capsys: pytest.CaptureFixture[str]) -> None:
    told = error(capsys, "--model", "32B", "--stage", "sft", "--gpus-per-node", "4")
    assert told.startswith("prism-nemo: nothing fits")
    assert "GiB more than it has" in told and "where: 1 x 4 h100 with 79.1 GiB each" in told
    [nodes] = [int(part.split()[0]) for part in told.split("--nodes ")[1:]]
    assert cli.main(["plan", "--model", "32B", "--stage", "sft", "--gpus-per-node", "4", "--nodes", str(nodes)]) == 0


def test_a_models_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(official_config("4B")))
    assert (
        plan(capsys, "--model", str(tmp_path), "--stage", "sft")["plans"]
        == plan(capsys, "--model", "4B", "--stage", "sft")["plans"]
    )
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(moe=True)))
    assert plan(capsys, "--model", str(tmp_path), "--stage", "sft", "--gpus-per-node", "2")["plans"]


def test_a_warmed_up_discriminators_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its configuration has the experts already."""
    from prism_nemo.config.schema import DiscriminatorConfig
    from prism_nemo.convert.upcycling import upcycled_config

    (tmp_path / "config.json").write_text(json.dumps(upcycled_config(official_config("2B"), DiscriminatorConfig(num_experts=8))))
    found = plan(capsys, "--model", "4B", "--stage", "align", "--discriminator", str(tmp_path), "--gpu", "h200")
    fresh = plan(capsys, "--model", "4B", "--stage", "align", "--experts", "8", "--gpu", "h200")
    assert list(found["models"].values()) == list(fresh["models"].values())


NEITHER = "`8` is neither a directory nor an official size\n  where: --model\n  remedy: did you mean 8B?"
NO_FIGURES = "there are no figures for a GPU called `h20`\n  where: --gpu\n  remedy: did you mean h200?"
NO_HEADS = "32 attention heads do not divide by a tensor-parallel size of 3"
OWN_EXPERTS = (
    "4 experts do not divide by an expert-parallel size of 8\n  where: discriminator_parallel.expert_model_parallel_size"
)
SHARED_EXPERTS = "use a divisor of 4, such as 4; or cut the discriminator differently: --discriminator-layout"
TOO_MANY = "8 ranks cannot hold models of 16 ranks (tensor 16 x pipeline 1 x context 1)\n  where: discriminator_parallel.tensor"
NO_EXPERTS = "the model has no experts to distribute\n  where: parallel.expert_model_parallel_size, 8B"
NO_LAYOUT = "no layout of 1 model(s) divides over 7 GPUs with a global batch of 3"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "sft"], "the following arguments are required: --model"),
        (["--model", "8", "--stage", "sft"], NEITHER),
        (["--model", "8B", "--stage", "sftt"], "argument --stage: invalid choice"),
        (["--model", "8B", "--stage", "sft", "--gpu", "h20"], NO_FIGURES),
        (["--model", "8B", "--stage", "sft", "--layout", "tp=x"], "`tp=x` is not part of a layout"),
        (["--model", "8B", "--stage", "sft", "--layout", "tp=3", "--gpus-per-node", "6"], NO_HEADS),
        (["--model", "8B", "--stage", "sft", "--layout", "tp=16"], "8 ranks cannot hold models of 16 ranks"),
        (["--model", "2B", "--stage", "sft", "--layout", "offload", "--precision", "fp32"], "only a bf16 model's optimizer"),
        (["--model", "8B", "--stage", "sft", "--nodes", "0"], "argument --nodes: 0 is not a positive number"),
        (["--model", "8B", "--stage", "sft", "--row-tokens", "4096"], "a row of 4096 tokens does not hold a prompt of 2048"),
        (["--model", "8B", "--stage", "sft", "--image-tokens", "3000"], "a prompt of 2048 tokens cannot have 3000 visual ones"),
        (["--model", "8B", "--stage", "sft", "--layout", "ep=2"], NO_EXPERTS),
        (["--model", "8B", "--stage", "align", "--layout", "ep=2", "--discriminator-layout", "tp=1"], NO_EXPERTS),
        (["--model", "8B", "--stage", "align", "--discriminator-layout", "ep=8"], OWN_EXPERTS),
        (["--model", "8B", "--stage", "align", "--layout", "tp=2", "--discriminator-layout", "tp=16"], TOO_MANY),
        (
            ["--model", "8B", "--stage", "align", "--discriminator-layout", "x"],
            "not part of a layout\n  where: --discriminator-lay",
        ),
        (["--model", "8B", "--stage", "rlvr", "--discriminator-layout", "tp=2"], "rlvr does not train two models"),
        (["--model", "8B", "--stage", "sft", "--discriminator", "2B"], "sft has no discriminator"),
        (["--model", "30B-A3B", "--stage", "warmup"], "only a dense model can be upcycled, 30B-A3B has experts already"),
        (["--model", "8B", "--stage", "sft", "--gpus-per-node", "7", "--global-batch", "3"], NO_LAYOUT),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in error(capsys, *arguments)


def test_layouts_are_parsed() -> None:
    given = parse_layout("tp=4,ep=2,sp,dp=2,recompute=full,offload=true")
    assert given == GivenLayout(
        ParallelConfig(tensor_model_parallel_size=4, expert_model_parallel_size=2, sequence_parallel=True), Recompute.full, True
    )


def test_recompute_makes_room(capsys: pytest.CaptureFixture[str]) -> None:
    base = ["--model", "8B", "--stage", "sft", "--gpu", "h200", "--layout"]
    [kept] = plan(capsys, *base, "tp=4,sp")["plans"]
    [again] = plan(capsys, *base, "tp=4,sp,recompute=full")["plans"]
    assert again["memory"]["total"] < kept["memory"]["total"]
    assert again["seconds"]["total"] > kept["seconds"]["total"]
    assert again["parallel"]["recompute_granularity"] == "full"
    [mlp] = plan(capsys, *base, "tp=4,sp,recompute=mlp")["plans"]
    assert again["memory"]["total"] < mlp["memory"]["total"] < kept["memory"]["total"]
    assert (mlp["parallel"]["recompute_granularity"], mlp["parallel"]["recompute_modules"]) == ("selective", ["mlp"])
