"""Records that cannot be used: counted, listed, skipped, and an error past a set share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prism_nemo.errors import DataError
from prism_nemo.printable import printable

_LISTED = 5
_MIN_TRIED = 1000  # records that the share of bad ones is taken of, at least (or all of the file, where that is less)


@dataclass(frozen=True)
class BadRecord:
    """One record that was left out: its id, where it stands (file and line, or image), and why."""

    id: str
    where: str
    reason: str

    def __str__(self) -> str:
        """On one line."""
        return printable(f"{self.id} [{self.where}]: {self.reason}")

    @classmethod
    def from_error(cls, record_id: str, where: str, error: DataError) -> BadRecord:
        """The record that `error` is about. A remedy that the error knows is part of the reason."""
        reason = f"{error.what} ({error.remedy})" if error.remedy else error.what
        return cls(record_id, error.where or where, reason)


class BadTally:
    """How many records were tried and how many of them could not be used, over all ranks and all sessions of a run.

    The share is taken of what was tried, at first of `_MIN_TRIED` records: of ten records two may be bad by chance.
    """

    def __init__(self, *, max_share: float, num_records: int) -> None:
        self.max_share = max_share
        self.num_records = num_records
        self.tried = 0
        self.failed = 0
        self._known: dict[str, BadRecord] = {}

    def add(self, tried: int, failed: int, bad: Sequence[BadRecord]) -> None:
        """Counts what all ranks together tried, and what of it failed; `bad`: which these are, for the message.

        Raises DataError, the same on every rank, when too many records cannot be used, or none of the whole file.
        """
        self.tried += tried
        self.failed += failed
        self._known |= {record.id: record for record in bad}
        counted = max(self.tried, min(_MIN_TRIED, self.num_records))
        none_is_good = self.failed == self.tried >= self.num_records
        if none_is_good or self.failed > self.max_share * counted:
            raise _too_many(
                list(self._known.values()), self.failed, self.tried, max_share=self.max_share, where="while encoding records"
            )


def refuse_bad_share(bad: Sequence[BadRecord], *, num_bad: int, num_seen: int, max_share: float, where: str) -> None:
    """Raise a DataError that lists the first bad records when `num_bad / num_seen` is above `max_share`."""
    if num_bad > max_share * num_seen:
        raise _too_many(bad, num_bad, num_seen, max_share=max_share, where=where)


def listing(bad: Sequence[BadRecord]) -> str:
    """The first bad records, one an indented line, and how many there are beside them."""
    listed = "\n".join(f"    {record}" for record in bad[:_LISTED])
    return listed + (f"\n    and {len(bad) - _LISTED} more" if len(bad) > _LISTED else "")


def _too_many(bad: Sequence[BadRecord], num_bad: int, num_seen: int, *, max_share: float, where: str) -> DataError:
    return DataError(
        f"{num_bad} of {num_seen} records cannot be used, more than the allowed share of {max_share:g}:\n{listing(bad)}",
        where=where,
        remedy="mend or remove these records, or allow more with data.max_bad_sample_share",
    )
