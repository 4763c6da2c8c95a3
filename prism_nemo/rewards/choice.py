"""Answers to multiple choice: the letters that were chosen, and the text behind one."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LETTER = r"(?:\((?P<round>[A-Ja-j])\)|\[(?P<square>[A-Ja-j])\]|\{(?P<curly>[A-Ja-j])\}|(?P<bare>[A-Ja-j]))"
_ONE = re.compile(rf"(?:(?i:the\s+)?(?i:option|choice|answer)\s+)?{_LETTER}(?P<delimiter>[.:)]|\s-(?=\s))?(?:\s+(?P<text>\S.*))?")
_SAID = re.compile(
    r"(?:(?i:option|choice|answer)\s+)?\(?(?P<letter>[A-J])\)?(?:,?\s+(?i:because|since)\b.*"
    r"|\s+(?i:is)\s+(?i:the\s+)?(?i:correct|right|best)(?:\s+(?i:answer|option|choice))?)"
)
_BEHIND = re.compile(r"(?P<text>[^()]*\S)\s+\(\s*(?:(?i:option|choice)\s+)?(?P<letter>[A-J])\)")
_SEPARATORS = re.compile(r"[\s,;&]+(?:and\s+)?|\s+")
_SINGLE = re.compile(r"[(\[]?([A-Ja-j])[)\]]?")
_JOINED = re.compile(r"[A-J]{2,6}")
_LABEL = re.compile(r"(?<![^\s,;(])\(?([A-J])[.:)](?=\s|$)")
_ANOTHER = re.compile(  # a second letter, behind the first one
    r"^[/&|,]|^(?:or|and)\b|^\(?[A-Ja-j]\)?$"
    r"|(?:^|[,;.!?]\s*|\b(?i:or|not|nor|but|actually|wait|no|maybe|perhaps|possibly|mean|think|guess|rather|instead|so|is|it's)\s+)"
    r"(?i:(?:option|choice|answer)\s+)?\(?[A-J](?![\w'])"
    r"|\b[A-J]\s+is\s+(?:also\s+)?(?i:the\b|right|correct|better|best)"
)
_TAKEN_BACK = re.compile(
    r"(?:(?:is|was)\s+)?(?:wrong|incorrect|not(?:\s+(?:the|correct|right|sure|it)\b|$))|(?:isn't|wasn't)\b", re.IGNORECASE
)
_PART = re.compile(r"(?<!\w)\([a-j]\)\s")  # "(a) 5 (b) 6"
_NOT_THIS = re.compile(r"\b(?:or|not|but|except|than|never|neither|wrong|incorrect)\b", re.IGNORECASE)
_OF_OPTIONS = re.compile(r"(?:both|neither|either|only|all|none)\b[^.;?!]*", re.IGNORECASE)  # "Neither A nor B"


@dataclass(frozen=True)
class Choice:
    letters: frozenset[str]  # upper case
    text: str = ""  # what stands with a single letter, or nothing


def parse_choice(text: str, *, any_text: bool = False) -> Choice | None:
    """A choice, from an answer in normal form that is nothing else; None where it is not clear what was chosen.

    `any_text`: what stands behind a letter is known to be the option's text, and may speak of other letters.
    """
    labels = _LABEL.findall(text)
    if len(set(labels)) > 1 and _LABEL.match(text):  # "A. red, C. blue"
        return Choice(frozenset(labels))
    said = _SAID.fullmatch(text)
    if said is not None:
        return Choice(frozenset(said["letter"]))
    found = _ONE.fullmatch(text)
    if found is not None:
        bare, behind = found["bare"], found["text"] or ""
        letter = found["round"] or found["square"] or found["curly"] or bare
        clear = not behind or not bare or found["delimiter"]  # "a dog" is no choice
        if clear and not _PART.search(behind) and (any_text or not _unclear(behind)):
            return Choice(frozenset(letter.upper()), behind)
    several = [_SINGLE.fullmatch(part) for part in _SEPARATORS.split(text, maxsplit=10)]
    letters = [part[1].upper() for part in several if part]
    if len(letters) == len(several) == len(set(letters)) > 1:
        return Choice(frozenset(letters))
    if _JOINED.fullmatch(text) and len(set(text)) == len(text):
        return Choice(frozenset(text))
    behind_text = _BEHIND.fullmatch(text)
    if behind_text is not None and not _NOT_THIS.search(behind_text["text"]):
        return Choice(frozenset(behind_text["letter"]), behind_text["text"])
    return None


def is_choice(truth: str, choice: Choice) -> bool:
    """Whether a truth that reads as this choice is one: `AC` is, `CA`, `BE` in a text and `(a) 5 (b) 6` may not be."""
    if len(choice.letters) == 1:
        return len(truth) > 1 or truth.upper() in choice.letters
    return not _JOINED.fullmatch(truth) or list(truth) == sorted(truth)


def _unclear(behind: str) -> bool:
    """Whether the text behind a letter takes it back, or names another."""
    return _TAKEN_BACK.match(behind) is not None or (_ANOTHER.search(behind) is not None and not _OF_OPTIONS.fullmatch(behind))
