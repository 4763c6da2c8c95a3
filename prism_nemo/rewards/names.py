"""What stands before "= 12" when 12 is the answer: a name (`x`, `∠A`, `Area`, `f(3)`), nothing that has still to be solved."""

from __future__ import annotations

import re

from prism_nemo.rewards.text import DENIES, compact, listed

_DECORATION = re.compile(r"\\(?:vec|overline|overrightarrow|hat|widehat|bar|mathcal)\s*\{([\w']{1,20})\}")
_FUNCTION = re.compile(r"\\?\b(?:sin|cos|tan|cot|sec|csc)\s*(?=[^a-z\s])")
_TERM = re.compile(r"[^\W\dπ][\w'{}∠△ ]{0,40}(?:\^\{-1\})?'*(?:\([^()=]{1,15}\))?|[∠△][\w' ]{1,20}|\|[A-Z][\w']{0,5}\|")
_BETWEEN_TERMS = re.compile(r"\s*[+/·×*-]\s*")
_FRACTION = re.compile(r"\\frac\{([^{}]+)\}\{([^{}]+)\}")
_NO_NAMES = frozenset(listed("ln log lg exp sqrt root half twice double triple thrice negative minus plus times or infinity"))


def is_name(text: str) -> bool:
    """Whether a text in normal form is a name, also with an argument or in a trigonometric function."""
    plain = _FUNCTION.sub("", _DECORATION.sub(r"\1", text.strip()), count=1).strip()
    words = re.findall(r"[^\W\d_]+", plain.casefold())
    return _TERM.fullmatch(plain) is not None and _NO_NAMES.isdisjoint(words) and not DENIES.search(plain)


def is_asked_for(text: str) -> bool:
    """Whether it is a name, or a sum, product or quotient of several, whose value questions ask for: `x + y`, not `3x`."""
    if is_name(text):
        return True
    terms = _BETWEEN_TERMS.split(_FRACTION.sub(r"\1/\2", text.strip()))
    return all(is_name(term) for term in terms) and len({compact(term) for term in terms}) == len(terms)
