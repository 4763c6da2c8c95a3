"""`prism-nemo report DIR`: the table and the curves of a pipeline's run directory, or the curves of one stage's."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from prism_nemo.errors import PrismError
from prism_nemo.report.curves import draw_curves
from prism_nemo.report.table import render_markdown, render_table
from prism_nemo.run_directory import write_atomically

SUMMARY = "summary.json"


def run(run_dir: Path) -> None:
    """Prints the table of `run_dir`/summary.json and writes report.md and curves.png beside it, each where there is data.

    Raises PrismError when the directory does not exist or holds neither a summary nor metrics.
    """
    if not run_dir.is_dir():
        raise PrismError("no such run directory", where=str(run_dir))
    console = Console()
    summary = run_dir / SUMMARY
    if summary.is_file():
        try:
            content = json.loads(summary.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise PrismError(f"not JSON: {error}", where=str(summary)) from error
        console.print(render_table(content))
        write_atomically(run_dir / "report.md", render_markdown(content))
        console.print(f"table:  {run_dir / 'report.md'}", soft_wrap=True, highlight=False)
    if draw_curves(run_dir, run_dir / "curves.png"):
        console.print(f"curves: {run_dir / 'curves.png'}", soft_wrap=True, highlight=False)
    elif not summary.is_file():
        raise PrismError(
            f"nothing to report: neither {SUMMARY} nor a stage with metrics",
            where=str(run_dir),
            remedy="name the directory of a pipeline or of a stage",
        )
