"""What models write around an answer, taken off: "The answer is 42.", "x is about 5", "\\boxed{…}" inside a sentence."""

from __future__ import annotations

import re

from prism_nemo.rewards.text import closing, normalize

_MAX_READINGS = 8
_PREFIX = re.compile(
    r"""(?:(?:so|thus|therefore|hence|finally|then|in\ conclusion),?\s+)?
    (?: (?:(?:the|my|our|a)\s+)?(?:(?:final|correct|right|best|closest|required|most\ likely)\s+)*
        (?:answer|option|choice|result|solution|value|ratio|conclusion)(?:\s+choice|\s+option)?
        \s*(?:(?:is|are|should\ be|must\ be|would\ be|equals?)\s*:?|:|=|\s-\s)\s*(?:(?:option|choice)\s+(?=\(?[A-J]\b))?
      | (?:i\ (?:would\ )?(?:choose|select|pick|think(?:\ it\ is)?)|we\ (?:get|have|obtain)|it\ (?:is|has|shows?|equals?)|it's
          |there\ (?:is|are|were|was|will\ be)|they\ are|that\ is|this\ is)\s+(?:option\s+|choice\s+)?
      | (?:so|thus|therefore|hence),?\s+
      | [=≈]\s*
    )""",
    re.VERBOSE | re.IGNORECASE,
)
_ABOUT = re.compile(
    r"(?:approximately|approx\.?|about|around|roughly|nearly|exactly|equal to|only|a total of|≈|~|in (?=\d{4}$))\s*",
    re.IGNORECASE,
)
_VERB = re.compile(r"\s+(?:is|are|was|were|equals|will be|is equal to)\s+(?:equal to\s+)?", re.IGNORECASE)
_NEGATION = re.compile(
    r"\b(?:not|never|no longer|neither|nor|isn't|aren't|cannot|can't|if|unless|unlikely|wrong|incorrect)\b", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"[.;!?]\s+\S")
_REMARK = re.compile(r"(?P<head>[^()]*[^()\s])\s*\((?P<remark>[^()]*)\)")
_FILLER = re.compile(r"(?:approx(?:imately|\.)?|rounded.*|about|exactly|to \d.*|nearest.*|units?|simplified)", re.IGNORECASE)


def readings(text: str) -> list[str]:
    """An answer in normal form, and what is left of it when more and more of what is not the answer is taken off."""
    found = [text]
    for index in range(_MAX_READINGS):
        if index == len(found):
            break
        for other in _without_one_thing(found[index]):
            plain = normalize(other)
            if plain and plain not in found:
                found.append(plain)
    return found


def with_remark(text: str) -> tuple[str, str] | None:
    """`0.75 (3/4)` as its two parts. Where the remark says nothing, it is empty."""
    found = _REMARK.fullmatch(text)
    if found is None:
        return None
    remark = found["remark"].strip()
    return found["head"], "" if _FILLER.fullmatch(remark) else remark.removeprefix("or ").removeprefix("= ")


def _without_one_thing(text: str) -> list[str]:
    others = []
    prefix = _PREFIX.match(text)
    if prefix is not None and prefix.end() < len(text):
        others.append(text[prefix.end() :])
    about = _ABOUT.match(text)
    if about is not None:
        others.append(text[about.end() :])
    boxed = text.find(r"\boxed{")
    if boxed >= 0 and text.count(r"\boxed{") == 1:
        end = closing(text, boxed + len(r"\boxed"))
        if end > 0:
            others.append(text[boxed + len(r"\boxed{") : end])
    elif boxed >= 0:
        others.append(re.sub(r"\\boxed\{([^{}]*)\}", r"\1", text))
    verbs = list(_VERB.finditer(text))
    if len(verbs) == 1 and not _NEGATION.search(text) and not _SENTENCE_END.search(text):
        others.append(text[verbs[0].end() :])
    return others
