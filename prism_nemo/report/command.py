"""`prism-nemo report DIR`: tables and curves of the run directory of a pipeline, of a stage, or of an evaluation."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from prism_nemo.errors import PrismError
from prism_nemo.experiment import STATUS, state_of
from prism_nemo.json_files import read_json_object
from prism_nemo.report import evaluation, table
from prism_nemo.report.curves import draw_curves
from prism_nemo.run_directory import write_atomically

SUMMARY = "summary.json"
EVALUATION = "evaluation.json"


def run(run_dir: Path) -> None:
    """Prints the tables of `run_dir`/summary.json or evaluation.json and writes report.md and curves.png beside it, each where
    there is data.

    Raises PrismError when the directory does not exist or holds neither a summary, nor an evaluation, nor metrics.
    """
    if not run_dir.is_dir():
        raise PrismError("no such run directory", where=str(run_dir))
    console = Console()
    if (run_dir / STATUS).is_file() and (state := state_of(run_dir)) != "finished":
        console.print(f"the run is not finished: {state}", soft_wrap=True, highlight=False, markup=False)
    found = next((name for name in (SUMMARY, EVALUATION) if (run_dir / name).is_file()), None)
    if found is not None:
        content = read_json_object(run_dir / found)
        form = table if found == SUMMARY else evaluation
        try:
            shown, markdown = form.render_table(content), form.render_markdown(content)
        except (TypeError, ValueError, AttributeError, KeyError) as error:  # a word in the place of a figure, …
            raise PrismError("this is not what a run of this program writes", where=str(run_dir / found)) from error
        console.print(shown)
        write_atomically(run_dir / "report.md", markdown)
        console.print(f"table:  {run_dir / 'report.md'}", soft_wrap=True, highlight=False)
    if draw_curves(run_dir, run_dir / "curves.png"):
        console.print(f"curves: {run_dir / 'curves.png'}", soft_wrap=True, highlight=False)
    elif found is None:
        raise PrismError(
            f"nothing to report: neither {SUMMARY} nor {EVALUATION} nor a stage with metrics",
            where=str(run_dir),
            remedy="name the directory of a pipeline or of a stage",
        )
