"""What models write around an answer, taken off: "The answer is 42.", "x is about 5", "\\boxed{…}" inside a sentence."""

from __future__ import annotations

import re

from prism_nemo.rewards.names import is_asked_for
from prism_nemo.rewards.quantity import parse_quantity
from prism_nemo.rewards.text import DENIES, closing, normalize

_MAX_READINGS = 8
_MAX_BOXES = 8
_PLAIN_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_LETTER = re.compile(r"[A-J]")
_PREFIX = re.compile(
    r"""(?:(?:so|thus|therefore|hence|finally|then|in\ conclusion),?\s+)?
    (?: (?:(?:the|my|our|a)\s+)?(?:(?:final|correct|right|best|closest|required|most\ likely)\s+)*
        (?:answer|option|choice|result|solution|value|ratio|conclusion)(?:\s+choice|\s+option)?
        \s*(?:(?:is|are|should\ be|must\ be|would\ be|equals?)\s*:?|:|=|\s-\s)\s*(?:(?:option|choice)\s+(?=\(?[A-J]\b))?
      | (?:i\ (?:would\ )?(?:choose|select|pick|think(?:\ it\ is)?)|we\ (?:get|have|obtain)|it\ (?:is|has|shows?|equals?)|it's
          |there\ (?:is|are|were|was|will\ be)|they\ are|that\ is|this\ is)\s+(?:option\s+|choice\s+)?
      | (?:so|thus|therefore|hence|finally|in\ conclusion),?\s+
      | [=≈]\s*
    )""",
    re.VERBOSE | re.IGNORECASE,
)
_ABOUT = re.compile(
    r"(?:approximately|approx\.?|about|around|roughly|nearly|exactly|equal to|only|a total of|≈|~|in (?=\d{4}$))\s*",
    re.IGNORECASE,
)
_VERB = re.compile(r"\s+(?:is|are|was|were|equals|will be|is equal to)\s+(?:equal to\s+)?", re.IGNORECASE)
_NOT_THE_ANSWER = re.compile(  # what was made of it
    r"\b(?:of|twice|half|double|triple|than)\s+(?:the|my|our)\s+(?:\w+\s+)?(?:answer|result|solution)\b"
    r"|\b(?:answer|result|solution)\s+(?:squared|cubed|doubled|halved|plus|minus|times|divided)\b",
    re.IGNORECASE,
)
_WORD = re.compile(r"[A-Za-z]{2,}\s")
_BOX = r"\boxed{"
_LEADS_TO_A_BOX = re.compile(
    r"(?:[A-Za-z][A-Za-z' ,]*[ ,])?(?:is|are|was|were|be|equals?|gives?|get|obtain|has|have|find|yields?|choose|select|pick"
    r"|therefore|thus|hence|so|finally)\s*[,:]?\s*|[A-Za-z][A-Za-z' ,]*(?::|\banswer)\s*",
    re.IGNORECASE,
)
_IS_THE_ANSWER = re.compile(
    r",?\s+(?:which\s+)?is\s+(?:the|my|our)\s+(?:(?:final|correct|right|best)\s+)*(?:answer|option|choice|solution|result)"
    r"|\s+is\s+(?:correct|right)",
    re.IGNORECASE,
)
_NOT_ANOTHER = re.compile(r"(?P<head>.*\S),\s*(?:and\s+|but\s+)?not\s+(?P<other>\S.*)")
_HOPE = re.compile(r"\.?\s+I hope (?:it|this|that) (?:is (?:correct|right)|helps)", re.IGNORECASE)  # a habit of language models
_SENTENCE_END = re.compile(r"[.;!?]\s+\S")
_REMARK = re.compile(r"(?P<head>[^()]*[^()\s])\s*\((?P<remark>[^()]*)\)")
_FILLER = re.compile(
    r"approx(?:imately|\.)?|about|exactly|units?|simplified"
    r"|(?:rounded\s*(?:up|down|off)?)?\s*(?:to\s+)?(?:\w+\s+(?:decimals?|significant|d\.?p|s\.?f)\b.*|(?:the\s+)?nearest\s.*)?",
    re.IGNORECASE,
)


def readings(text: str) -> list[str]:
    """An answer in normal form, and what is left of it when more and more of what is not the answer is taken off."""
    text = _HOPE.sub("", text)
    found = [unboxed(text)]
    before, box, _ = text.partition(_BOX)
    if box and _LEADS_TO_A_BOX.fullmatch(before) and not DENIES.search(before):
        found.append(unboxed(text[len(before) :]))
    for index in range(_MAX_READINGS):
        if index == len(found):
            break
        for other in _without_one_thing(found[index]):
            plain = normalize(other)
            if plain and plain not in found:
                found.append(plain)
    return found


def unboxed(text: str) -> str:
    """An answer in normal form with the contents of its boxes where they stand.

    What is around a box counts: `-\\boxed{12}`, `\\boxed{5} million` and `B or \\boxed{A}` say more than the box does.
    """
    for _ in range(_MAX_BOXES):
        start = text.find(_BOX)
        if start < 0:
            break
        end = closing(text, start + len(_BOX) - 1, opens="{", closes="}")  # "B) Paris" is in a box, too
        end = len(text) if end < 0 else end  # one that never closes reaches to the end
        before, boxed, behind = text[:start], text[start + len(_BOX) : end].strip(), text[end + 1 :]
        text = normalize(before + _shielded(before, boxed, behind) + behind)
    return text


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
    denied = _NOT_ANOTHER.fullmatch(text)
    if denied is not None and not DENIES.search(denied["head"]) and _is_another(denied["head"], denied["other"]):
        others.append(denied["head"])
    behind = _IS_THE_ANSWER.search(text)
    if behind is not None and behind.end() == len(text) and not DENIES.search(text):
        others.append(text[: behind.start()])
    verbs = list(_VERB.finditer(text))
    if len(verbs) == 1 and not DENIES.search(text) and not _SENTENCE_END.search(text):
        subject, said = text[: verbs[0].start()], text[verbs[0].end() :]
        names = _WORD.match(subject) or (is_asked_for(subject) and not _LETTER.fullmatch(said))  # not "A is B"
        if names and not _NOT_THE_ANSWER.search(subject):
            others.append(said)
    return others


def _is_another(head: str, other: str) -> bool:
    """Whether `12, not 13` denies something of the kind of what it says, and not its own words."""
    return other not in head and (_LETTER.fullmatch(other) is not None or parse_quantity(other) is not None)


def _shielded(before: str, boxed: str, behind: str) -> str:
    """In parentheses where it would run into its neighbours: `2\\boxed{12}` is not 212, nor `\\boxed{A} dog` a dog."""
    if _LETTER.fullmatch(boxed):
        return f"({boxed})" if behind[:1].isspace() else boxed
    number = _PLAIN_NUMBER.fullmatch(boxed) is not None
    joins_before = re.search(r"[\w)}\]°π]$" if number else r"[^\s({\[=≈:]$", before) is not None
    joins_behind = re.match(r"\d" if number else r"[^\s)}\],.;:!?=≈]", behind) is not None
    return f"({boxed})" if joins_before or joins_behind else boxed
