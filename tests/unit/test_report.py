"""The report: figures in the table's right places, curves read from real run directories, and what happens without data."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console

from prism_nemo.errors import PrismError
from prism_nemo.experiment import Experiment
from prism_nemo.report import command
from prism_nemo.report.curves import PANELS, Panel, curves_of, draw_curves, read_stages, running_mean
from prism_nemo.report.table import arm_rows, health_rows, render_markdown, render_table


def arm(accuracy: float, **more: Any) -> dict[str, Any]:
    greedy = {"accuracy": accuracy + 0.01, "caption_accuracy": accuracy + 0.02, "format_rate": 1.0}
    return {"accuracy": accuracy, "caption_accuracy": accuracy - 0.1, "format_rate": 0.98, "greedy": greedy, **more}


SUMMARY = {
    "seed": 3,
    "sft_rlvr": arm(0.87),
    "ours_too": arm(0.1),
    "sft": arm(0.48, steps=700, seconds=181.6),
    "align": arm(0.75),
    "discriminator": {"warmup": {"probe": {"perception": 0.8125, "reasoning": 0.7}}, "loss": 0.25},
    "steps": 820,
    "seconds": 600.4,
}


def write_stage(directory: Path, stage: str, rows: list[tuple[int, str, dict[str, float]]]) -> None:
    with Experiment(
        directory,
        stage=stage,
        config_yaml="a: 1\n",
        resume=True,
        overwrite=False,
        is_main=True,
        tensorboard=False,
        nemo_exp_manager=None,
        progress=False,
    ) as run:
        for step, prefix, metrics in rows:
            run.log_metrics(step, metrics, prefix=prefix)


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    root = tmp_path / "demo"
    write_stage(root / "rlvr", "rlvr", [(step, "train", {"accuracy": 0.7 + step / 100, "reward": 0.5}) for step in (1, 2, 3)])
    write_stage(
        root / "align",
        "align",
        [
            (1, "train", {"accuracy": 0.5, "discriminator/perception/accuracy": 0.9, "perception/student_score": math.nan}),
            (2, "train", {"accuracy": 0.6, "discriminator/perception/accuracy": 0.8, "perception/student_score": math.inf}),
            (2, "validation", {"accuracy": 0.65, "reasoning/content_probe": 0.75}),
        ],
    )
    write_stage(root / "sft", "sft", [(1, "train", {"loss": 2.0})])
    (root / "pairs").mkdir()  # a stage without metrics
    return root


def panel(title: str) -> Panel:
    (found,) = (panel for panel in PANELS if panel.title == title)
    return found


def test_arms_are_rows_in_their_order_with_both_ways_of_sampling() -> None:
    assert arm_rows(SUMMARY) == [
        ("SFT", "0.480", "0.380", "0.980", "0.490", "0.500", "1.000", "700", "3:02"),
        ("SFT → align", "0.750", "0.650", "0.980", "0.760", "0.770", "1.000", "–", "–"),
        ("SFT → RLVR", "0.870", "0.770", "0.980", "0.880", "0.890", "1.000", "–", "–"),
        ("ours_too", "0.100", "0.000", "0.980", "0.110", "0.120", "1.000", "–", "–"),
    ]


def test_an_arm_without_greedy_figures_shows_dashes() -> None:
    assert arm_rows({"sft": {"accuracy": 0.5}}) == [("SFT", "0.500", *("–",) * 7)]


def test_health_has_a_column_per_segment() -> None:
    assert health_rows(SUMMARY) == [("warmup/probe", "0.812", "0.700", "–"), ("loss", "–", "–", "0.250")]
    flat = {"discriminator": {"align/perception/ties": 0.8, "align/reasoning/ties": 0.7, "expert_load/perception/0": 0.25}}
    assert health_rows(flat) == [("align/ties", "0.800", "0.700", "–"), ("expert_load/0", "0.250", "–", "–")]


def test_the_table_fits_a_terminal_of_80_columns_without_cutting() -> None:
    console = Console(width=80, record=True, file=None, force_terminal=False)
    with console.capture() as capture:
        console.print(
            render_table({**SUMMARY, "rlvr": arm(0.9, steps=60, seconds=50), "sft_rlvr_long": arm(0.9), "sft_teacher": arm(0.8)})
        )
    text = capture.get()
    assert "…" not in text
    assert "SFT → align → RLVR  0.900   0.800  0.980  0.910   0.920  1.000    60 0:50" in text
    assert "seed 3, steps 820, 10:00 in all" in text


def test_markdown_is_a_table_with_equal_cells_in_every_row() -> None:
    arms, health, about = render_markdown(SUMMARY).strip().split("\n\n")
    assert {line.count("|") for line in arms.splitlines()} == {10}
    assert "| SFT | 0.480 | 0.380 | 0.980 | 0.490 | 0.500 | 1.000 | 700 | 3:02 |" in arms
    assert "| warmup/probe | 0.812 | 0.700 | – |" in health
    assert about == "seed 3, steps 820, 10:00 in all"


def test_rlvr_after_alignment_goes_on_where_alignment_ended(pipeline: Path) -> None:
    align, rlvr = curves_of(panel("Right answers"), read_stages(pipeline))
    assert (align.label, align.train, align.validation) == ("SFT → align", [(1, 0.5), (2, 0.6)], [(2, 0.65)])
    assert (rlvr.label, rlvr.train) == ("SFT → align → RLVR", [(3, 0.71), (4, 0.72), (5, 0.73)])
    (reward,) = curves_of(panel("Verified reward"), read_stages(pipeline))
    assert reward.train == [(3, 0.5), (4, 0.5), (5, 0.5)]


def test_discriminator_curves_are_named_by_segment_on_their_own_steps(pipeline: Path) -> None:
    stages = read_stages(pipeline)
    (accuracy,) = curves_of(panel("Game: teacher over student"), stages)
    assert (accuracy.label, accuracy.train) == ("perception", [(1, 0.9), (2, 0.8)])
    (probe,) = curves_of(panel("Game: content probe"), stages)
    assert (probe.label, probe.train, probe.validation) == ("reasoning", [], [(2, 0.75)])


def test_panels_without_a_finite_figure_are_left_out(pipeline: Path) -> None:
    stages = read_stages(pipeline)
    assert [stage.name for stage in stages] == ["sft", "align", "rlvr"]
    assert curves_of(panel("Game: scores of the rollouts"), stages) == []  # only NaN and inf
    assert curves_of(panel("Warm-up: content probe"), stages) == []


def test_running_mean_by_hand() -> None:
    assert running_mean([1.0, 2.0, 6.0, 3.0], 1) == [1.0, 2.0, 6.0, 3.0]
    assert running_mean([1.0, 2.0, 6.0, 3.0], 3) == [1.5, 3.0, 11 / 3, 4.5]


def test_the_picture_has_ink_for_every_arm(pipeline: Path) -> None:
    assert draw_curves(pipeline, pipeline / "curves.png")
    with Image.open(pipeline / "curves.png") as image:
        assert image.format == "PNG" and min(image.size) > 500
        colors = {color for _, color in image.convert("RGB").getcolors(maxcolors=1 << 24)}
    assert {(0x66, 0x66, 0x66), (0x00, 0x72, 0xB2), (0x00, 0x9E, 0x73)} <= colors  # SFT, align, rlvr
    assert (0xE6, 0x9F, 0x00) not in colors  # no SFT -> RLVR here


def test_the_command_writes_table_and_curves(pipeline: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pipeline / "summary.json").write_text(json.dumps(SUMMARY))
    command.run(pipeline)
    assert (pipeline / "report.md").read_text() == render_markdown(SUMMARY)
    assert (pipeline / "curves.png").is_file()
    assert str(pipeline / "curves.png") in capsys.readouterr().out


def test_the_command_takes_one_stage_too(pipeline: Path) -> None:
    command.run(pipeline / "sft")
    assert sorted(path.name for path in (pipeline / "sft").glob("*.[pm][nd]*")) == ["curves.png"]


def test_without_data_or_directory_the_error_names_it(tmp_path: Path) -> None:
    with pytest.raises(PrismError, match="nothing to report") as error:
        command.run(tmp_path)
    assert error.value.where == str(tmp_path) and list(tmp_path.iterdir()) == []
    with pytest.raises(PrismError, match="no such run directory"):
        command.run(tmp_path / "nowhere")


def test_without_matplotlib_the_remedy_is_named(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)  # how Python marks what cannot be imported
    with pytest.raises(PrismError, match="needs matplotlib") as error:
        draw_curves(pipeline, pipeline / "curves.png")
    assert error.value.remedy == "pip install 'prism-nemo[report]'"


# An evaluation

EVALUATED = {
    "accuracy": 0.5,
    "pass@4": 0.75,
    "num_prompts": 8,
    "num_responses": 32,
    "intervals": {"accuracy": [0.25, 0.75]},
    "categories": {"a|b": {"num_prompts": 8, "accuracy": 0.5}},
    "benchmark": {"name": "wemath", "accuracy": 0.25, "problems": 525, "strict": {"score": 0.125}},
    "greedy": {"accuracy": 0.625, "benchmark": {"name": "wemath", "accuracy": 0.5}},
}


def test_an_evaluation_is_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(EVALUATED))
    command.run(tmp_path)
    shown = capsys.readouterr().out
    assert "[0.2500, 0.7500]" in shown and "strict/score" in shown
    markdown = (tmp_path / "report.md").read_text()
    assert "| accuracy | 0.5000 | [0.2500, 0.7500] | 0.6250 | – |" in markdown
    assert "| pass@4 | 0.7500 | – | – | – |" in markdown
    assert "| wemath | sampled | greedy |" in markdown
    assert "| problems | 525 | – |" in markdown and "| strict/score | 0.1250 | – |" in markdown
    assert "| a\\|b | 8 | 0.5000 |" in markdown
    assert not (tmp_path / "curves.png").exists()


def test_an_evaluation_without_greedy_or_categories(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps({"format_rate": 1.0, "num_prompts": 1}))
    command.run(tmp_path)
    assert (
        tmp_path / "report.md"
    ).read_text() == "|  | sampled | 95% interval |\n| --- | ---: | ---: |\n| format_rate | 1.0000 | – |\n"
