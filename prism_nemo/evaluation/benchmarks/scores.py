"""What the benchmarks' scores are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from prism_nemo.data.records import Record
from prism_nemo.evaluation.samples import Sample


@dataclass(frozen=True)
class Result:
    """One response to a record of a benchmark."""

    record: Record
    sample: Sample

    @property
    def answer(self) -> str | None:
        """The text of `<answer>`; None, and so wrong by every rule, where the format is invalid."""
        return self.sample.answer

    def field(self, name: str) -> Any:
        """What the published row says under that name."""
        return self.record.metadata.get(name)


Rule = Callable[[Result], bool]


def by_reward(result: Result) -> bool:
    """Right as the configured reward has it."""
    return result.sample.solved


def accuracy(results: Sequence[Result], right: Rule) -> float:
    return sum(map(right, results)) / len(results) if results else 0.0


def broken_down(results: Iterable[Result], name: str, right: Rule) -> dict[str, dict[str, float | int]]:
    """Accuracy and number of records for each value of a field; a record with a list of values counts under each of them."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        value = result.field(name)
        for one in value if isinstance(value, list | tuple) else [value]:
            if one is not None and one != "":
                groups.setdefault(str(one), []).append(result)
    return {value: {"accuracy": accuracy(group, right), "count": len(group)} for value, group in sorted(groups.items())}


def edit_distance(one: str, other: str) -> int:
    """Levenshtein's: the least number of characters to insert, delete or replace."""
    previous = list(range(len(other) + 1))
    for row, character in enumerate(one, start=1):
        current = [row]
        for column, wanted in enumerate(other, start=1):
            current.append(min(previous[column] + 1, current[-1] + 1, previous[column - 1] + (character != wanted)))
        previous = current
    return previous[-1]


def as_number(text: str) -> float | None:
    """A plain decimal number, commas between digits left out; None for anything else, infinities and NaN included."""
    try:
        value = float(text.replace(",", ""))
    except ValueError:
        return None
    return value if value - value == 0 else None
