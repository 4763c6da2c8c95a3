"""Equality of expressions by computer algebra: math-verify's parser of LaTeX, numbers at many points, math-verify's comparison.

Only worker processes load this: a short expression may take hours or all memory. What is written with integrals, sums, limits or
towers of powers is no answer and is not looked at.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy
from latex2sympy2_extended.latex2sympy2 import ConversionConfig
from sympy.core.cache import clear_cache
from sympy.core.relational import Relational

from prism_nemo.rewards.quantity import is_rounded_from, parse_quantity, stands_for
from prism_nemo.rewards.text import closing

_DIGITS = 30  # of evaluation
_TOLERANCE = 1e-12  # relative; decimals inside expressions are read as binary fractions
_LEAST_POINTS = 3
_POINTS = ("0.7310", "1.6180", "2.2361", "0.3679", "3.3166", "-0.5772", "-1.4427", "-2.6651")
_MAX_NESTING = 40
_TOO_MUCH = re.compile(
    r"\\(?:int|iint|oint|sum|prod|lim|partial|mathcal)(?![A-Za-z])|\d{60}|\^\s*\{?\s*[+-]?\d{4}|!\s*!|[)}]\s*!|\d{3}!"
    r"|\d\s*_|\^[^\s+\-*/]*\^[^\s+\-*/]*\^"
)
_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp"
_LATEX = {"π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "×": r"\times ", "·": r"\cdot ", "÷": r"\div "}
_LATEX |= {"α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "θ": r"\theta ", "λ": r"\lambda ", "μ": r"\mu "}
_LATEX |= {"ρ": r"\rho ", "σ": r"\sigma ", "τ": r"\tau ", "φ": r"\phi ", "ω": r"\omega ", "Δ": r"\Delta ", "Ω": r"\Omega "}
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\*\*", "^"),
        (r"\*", r"\\cdot "),
        (rf"(?<![\\A-Za-z])({_FUNCTIONS})(?![A-Za-z])", r"\\\1 "),
        (r"(\d+(?:\.\d+)?)\s*°", r"{\\frac{\1\\pi}{180}}"),
        (r"\^\s*([+-]?\d+(?:\.\d+)?)", r"^{\1}"),
        (r"(?<=\d),(?=\d{3}(?!\d))", ""),
        (r"\\(log|ln)\s*_\s*(\w+)\s*", r"\\\1_{\2} "),
    )
)
_PLAIN = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False)

_CASE_TELLS = ConversionConfig(lowercase_symbols=False)


def same_expression(given: str, truth: str) -> bool:
    """Whether two expressions, in normal form and without units, are the same. What cannot be read is not."""
    if any(_is_too_much(text) for text in (given, truth)):
        return False
    try:
        return _same(given, truth)
    except MemoryError:
        raise
    except Exception:  # of parsing and algebra, of many kinds: RecursionError, TypeError, OverflowError, the parsers' own
        return False


def forget() -> None:
    """Drops what earlier questions left behind, so that no decision depends on what was asked before."""
    clear_cache()


def _is_too_much(text: str) -> bool:
    depth = deepest = 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return deepest > _MAX_NESTING or depth != 0 or _TOO_MUCH.search(text) is not None


def _same(given: str, truth: str) -> bool:
    written, wanted = _parsed(given), _parsed(truth)
    if isinstance(written, Relational) and isinstance(wanted, Relational):
        return _same_relation(written, wanted)
    if isinstance(written, sympy.Expr) and isinstance(wanted, sympy.Expr):
        if not written.free_symbols and not wanted.free_symbols:
            return _same_number(given, written, truth, wanted)
        verdict = _same_at_points(written, wanted)
        if verdict is not None:
            return verdict
    from math_verify import verify  # here: few questions come this far, and every new worker would pay for it

    return bool(verify(wanted, written, timeout_seconds=None))


def _parsed(text: str) -> Any:
    for symbol, latex in _LATEX.items():
        text = text.replace(symbol, latex)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    return latex2sympy(
        _parentheses_of_exponents(text),
        is_real=not re.search(r"(?<![\\A-Za-z])i(?![A-Za-z])", text),
        normalization_config=_PLAIN,
        conversion_config=_CASE_TELLS,
    )


def _parentheses_of_exponents(text: str) -> str:
    """`x^(n+1)` as `x^{n+1}`."""
    start = text.find("^(")
    while start >= 0:
        end = closing(text, start + 1)
        if end < 0:
            break
        text = f"{text[: start + 1]}{{{text[start + 2 : end]}}}{text[end + 1 :]}"
        start = text.find("^(", start + 1)
    return text


def _same_number(given: str, written: sympy.Expr, truth: str, wanted: sympy.Expr) -> bool:
    """Exactly the same, or one the rounding of the other by the rules for numbers."""
    given_decimal, true_decimal = parse_quantity(given), parse_quantity(truth)
    one, other = _number(written), _number(wanted)
    if one is None or other is None:
        return False
    if _near(one, other):
        return True
    if true_decimal is not None and true_decimal.decimals:
        exact = _fraction(one)
        return exact is not None and is_rounded_from(true_decimal, exact)
    if given_decimal is not None and given_decimal.decimals:
        exact = _fraction(other)
        return exact is not None and stands_for(given_decimal, exact)
    return False


def _same_relation(written: Relational, wanted: Relational) -> bool:
    """The same equation or inequality, up to a factor: 2x - y = 0 and y = 2x."""
    if isinstance(written, (sympy.Eq, sympy.Ne)) != isinstance(wanted, (sympy.Eq, sympy.Ne)):
        return False
    one, other = (relation.lhs - relation.rhs for relation in (written, wanted))
    symbols = _ordered(one.free_symbols | other.free_symbols)
    ratios = []
    for point in range(len(_POINTS)):
        values = _values(symbols, point)
        top, bottom = _number(one, values), _number(other, values)
        if top is not None and bottom is not None and abs(bottom) > 1e-9 and abs(top) > 1e-9:
            ratios.append(top / bottom)
    if len(ratios) < _LEAST_POINTS or not all(_near(ratio, ratios[0]) for ratio in ratios):
        return False
    if isinstance(wanted, (sympy.Eq, sympy.Ne)):
        return type(written) is type(wanted)
    return type(written if sympy.re(ratios[0]) > 0 else written.reversedsign) is type(wanted)


def _same_at_points(written: sympy.Expr, wanted: sympy.Expr) -> bool | None:
    """Whether they have the same values; None where too few values can be had to tell."""
    symbols = _ordered(written.free_symbols | wanted.free_symbols)
    points = 0
    for point in range(len(_POINTS)):
        values = _values(symbols, point)
        one, other = _number(written, values), _number(wanted, values)
        if one is None or other is None:
            continue
        complex_values = abs(sympy.im(one)) > 1e-20 or abs(sympy.im(other)) > 1e-20
        if not _near(one, other):
            if not complex_values:
                return False
            continue
        points += 1
    return True if points >= _LEAST_POINTS else None


def _ordered(symbols: set[sympy.Basic]) -> list[sympy.Basic]:
    return sorted(symbols, key=str)


def _values(symbols: list[sympy.Basic], point: int) -> dict[sympy.Basic, sympy.Float]:
    """Each symbol another value at each point, all of one sign: powers of sums are then mostly real."""
    sign = [value for value in _POINTS if value.startswith("-") == _POINTS[point].startswith("-")]
    return {
        symbol: sympy.Float(sign[(point + 3 * index) % len(sign)], _DIGITS) + sympy.Rational(index, 7)
        for index, symbol in enumerate(symbols)
    }


def _number(expression: sympy.Expr, values: dict[sympy.Basic, sympy.Float] | None = None) -> sympy.Expr | None:
    """Its value, a real or complex number; None when there is none."""
    value = expression.doit().evalf(_DIGITS, subs=values or {})
    return value if value.is_number and value.is_finite and all(part.is_Number for part in value.as_real_imag()) else None


def _near(one: sympy.Expr, other: sympy.Expr) -> bool:
    largest = max(abs(one), abs(other))
    return bool(abs(one - other) <= _TOLERANCE * largest) or (bool(largest < 1e-20) and sympy.S.Zero in (one, other))


def _fraction(value: sympy.Expr) -> Fraction | None:
    return Fraction(str(value)) if value.is_Float or value.is_Rational else None
