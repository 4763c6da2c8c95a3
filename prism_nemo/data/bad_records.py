"""Records that cannot be used: counted, listed, skipped, and an error past a set share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prism_nemo.errors import DataError

_LISTED = 5


@dataclass(frozen=True)
class BadRecord:
    """One record that was left out: its id, where it stands (file and line, or image), and why."""

    id: str
    where: str
    reason: str

    @classmethod
    def from_error(cls, record_id: str, where: str, error: DataError) -> BadRecord:
        """The record that `error` is about. A remedy that the error knows is part of the reason."""
        reason = f"{error.what} ({error.remedy})" if error.remedy else error.what
        return cls(record_id, error.where or where, reason)


def refuse_bad_share(bad: Sequence[BadRecord], *, num_bad: int, num_seen: int, max_share: float, where: str) -> None:
    """Raise a DataError that lists the first bad records when `num_bad / num_seen` is above `max_share`."""
    if num_bad <= max_share * num_seen:
        return
    listed = "\n".join(f"    {record.id} [{record.where}]: {record.reason}" for record in bad[:_LISTED])
    more = f"\n    and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
    raise DataError(
        f"{num_bad} of {num_seen} records cannot be used, more than the allowed share of {max_share:g}:\n{listed}{more}",
        where=where,
        remedy="mend or remove these records, or allow more with data.max_bad_sample_share",
    )
