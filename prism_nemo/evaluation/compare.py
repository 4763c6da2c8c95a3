"""`prism-nemo compare RUN_A RUN_B`: two evaluations of the same records, record by record. No torch here.

accuracy etc.   difference B - A with a 95% interval: a bootstrap over the records, each with what it is in both runs
better, worse   records whose share of right answers rose or fell; whether that is chance, the exact sign test says, which is
                McNemar's exact test where each record has one response
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from prism_nemo.errors import PrismError
from prism_nemo.evaluation.metrics import CONFIDENCE, resampled_ratios
from prism_nemo.evaluation.samples import Sample
from prism_nemo.experiment import SAMPLES
from prism_nemo.json_files import read_json_object
from prism_nemo.printable import printable
from prism_nemo.run_directory import read_json_lines, write_atomically

RESULT = "evaluation.json"
_LISTED = 10  # flips shown of each kind; all are in the JSON
_RESAMPLES = 10_000

FIGURES: dict[str, Callable[[Sample], float | None]] = {
    "accuracy": lambda sample: sample.correct,
    "format_rate": lambda sample: float(sample.valid),
    "caption_accuracy": lambda sample: None if sample.caption_correct is None else float(sample.caption_correct),
    "caption_f1": lambda sample: sample.caption_f1,
    "response_length": lambda sample: float(sample.tokens),
    "truncated": lambda sample: float(sample.truncated),
}


@dataclass(frozen=True)
class EvaluatedRecord:
    answer: str | None  # the verified one
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Difference:
    """One figure's mean over the records that have it in both runs, and the difference B - A with its 95% interval."""

    a: float
    b: float
    difference: float
    low: float
    high: float
    records: int


@dataclass(frozen=True)
class Comparison:
    """better, worse: ids of the records with more right answers in B, and with fewer; p_value: of the exact sign test on them."""

    records: int
    only_in_a: int
    only_in_b: int
    figures: dict[str, Difference]
    better: list[str]
    worse: list[str]
    p_value: float | None  # None where nothing was graded


def read_run(directory: Path, decoding: str) -> dict[str, EvaluatedRecord]:
    """The records of a finished evaluation, by id, with their responses of one way of decoding.

    Raises PrismError where there is no such evaluation, and where records cannot be told apart by their ids.
    """
    result, file = directory / RESULT, directory / SAMPLES
    if not result.is_file() or not file.is_file():
        raise PrismError(
            "no finished evaluation is here", where=str(directory), remedy="name a directory that `prism-nemo eval` has written"
        )
    summary = read_json_object(result)
    rows: dict[str, list[dict[str, Any]]] = {}
    decodings = set()
    for row in read_json_lines(file):
        decodings.add(str(row.get("decoding")))
        if row.get("decoding") == decoding:
            rows.setdefault(row["id"], []).append(row)
    if not rows:
        known = ", ".join(sorted(decodings)) or "no responses at all"
        raise PrismError(f"there are no {decoding} responses", where=str(file), remedy=f"--decoding, of which there are: {known}")
    if "vote" not in next(iter(rows.values()))[0]:
        raise PrismError("the responses were written by an earlier release", where=str(file), remedy="evaluate again")
    if summary.get("num_prompts") != len(rows):
        raise PrismError(
            f"{summary.get('num_prompts')} records have {len(rows)} different ids, so they cannot be told apart",
            where=str(file),
            remedy="give every record its own id",
        )
    return {name: EvaluatedRecord(group[0]["answer"], tuple(map(Sample.from_row, group))) for name, group in rows.items()}


def compare(
    a: Mapping[str, EvaluatedRecord], b: Mapping[str, EvaluatedRecord], *, common: bool = False, seed: int = 0
) -> Comparison:
    """Compares two runs record by record, in A's order.

    Raises PrismError when the runs have different records, unless only those in `common` are wanted and there are some; and when
    a record has another verified answer in B.
    """
    shared = [name for name in a if name in b]
    only_in_a, only_in_b = [name for name in a if name not in b], [name for name in b if name not in a]
    if (only_in_a or only_in_b) and not (common and shared):
        raise PrismError(
            f"the runs have different records: {len(shared)} in common, {_some('A', only_in_a)}, {_some('B', only_in_b)}",
            remedy="evaluate both on the same records"
            + ("" if common else ", or compare what they have in common with --common"),
        )
    changed = [name for name in shared if a[name].answer != b[name].answer]
    if changed:
        raise PrismError(
            f"{len(changed)} records have another verified answer in B: {', '.join(changed[:_LISTED])}",
            remedy="evaluate both on the same file",
        )
    shares = {name: (_mean(a[name], FIGURES["accuracy"]), _mean(b[name], FIGURES["accuracy"])) for name in shared}
    graded = {name: (x, y) for name, (x, y) in shares.items() if x is not None and y is not None}
    better = [name for name, (x, y) in graded.items() if y > x]
    worse = [name for name, (x, y) in graded.items() if y < x]
    return Comparison(
        records=len(shared),
        only_in_a=len(only_in_a),
        only_in_b=len(only_in_b),
        figures=_differences([a[name] for name in shared], [b[name] for name in shared], seed),
        better=better,
        worse=worse,
        p_value=sign_test(len(better), len(worse)) if graded else None,
    )


def sign_test(better: int, worse: int) -> float:
    """The probability of a split at least as uneven, to either side, if better and worse are equally likely; exact."""
    total = better + worse
    tail = sum(math.comb(total, count) for count in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**total)


def _differences(a: Sequence[EvaluatedRecord], b: Sequence[EvaluatedRecord], seed: int) -> dict[str, Difference]:
    pairs = [[(_mean(x, value), _mean(y, value)) for value in FIGURES.values()] for x, y in zip(a, b, strict=True)]
    known = np.array([[x is not None and y is not None for x, y in row] for row in pairs], dtype=np.float64)  # [records, figures]
    change = np.array([[0.0 if x is None or y is None else y - x for x, y in row] for row in pairs])
    draws = resampled_ratios(change, known, resamples=_RESAMPLES, seed=seed)
    found = {}
    for column, figure in enumerate(FIGURES):
        both = [(x, y) for x, y in (row[column] for row in pairs) if x is not None and y is not None]
        if both:
            mean_a, mean_b = (math.fsum(pair[side] for pair in both) / len(both) for side in (0, 1))
            low, high = np.nanquantile(draws[:, column], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
            difference = math.fsum(change[:, column]) / len(both)
            found[figure] = Difference(mean_a, mean_b, difference, float(low), float(high), len(both))
    return found


def _mean(record: EvaluatedRecord, value: Callable[[Sample], float | None]) -> float | None:
    known = [found for sample in record.samples if (found := value(sample)) is not None]
    return math.fsum(known) / len(known) if known else None


def _some(run: str, names: Sequence[str]) -> str:
    shown = f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})" if names else ""
    return f"{len(names)} only in {run}{shown}"


# The command


def run(run_a: Path, run_b: Path, *, decoding: str, common: bool, json_file: Path | None) -> None:
    """Prints the comparison, and writes it as JSON where that is asked for; with `-` for a file it prints the JSON instead."""
    runs = {"A": run_a, "B": run_b}
    records = {name: read_run(directory, decoding) for name, directory in runs.items()}
    comparison = compare(records["A"], records["B"], common=common)
    named = {name: str(directory) for name, directory in runs.items()}
    content = json.dumps({"runs": named, "decoding": decoding, **asdict(comparison)}, indent=2, ensure_ascii=False)
    if json_file == Path("-"):
        print(content)
        return
    console = Console()
    for name, directory in runs.items():
        responses = sum(len(record.samples) for record in records[name].values())
        about = f"{len(records[name])} records, {responses} {decoding} responses"
        console.print(f"{name}  {directory}: {about}", soft_wrap=True, highlight=False, markup=False)
    console.print(_table(comparison))
    for line in _flips(comparison):
        console.print(line, soft_wrap=True, highlight=False, markup=False)
    if json_file is not None:
        write_atomically(json_file, content + "\n")


def _table(comparison: Comparison) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for heading in ("", "A", "B", "B - A", "95% interval", "n"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, found in comparison.figures.items():
        interval = f"[{found.low:+.4f}, {found.high:+.4f}]".replace("[", r"\[")
        table.add_row(name, f"{found.a:.4f}", f"{found.b:.4f}", f"{found.difference:+.4f}", interval, str(found.records))
    return table


def _flips(comparison: Comparison) -> list[str]:
    if comparison.p_value is None:
        return ["no record has a verified answer"]
    lines = [f"better {len(comparison.better)}, worse {len(comparison.worse)}; exact sign test p = {comparison.p_value:.4g}"]
    for name, ids in (("better", comparison.better), ("worse", comparison.worse)):
        if ids:
            more = f" and {len(ids) - _LISTED} more" if len(ids) > _LISTED else ""
            lines.append(printable(f"{name}: {', '.join(ids[:_LISTED])}{more}"))
    left_out = comparison.only_in_a + comparison.only_in_b
    if left_out:
        lines.append(f"left out: {comparison.only_in_a} records only in A, {comparison.only_in_b} only in B")
    return lines
