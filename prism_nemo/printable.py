"""Text of others, made safe to show: a terminal obeys control characters, and a log is read line by line."""

from __future__ import annotations

import logging


def printable(text: object, *, lines: bool = False) -> str:
    r"""The text with every character that does not print (control and format characters, lone surrogates) written as \x1b, ….

    Bidirectional overrides are among them. With `lines` line breaks and tabs stay; otherwise the result is one line.
    """
    text = str(text)
    if text.isprintable():
        return text
    kept = "\n\t" if lines else ""
    return "".join(one if one in kept or one.isprintable() else _escaped(one) for one in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class PrintableFormatter(logging.Formatter):
    """A log's lines hold what clients and servers sent."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)
