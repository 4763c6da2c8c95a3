"""The errors that users see."""

from __future__ import annotations

from prism_nemo.printable import printable


class PrismError(Exception):
    """A mistake in the input, the configuration or the environment, said so that it can be mended.

    `what` went wrong, `where` (a file, a record, a config key) and the `remedy`. The command line prints
    the three and exits with `exit_status`; it shows no traceback. Invariants of our own code are asserts instead.
    They may quote data, file names and servers: as text, what does not print is escaped, and `where` is one line.
    """

    exit_status = 2  # 1 where the same command may well succeed later, so that a job script starts it again

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        lines = [printable(self.what, lines=True)]
        if self.where:
            lines.append(f"  where: {printable(self.where)}")
        if self.remedy:
            lines.append(f"  remedy: {printable(self.remedy, lines=True)}")
        return "\n".join(lines)


class ConfigError(PrismError):
    """A configuration key, value or combination that cannot work."""


class DataError(PrismError):
    """A record, image or data file that cannot be used."""


class CheckpointError(PrismError):
    """A checkpoint that is missing, incomplete or does not fit the model."""


class LayoutError(ConfigError):
    """A parallel layout that the model or the number of ranks does not allow."""
