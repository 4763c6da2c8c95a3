"""An evaluation's evaluation.json as tables: for the terminal (rich), and as Markdown.

Figures with their intervals, sampled and greedy; a benchmark's own scores; figures by category.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from prism_nemo.printable import printable
from prism_nemo.report.table import as_cell

DASH = "–"
DECODINGS = ("sampled", "greedy")
_OF_CATEGORIES = ("accuracy", "caption_accuracy", "format_rate", "response_length")


@dataclass(frozen=True)
class Section:
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]


def render_table(content: Mapping[str, Any]) -> Group:
    """The evaluation as something that rich prints."""
    tables = []
    for section in sections(content):
        table = Table(box=SIMPLE_HEAD, padding=(0, 1))
        for place, heading in enumerate(section.headings):
            table.add_column(Text(printable(heading).replace("_", "\n")), justify="right" if place else "left", no_wrap=True)
        for row in section.rows:
            table.add_row(*(Text(printable(cell)) for cell in row))
        tables.append(table)
    return Group(*tables)


def render_markdown(content: Mapping[str, Any]) -> str:
    """The evaluation as Markdown: the same tables."""
    blocks = []
    for section in sections(content):
        rule = ["---", *("---:" for _ in section.headings[1:])]
        lines = [map(as_cell, section.headings), rule, *(map(as_cell, row) for row in section.rows)]
        blocks.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    return "\n\n".join(blocks) + "\n"


def sections(content: Mapping[str, Any]) -> list[Section]:
    """The tables; those without data are left out."""
    found: dict[str, Mapping[str, Any]] = {"sampled": content}
    if isinstance(content.get("greedy"), Mapping):
        found["greedy"] = content["greedy"]
    result = [Section(("", *(cell for name in found for cell in (name, "95% interval"))), list(_figures(found)))]
    scores = [dict(_leaves(part.get("benchmark", {}))) for part in found.values()]
    if scores[0]:
        name = str(content["benchmark"].get("name", "benchmark"))
        rows = [(score, *(_number(each.get(score)) for each in scores)) for score in scores[0]]
        result.append(Section((name, *found), rows))
    categories = content.get("categories", {})
    if categories:
        names = [name for name in _OF_CATEGORIES if any(name in figures for figures in categories.values())]
        rows = [
            (category, str(figures.get("num_prompts", DASH)), *(_number(figures.get(name)) for name in names))
            for category, figures in categories.items()
        ]
        result.append(Section(("category", "prompts", *names), rows))
    return result


def _figures(found: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    names = dict.fromkeys(name for part in found.values() for name, value in part.items() if isinstance(value, float))
    for name in names:
        cells = []
        for part in found.values():
            low, high = part.get("intervals", {}).get(name, (None, None))
            cells += [_number(part.get(name)), DASH if low is None else f"[{_number(low)}, {_number(high)}]"]
        yield name, *cells


def _leaves(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{name}", value


def _number(value: float | None) -> str:
    if value is None:
        return DASH
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"  # shares, and lengths
