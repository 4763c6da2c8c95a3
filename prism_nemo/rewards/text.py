"""The form in which answers are compared: one way of writing for what Unicode, LaTeX and Markdown write in many."""

from __future__ import annotations

import re
import unicodedata

_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2012\u2013\u2014\ufe63", "-"),
        **dict.fromkeys("\u00ba\u02da", "°"),
        **dict.fromkeys("⋅∙•", "·"),
        **dict.fromkeys("“”„", '"'),
        **dict.fromkeys("‘’", "'"),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff`", ""),
        "⩽": "≤",
        "⩾": "≥",
        "\u2126": "Ω",
        "\u00b5": "μ",
        "∶": ":",
        "⟨": "<",
        "⟩": ">",
        **{chr(wide): chr(wide - 0xFEE0) for wide in range(0xFF01, 0xFF5F)},  # full width
    }
)
_GREEK = "alpha beta gamma delta epsilon theta mu pi rho sigma tau omega"
_OTHERS = (
    "lambda:λ phi:φ varphi:φ Delta:Δ Omega:Ω infty:∞ infinity:∞ le:≤ leq:≤ leqslant:≤ ge:≥ geq:≥ geqslant:≥ ne:≠ neq:≠ lt:<"
    " gt:> approx:≈ times:× cdot:· div:÷ pm:± cup:∪ cap:∩ in:∈ angle:∠ triangle:△ parallel:∥ perp:⊥ degree:° textdegree:°"
    " langle:< rangle:> ldots:… dots:… cdots:…"
)
_SYMBOLS = {
    **{name: unicodedata.lookup(f"GREEK SMALL LETTER {name.upper()}") for name in _GREEK.split()},
    **dict(part.split(":") for part in _OTHERS.split()),
}
_COMMAND = re.compile(r"\\(" + "|".join(sorted(_SYMBOLS, key=len, reverse=True)) + r")(?![A-Za-z]) ?")
_FRACTION_CHARACTER = re.compile(r"(?<=\d)?\s*([\u00bc-\u00be\u2150-\u215e])")
_CURRENCY = "\x01"  # a dollar that is money, while those that delimit LaTeX go
_MONTH = "((?i:january|february|march|april|may|june|july|august|september|october|november|december))"
_REWRITES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[()\[\]!]|\\(?:left|right|displaystyle|textstyle|limits)(?![A-Za-z])", ""),
        (r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])", " "),
        (r"~~[^~]*~~", " "),  # struck out
        (r"(?:(?<![^\s(])|(?<=boxed\{))~(?=[A-Za-z(])", "¬"),
        (r"(?<=\S)~(?=[^\s\d])|\\?~", " "),
        (r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathbb|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\f?box(?:ed)?\s*\{", r"\\boxed{"),
        (r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![A-Za-z])|\\circ(?![A-Za-z])", "°"),
        (r"\s+(?=[°^_])", ""),
        (r"\^\{(\w)\}", r"^\1"),
        (r"\{,\}", ","),
        (r"\\([%{}#&])", r"\1"),
        (r"(?<![\w)*])\*\*(?=\S)([^*]+)\*\*(?![\w(*])", r"\1"),
        (r"(?:√|\\?\bsqrt|\\sqrt)\s*(\d+(?:\.\d+)?|[A-Za-zπ])(?![A-Za-z])", r"\\sqrt{\1}"),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", "π"),
        (r"(?i)(?:\b(negative|minus)\s+)?(?<![A-Za-z\\])infinity(?![A-Za-z])", lambda found: "-∞" if found[1] else "∞"),
        (r"<=", "≤"),
        (r">=", "≥"),
        (r"\.{3,}", "…"),
        (rf"\b(\d{{1,2}})(?:st|nd|rd|th)?\s+(?:of\s+)?{_MONTH}\b", r"\2 \1"),  # dates
        (rf"\b{_MONTH}\s+(?:the\s+)?(\d{{1,2}})(?:st|nd|rd|th)?\b,?(?=\s+\d{{4}}\b)", r"\1 \2"),
        (rf"\b{_MONTH}\s+(?:the\s+)?(\d{{1,2}})(?:st|nd|rd|th)?\b", r"\1 \2"),
    )
)
_ROOT_OF = re.compile(r"(?:√|\\?\bsqrt|\\sqrt)\s*\(")
_QUOTES = {'"': '"', "'": "'"}

DENIES = re.compile(
    r"\b(?:not|never|no longer|neither|nor|isn't|aren't|wasn't|cannot|can't|doesn't|if|unless|unlikely|wrong|incorrect|maybe"
    r"|perhaps|possibly|probably|might)\b",
    re.IGNORECASE,
)
"""Negations and doubts: no part of a sentence with one of them stands for the whole."""


def normalize(text: str) -> str:
    """The comparable form; empty when nothing is left of it."""
    text = " ".join(text.translate(_CHARACTERS).split())
    text = re.sub(r"^#{1,6} ", "", text)  # a heading
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda run: "^{" + "".join(_SUPERSCRIPTS[c] for c in run[0]) + "}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉]+", lambda run: "_" + "".join(_SUBSCRIPTS[c] for c in run[0]), text)
    text = _FRACTION_CHARACTER.sub(lambda one: " " + unicodedata.normalize("NFKC", one[1]).replace("\u2044", "/"), text)
    text = _without_delimiters(text)
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = _COMMAND.sub(lambda command: _SYMBOLS[command[1]], text)
    text = _roots_in_braces(text).replace(_CURRENCY, "$")
    text = " ".join(text.split())
    while True:
        bare = _unwrapped(text)
        if bare == text:
            return text
        text = bare


def closing(text: str, opening: int, *, opens: str = "([{", closes: str = ")]}") -> int:
    """The index of the bracket, of any of these kinds, that closes the one at `opening`; -1 when none does."""
    depth = 0
    for index in range(opening, len(text)):
        depth += (text[index] in opens) - (text[index] in closes)
        if depth == 0:
            return index
    return -1


def split(text: str, separators: re.Pattern[str]) -> list[str]:
    """The parts between separators that stand in no bracket, stripped."""
    depths, depth = [], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        depths.append(depth)
    parts, start = [], 0
    for found in separators.finditer(text):
        if depths[found.start()] == 0:
            parts.append(text[start : found.start()].strip())
            start = found.end()
    parts.append(text[start:].strip())
    return parts


def listed(words: str) -> tuple[str, ...]:
    """Words between white space."""
    return tuple(words.split())


def compact(text: str) -> str:
    """Without white space, but between digits: `5 5` is not `55`."""
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)


_ORDINALS = {
    word: index for index, word in enumerate(listed("- first second third fourth fifth sixth seventh eighth ninth tenth"))
}
_ORDINAL_SUFFIX = re.compile(r"(\d+)(?:st|nd|rd|th)")
_TOKEN = re.compile(r"\d+(?:st|nd|rd|th)\b|\d+(?:[.,:/]\d+)*|\w+|[^\w\s]")
_ABBREVIATION = re.compile(r"\b(?:[a-z]\.){2,}")
_IGNORED_TOKENS = listed("the a an , . ; : ! ? ' \" ( ) -")
_SAYING = (  # what looks like an article or punctuation and is none, under another name
    (re.compile(r"(?<=\S )A(?![\w'])|\b[Aa]$"), "_a"),  # Vitamin A
    (re.compile(r"(?<=[^\W_])-(?![\w-])"), "\u2212"),  # Type O-
    (re.compile(r"(?<=[A-Z])'(?![a-z])"), "\u2032"),  # the image A' of A
)


def words_of(text: str) -> list[str]:
    """Words, numbers and symbols of a text answer: without case, accents, articles and punctuation; ordinals as `1st`."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    for pattern, name in _SAYING:
        plain = pattern.sub(name, plain)
    plain = plain.casefold()
    plain = _ABBREVIATION.sub(lambda found: found[0].replace(".", ""), plain.replace("&", " and ") + ".")
    tokens = [token for token in _TOKEN.findall(plain) if token not in _IGNORED_TOKENS]
    return [f"#{_ORDINALS[t]}" if t in _ORDINALS else _ORDINAL_SUFFIX.sub(r"#\1", t) for t in tokens] or plain.split()


def same_words(given: str, truth: str) -> bool:
    """The same words in the same order; the last may be in the plural."""
    written, wanted = words_of(given), words_of(truth)
    if not wanted or len(written) != len(wanted) or written[:-1] != wanted[:-1]:
        return False
    return singular(written[-1]) == singular(wanted[-1])


def singular(word: str) -> str:
    """Without the ending of a regular plural."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ses", "xes", "ches", "shes")):
        return word[:-2]
    return word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def _without_delimiters(text: str) -> str:
    """`$` goes, but for one that stands for money: written `\\$`, or the only one and before a number."""
    text = re.sub(r"\\\$(?=\s*(?:\\boxed\{)?\s*[\d.])", _CURRENCY, text)
    if text.count("$") == 1:
        text = re.sub(r"\$(?=\s*[\d.])", _CURRENCY, text)
    return text.replace("\\$", "").replace("$", "")


def _roots_in_braces(text: str) -> str:
    """`sqrt(…)` and `√(…)` as `\\sqrt{…}`."""
    while found := _ROOT_OF.search(text):
        end = closing(text, found.end() - 1)
        if end < 0:
            break
        text = text[: found.start()] + r"\sqrt{" + text[found.end() : end] + "}" + text[end + 1 :]
    return text


def _unwrapped(text: str) -> str:
    bare = text.rstrip(".,;: ").lstrip(":; ")
    box = r"\boxed{"
    if bare.startswith(box) and closing(bare, len(box) - 1, opens="{", closes="}") == len(bare) - 1:
        bare = bare[len(box) : -1].strip()
    if len(bare) > 2 and bare[0] in _QUOTES and bare[-1] == _QUOTES[bare[0]] and bare.count(bare[0]) == 2:
        bare = bare[1:-1].strip()
    return bare
