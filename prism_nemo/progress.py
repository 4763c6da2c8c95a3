"""A loop over training steps that shows where it is: a bar on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

SECONDS_BETWEEN_LINES = 10.0


class StepProgress:
    """Iterates over the steps `start` to `stop - 1`; `update` sets the figures shown beside the bar.

    for step in experiment.progress_steps(start, stop, "align"):
        ...
        bar.update(loss=loss)

    A silent one (`enabled=False`: other ranks, `experiment.progress=false`) only iterates.
    """

    def __init__(self, start: int, stop: int, description: str, *, enabled: bool) -> None:
        self._start, self._stop = start, stop
        self._description = description
        self._enabled = enabled
        self._figures = ""

    def update(self, **metrics: float) -> None:
        """Replaces the figures shown, in this order. Names may be any string: `update(**{"accuracy/perception": 0.8})`."""
        self._figures = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())

    def __iter__(self) -> Iterator[int]:
        if not self._enabled:
            return iter(range(self._start, self._stop))
        return self._with_bar() if sys.stdout.isatty() else self._with_lines()

    def _with_bar(self) -> Iterator[int]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.table import Column

        figures = TextColumn("{task.fields[figures]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), figures)
        with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as progress:
            task = progress.add_task(self._description, total=self._stop, completed=self._start, figures="")
            for step in range(self._start, self._stop):
                yield step
                progress.update(task, completed=step + 1, figures=self._figures)

    def _with_lines(self) -> Iterator[int]:
        began = last_line = time.monotonic()
        for step in range(self._start, self._stop):
            yield step
            now = time.monotonic()
            done, left = step + 1 - self._start, self._stop - step - 1
            if now - last_line >= SECONDS_BETWEEN_LINES or left == 0:
                last_line = now
                seconds = (now - began) / done
                pace = f"{seconds:.3g} s/step  {_clock(seconds * left)} left" if left else f"{_clock(now - began)} in all"
                print("  ".join(filter(None, (self._description, f"{step + 1}/{self._stop}", self._figures, pace))), flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
