"""Equality of expressions by computer algebra: math-verify's parser and comparison. Only worker processes load this."""

from __future__ import annotations

from latex2sympy2_extended import latex2sympy
from math_verify import verify


def same_expression(given: str, truth: str) -> bool:
    try:
        return bool(verify(latex2sympy(truth), latex2sympy(given), timeout_seconds=None))
    except Exception:
        return False


def forget() -> None:
    """Drops what earlier questions left behind."""
