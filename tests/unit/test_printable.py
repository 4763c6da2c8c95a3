"""Nothing that a terminal would obey is shown."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from prism_nemo.data.bad_records import BadRecord, listing
from prism_nemo.errors import DataError
from prism_nemo.printable import PrintableFormatter, printable
from prism_nemo.report import evaluation, table

ESCAPES = "\x1b[2J\x1b]0;title\x07\x9b31m\u202eevil\u2066\x00\x7f\r\b"


@pytest.mark.parametrize("text", ["", "plain", "größer – 数 😀", "a\nb\tc"])
def test_what_prints_stays(text: str) -> None:
    assert printable(text, lines=True) == text


def test_what_does_not_print_is_written_out() -> None:
    assert printable("a\x1b[31m\nb") == r"a\x1b[31m\nb"
    assert printable("a\x1b[31m\nb", lines=True) == "a\\x1b[31m\nb"
    assert printable("\udcff\u202e\x9b") == r"\udcff\u202e\x9b"
    assert printable(ESCAPES).isprintable()


def test_errors_and_listings() -> None:
    error = DataError(f"one {ESCAPES}", where=f"file{ESCAPES}\n  remedy: none", remedy=f"two {ESCAPES}")
    assert all(line.isprintable() for line in str(error).split("\n"))
    assert str(error).count("\n") == 2, "a file's name cannot make lines of its own"
    bad = listing([BadRecord(f"id{ESCAPES}\n", f"where\n{ESCAPES}", f"why\n{ESCAPES}")])
    assert bad.isprintable()


def test_logs() -> None:
    record = logging.LogRecord("name", logging.WARNING, "", 0, "GET %s", (f"/{ESCAPES}",), None)
    assert PrintableFormatter("%(message)s").format(record).isprintable()


NAMES = ["[red]x[/red]", "[link=file:///etc]y[/link]", "[/]", "<script>alert(1)</script>", "a|b", ESCAPES]


@pytest.mark.parametrize("name", NAMES)
def test_reports(name: str) -> None:
    """Names of arms, categories and scores are data: neither rich's markup nor HTML, and no control characters."""
    summary = {name: {"accuracy": 0.5, "seconds": 1}, "discriminator": {name: 0.5}}
    content = {
        "accuracy": 0.5,
        "benchmark": {"name": name, name: 0.5},
        "categories": {name: {"num_prompts": 1, "accuracy": 0.5}},
    }
    for form, value in ((table, summary), (evaluation, content)):
        shown = io.StringIO()
        Console(file=shown, width=200).print(form.render_table(value))
        assert printable(name) in shown.getvalue()
        markdown = form.render_markdown(value)
        assert "<script>" not in markdown
        for text in (shown.getvalue(), markdown):
            assert all(line.isprintable() for line in text.split("\n"))
        rows = [line.replace(r"\|", "").count("|") for line in markdown.splitlines() if line.startswith("|")]
        assert all(count > 2 for count in rows)
