"""How often a policy solves a prompt: `pass_rates.jsonl` of a run of `curate`, {"id", "solved", "of"} a line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from prism_nemo.data.records import Record
from prism_nemo.errors import DataError


@dataclass(frozen=True)
class PassRate:
    """`solved` of `of` tries."""

    solved: int
    of: int

    @property
    def share(self) -> float:
        return self.solved / self.of


def read_pass_rates(path: Path, records: Mapping[int, Record]) -> dict[int, PassRate]:
    """The pass rate of every record, by its number. Raises DataError where the file does not tell it, or twice, or no rate."""
    by_id: dict[str, PassRate] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            record_id, rate = _parsed(line, where)
            if by_id.setdefault(record_id, rate) != rate:
                raise DataError(f"a second, other pass rate of {record_id}", where=where, remedy="ids name one record each")
    missing = [record.id for record in records.values() if record.id not in by_id]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(records)} records have no pass rate, the first of them is {missing[0]}",
            where=str(path),
            remedy="sample them (curate.pass_rates=null with model.path), with the settings of curate as they were in that run",
        )
    return {number: by_id[record.id] for number, record in records.items()}


def _parsed(line: str, where: str) -> tuple[str, PassRate]:
    try:
        row = json.loads(line)
        record_id, solved, of = row["id"], row["solved"], row["of"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError("the line is no pass rate", where=where, remedy='{"id": …, "solved": 0, "of": 8}') from error
    if not isinstance(record_id, str) or type(solved) is not int or type(of) is not int or not 0 <= solved <= of or of < 1:
        raise DataError("the line is no pass rate", where=where, remedy='{"id": …, "solved": 0, "of": 8}')
    return record_id, PassRate(solved, of)


def pass_rate_lines(records: Sequence[Record], rates: Mapping[int, PassRate]) -> str:
    rows = ({"id": records[number].id, "solved": rate.solved, "of": rate.of} for number, rate in sorted(rates.items()))
    return "".join(json.dumps(row) + "\n" for row in rows)
