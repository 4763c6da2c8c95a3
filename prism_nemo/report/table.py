"""A pipeline's summary.json as a table: for the terminal (rich), and as Markdown.

    {
      "<arm>": {"accuracy", "caption_accuracy", "format_rate",            at temperature 1, on held-out problems
                "greedy": {"accuracy", "caption_accuracy", "format_rate"},
                "steps", "seconds"},                                      of the arm's own last stage; may be absent
      "discriminator": {…},         health: numbers, nested or named like/this; one part may be a segment kind
      "seed", "steps", "seconds"    of the whole pipeline
    }

Whatever is absent is shown as a dash; an arm is every entry that has an accuracy.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from prism_nemo.printable import printable
from prism_nemo.report.arms import in_order

MEASURES = (("accuracy", "answer"), ("caption_accuracy", "caption"), ("format_rate", "format"))
HEADINGS = (
    "arm",
    *(f"{label} T=1" for _, label in MEASURES),
    *(f"{label} greedy" for _, label in MEASURES),
    "steps",
    "time",
)
SEGMENTS = ("perception", "reasoning")
DASH = "–"


def render_table(summary: Mapping[str, Any]) -> Group:
    """The summary as something that rich prints."""
    arms = _table("Held-out problems, sampled at temperature 1 (T=1) and greedy")
    for heading in HEADINGS:  # on two lines: the table fits into 80 columns
        arms.add_column(heading.replace(" ", "\n"), justify="left" if heading == "arm" else "right", no_wrap=True)
    for row in arm_rows(summary):
        arms.add_row(*map(_cell, row))
    parts: list[Table | Text] = [arms]
    health = health_rows(summary)
    if health:
        table = _table("Discriminator")
        for heading in ("", *SEGMENTS, "all"):
            table.add_column(heading, justify="right" if heading else "left")
        for row in health:
            table.add_row(*map(_cell, row))
        parts.append(table)
    parts.append(Text(_about(summary)))
    return Group(*parts)


def render_markdown(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown: the same tables."""
    sections = [_markdown_table(HEADINGS, arm_rows(summary))]
    health = health_rows(summary)
    if health:
        sections.append(_markdown_table(("discriminator", *SEGMENTS, "all"), health))
    sections.append(_about(summary))
    return "\n\n".join(sections) + "\n"


def arm_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row per arm, cells under `HEADINGS`."""
    arms = {
        key: value
        for key, value in summary.items()
        if isinstance(value, Mapping) and "accuracy" in value and key != "discriminator"
    }
    rows = []
    for arm in in_order(set(arms)):
        result = arms[arm.key]
        greedy = result.get("greedy", {})
        figures = [_share(source.get(name)) for source in (result, greedy) for name, _ in MEASURES]
        steps = result.get("steps")
        rows.append((arm.label, *figures, DASH if steps is None else str(steps), _duration(result.get("seconds"))))
    return rows


def health_rows(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row per figure of the discriminator's health: name, perception, reasoning, and the figure that is of neither."""
    rows: dict[str, dict[str, float]] = {}
    for name, value in _leaves(summary.get("discriminator", {})):
        parts = name.split("/")
        if "histogram" in parts:  # in summary.json; too many rows for a table
            continue
        column = next((part for part in parts if part in SEGMENTS), "all")
        rows.setdefault("/".join(part for part in parts if part != column), {})[column] = value
    return [(name, *(_share(columns.get(column)) for column in (*SEGMENTS, "all"))) for name, columns in rows.items()]


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value


def _about(summary: Mapping[str, Any]) -> str:
    known = [f"{name} {summary[name]}" for name in ("seed", "steps") if isinstance(summary.get(name), int)]
    if isinstance(summary.get("seconds"), int | float):
        known.append(f"{_duration(summary['seconds'])} in all")
    return ", ".join(known)


def _share(value: float | None) -> str:
    return DASH if value is None else f"{value:.3f}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return DASH
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"


def _markdown_table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    rule = ["---", *("---:" for _ in headings[1:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (map(as_cell, headings), rule, *(map(as_cell, row) for row in rows)))


def as_cell(text: str) -> str:
    """A cell of a Markdown table: names come from files, and Markdown may hold HTML."""
    return html.escape(printable(text), quote=False).replace("|", r"\|")


def _cell(text: str) -> Text:
    """A cell for the terminal, in which nothing is markup."""
    return Text(printable(text))
