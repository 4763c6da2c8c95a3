"""One picture of a pipeline: how every arm and the discriminator went, from the metrics.jsonl of the stages' folders.

A panel without data is left out, so the same function serves a finished pipeline, a running one and a single stage.
Faint lines are single steps, strong ones their running mean, dots are validation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_nemo.errors import PrismError
from prism_nemo.experiment import METRICS, STATUS, read_metrics
from prism_nemo.json_files import read_json_object
from prism_nemo.report.arms import arm_of, in_order

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3
SMOOTHED_SHARE = 0.08  # of a curve's points: the window of the running mean
SEGMENT_COLORS = {"perception": "#0072b2", "reasoning": "#d55e00"}
CHANCE = {"chance": 0.5}
WANTED = {"chance": 0.5, "wanted": 0.7}


@dataclass(frozen=True)
class Panel:
    title: str
    ylabel: str
    stages: tuple[str, ...]  # kinds of stage whose folders are read
    metric: str  # a pattern of fnmatch; what its "*" stands for names the curve, unless `by_arm`
    by_arm: bool = False  # a curve per arm, on one axis that goes on where the arm before it ended
    share: bool = False  # lies between 0 and 1
    guides: Mapping[str, float] = field(default_factory=dict)  # dotted lines, by what they mean


@dataclass(frozen=True)
class Curve:
    label: str
    color: str | None  # None: the next of the default cycle
    train: list[tuple[float, float]]  # (step, value), finite
    validation: list[tuple[float, float]]


@dataclass(frozen=True)
class StageMetrics:
    """What one stage's folder holds: `rows` as `read_metrics` gives them."""

    name: str
    stage: str
    rows: list[dict[str, Any]]

    @property
    def last_step(self) -> int:
        return max((row["step"] for row in self.rows), default=0)

    def names(self, pattern: str) -> list[str]:
        """The metrics that match, in the order in which they first appear."""
        return [name for name in dict.fromkeys(name for row in self.rows for name in row) if fnmatchcase(name, pattern)]

    def points(self, name: str, prefix: str, offset: int) -> list[tuple[float, float]]:
        return [
            (row["step"] + offset, row[name])
            for row in self.rows
            if row["prefix"] == prefix and name in row and math.isfinite(row[name])
        ]


POLICY = ("align", "rlvr")
PAIRS = "share of pairs, ties left out"
LOAD = "share of the tokens' choices"
PANELS = (
    Panel("SFT: loss", "nats per token", ("sft",), "loss", by_arm=True),
    Panel("Right answers", "share of rollouts", POLICY, "accuracy", by_arm=True, share=True),
    Panel("Right captions", "share of rollouts", POLICY, "caption_accuracy", by_arm=True, share=True),
    Panel("Verified reward", "mean over rollouts", ("rlvr",), "reward", by_arm=True),
    Panel("Valid format", "share of rollouts", POLICY, "format_rate", by_arm=True, share=True),
    Panel("Entropy of the policy", "nats per token", POLICY, "entropy", by_arm=True),
    Panel("Warm-up: discriminator loss", "nats per pair", ("warmup",), "loss"),
    Panel("Warm-up: teacher over student", PAIRS, ("warmup",), "*/accuracy", share=True, guides=CHANCE),
    Panel("Warm-up: content probe", "share of pairs", ("warmup",), "*/content_probe", share=True, guides=WANTED),
    Panel("Game: discriminator loss", "nats per rollout", ("align",), "discriminator/loss"),
    Panel("Game: teacher over student", PAIRS, ("align",), "*/accuracy", share=True, guides=CHANCE),
    Panel("Game: content probe", "share of pairs", ("align",), "*/content_probe", share=True, guides=WANTED),
    Panel("Warm-up: experts of perception", LOAD, ("warmup",), "*expert_load/perception/*"),
    Panel("Warm-up: experts of reasoning", LOAD, ("warmup",), "*expert_load/reasoning/*"),
    Panel("Game: scores of the rollouts", "mean score", ("align",), "*/student_score"),
    Panel("Game: experts of perception", LOAD, ("align",), "*expert_load/perception/*"),
    Panel("Game: experts of reasoning", LOAD, ("align",), "*expert_load/reasoning/*"),
    Panel("Response length", "tokens", POLICY, "response_length", by_arm=True),
)


def draw_curves(run_dir: Path, path: Path) -> bool:
    """Draws the curves of the stages in `run_dir` into `path`, a PNG. False, and no file, when there is nothing to draw.

    Raises PrismError without matplotlib (the extra `report`).
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ModuleNotFoundError as error:
        raise PrismError("drawing curves needs matplotlib", remedy="pip install 'prism-nemo[report]'") from error
    stages = read_stages(run_dir)
    drawable = [(panel, curves) for panel in PANELS if (curves := curves_of(panel, stages))]
    if not drawable:
        return False
    rows = math.ceil(len(drawable) / COLUMNS)
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, hspace=0.04)  # inches, inches, share of a panel
    figure = Figure(figsize=(5.2 * min(COLUMNS, len(drawable)), 3.5 * rows + 0.4), dpi=110, layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(run_dir.resolve().name, fontsize=13, fontweight="bold")
    grid = figure.subplots(rows, min(COLUMNS, len(drawable)), squeeze=False).flatten()
    for axes, (panel, curves) in zip(grid, drawable, strict=False):
        _draw_panel(axes, panel, curves)
    for unused in grid[len(drawable) :]:
        unused.set_visible(False)
    figure.savefig(path)
    return True


def read_stages(run_dir: Path) -> list[StageMetrics]:
    """The stages that have written metrics into `run_dir` or into folders directly below it, arms first, in their order."""
    folders = {
        path.name: path for path in (run_dir, *run_dir.iterdir()) if (path / METRICS).is_file() and (path / STATUS).is_file()
    }
    return [
        StageMetrics(
            name=arm.key,
            stage=str(read_json_object(folders[arm.key] / STATUS).get("stage")),
            rows=read_metrics(folders[arm.key]),
        )
        for arm in in_order(set(folders))
    ]


def curves_of(panel: Panel, stages: Sequence[StageMetrics]) -> list[Curve]:
    """What `panel` shows of these stages; empty when they have none of it."""
    last_steps = {stage.name: stage.last_step for stage in stages}
    shown = [stage for stage in stages if stage.stage in panel.stages]
    curves = []
    for stage in shown:
        arm = arm_of(stage.name)
        offset = last_steps.get(arm.follows, 0) if panel.by_arm and arm.follows else 0
        for name in stage.names(panel.metric):
            kind = _last_wildcard(panel.metric, name)
            color: str | None = arm.color
            if panel.by_arm:
                label = arm.label
            else:
                label, color = kind if len(shown) == 1 else f"{stage.name}: {kind}", SEGMENT_COLORS.get(kind)
            curve = Curve(label, color, stage.points(name, "train", offset), stage.points(name, "validation", offset))
            if curve.train or curve.validation:
                curves.append(curve)
    return curves


def _last_wildcard(pattern: str, name: str) -> str:
    """What `name` has in the place of the last "*" of `pattern`, from its last "/" on: `perception` in `perception/accuracy`."""
    ending = pattern.rpartition("*")[2]
    return name.removesuffix(ending).rpartition("/")[2] if "*" in pattern else name


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and the `window // 2` on either side of it, as far as there are any."""
    reach = window // 2
    neighbours = (values[max(0, index - reach) : index + reach + 1] for index in range(len(values)))
    return [math.fsum(near) / len(near) for near in neighbours]


def _draw_panel(axes: Axes, panel: Panel, curves: Sequence[Curve]) -> None:
    for index, curve in enumerate(curves):
        color = curve.color or f"C{index}"
        label = curve.label
        if curve.train:
            steps, values = zip(*curve.train, strict=True)
            window = max(1, round(len(values) * SMOOTHED_SHARE))
            if window > 1:
                axes.plot(steps, values, color=color, alpha=0.22, linewidth=0.9)
            axes.plot(steps, running_mean(values, window), color=color, linewidth=1.8, label=label)
            label = "_nolegend_"  # named once
        if curve.validation:
            steps, values = zip(*curve.validation, strict=True)
            axes.plot(steps, values, color=color, linewidth=1.0, linestyle="--", marker="o", markersize=4.5, label=label)
    for meaning, level in panel.guides.items():
        axes.axhline(level, color="#888888", linewidth=1.0, linestyle=":")
        box = {"facecolor": "white", "alpha": 0.7, "pad": 1, "lw": 0}
        axes.text(
            1.0,
            level,
            meaning,
            transform=axes.get_yaxis_transform(),
            ha="right",
            va="center",
            fontsize=8,
            color="#555555",
            bbox=box,
        )
    if panel.share:
        axes.set_ylim(-0.02, 1.02)
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel("policy updates since SFT" if panel.by_arm and panel.stages != ("sft",) else "step", fontsize=9)
    axes.set_ylabel(panel.ylabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if panel.by_arm or len(curves) > 1:
        axes.legend(fontsize=8, loc="best", framealpha=0.85)
