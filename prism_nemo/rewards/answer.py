"""Whether a given answer is the verified one, up to the ways of writing it. docs/rewards.md says what counts as equal.

The rules here decide in process, in bounded time. They never take numbers for equal because they are close, but for the roundings
that rewards/quantity.py names. Where only algebra can tell (`2\\sqrt{3}` and `\\sqrt{12}`), they ask a function that they are
given: `decide_by_rules` says when that is so, and worker processes answer with rewards/symbolic.py.
"""

from __future__ import annotations

import re
from functools import lru_cache

from prism_nemo.errors import DataError
from prism_nemo.rewards.choice import Choice, is_choice, parse_choice
from prism_nemo.rewards.content import Content, SameExpression, no_algebra
from prism_nemo.rewards.question import AnswerKind, Question
from prism_nemo.rewards.readings import readings, unboxed, with_remark
from prism_nemo.rewards.structure import alternatives
from prism_nemo.rewards.text import normalize, same_words

MAX_ANSWER_CHARACTERS = 1000
"""Longer answers match nothing; a longer truth is an error."""

_INTEGER = re.compile(r"[+-]?\d{1,18}", re.ASCII)
_BOOLEAN = re.compile(
    r"(yes|no|true|false)(?:$|(?=\s*[,.;:!]|\s+-\s|\s+(?:it|they|there|the|this|that|these|he|she|we|you|i|all|because|since)\b))(.*)",
    re.IGNORECASE | re.DOTALL,
)
_SECOND_THOUGHT = re.compile(
    r"[\s,.;:!-]*(?:(?:or|and|but|not|/)\b|yes\b|no\b(?=\W*$)|true\b|false\b)"
    r"|.*[,.;:!?…-]\s*(?:actually|wait|sorry|correction|hmm|rather)\b|[\s,.;:#]*\d[\d.,]*$",  # "No. 5"
    re.IGNORECASE | re.DOTALL,
)
_DENIED = r"|^\W*(?:it|they|there|this|that)\s*(?:(?:is|are|does|do)(?:n't|\s+not)|can't|cannot)\b"
_CONTRARY = {
    "yes": re.compile(r"\bno\b\s*[,.;!?]|\b(?:no|not|never)\b\W*$" + _DENIED, re.IGNORECASE),  # "there is no gap" is none
    "no": re.compile(r"\byes\b|^\W*(?:it|they|there|this|that)\s+(?:is|are|does|do|can)\W*$", re.IGNORECASE),
    "true": re.compile(r"(?<!not )\b(?:false|untrue)\b|\bnot true\b", re.IGNORECASE),
    "false": re.compile(r"(?<!not )(?<!n't )(?<!always )(?<!never )\btrue\b|\bnot false\b", re.IGNORECASE),
}


def answers_match(
    given: str, truth: str, *, kind: AnswerKind | None = None, same_expression: SameExpression = no_algebra
) -> bool:
    """Whether `given`, a model's answer, is `truth`, the verified one. An empty or overlong `given` never is.

    Raises DataError where `check_truth` does.
    """
    wanted = check_truth(truth)
    if kind is None and _INTEGER.fullmatch(given) and _INTEGER.fullmatch(truth):  # by far the most frequent
        return int(given) == int(truth)
    written = normalize(given) if len(given) <= MAX_ANSWER_CHARACTERS else ""
    if not written:
        return False
    matcher = _Matcher(wanted, kind, Content(kind, same_expression))
    return any(matcher.accepts(reading) for reading in readings(written))


@lru_cache(maxsize=4096)  # a group of rollouts asks for one
def check_truth(truth: str) -> str:
    """The verified answer in the form in which answers are compared.

    Raises DataError when nothing is left of it in that form (it is empty, or `.` or `$` alone), or when it is longer than
    MAX_ANSWER_CHARACTERS: stages ask when they read a record, so that a run does not find out by its first valid response.
    """
    fits = len(truth) <= MAX_ANSWER_CHARACTERS
    wanted = unboxed(normalize(truth)) if fits else ""
    if not wanted:
        problem = "empty" if fits else "too long to be compared"
        raise DataError(
            f"the verified answer is {problem}: {truth[:100]!r}",
            remedy=f"give every record an answer of 1 to {MAX_ANSWER_CHARACTERS} characters",
        )
    return wanted


def decide(question: Question, same_expression: SameExpression) -> bool:
    """Whether the answer is right, asking `same_expression` where algebra must tell. Raises DataError as `check_truth` does."""
    truths = (question.truth, *question.equivalent_answers)
    return any(answers_match(question.given, truth, kind=question.kind, same_expression=same_expression) for truth in truths)


def decide_by_rules(question: Question) -> bool | None:
    """The same without algebra: None where it must tell. (More equal expressions never make an answer wrong.)"""
    asked = False

    def ask(given: str, truth: str) -> bool:
        nonlocal asked
        asked = True
        return False

    return decide(question, ask) or (None if asked else False)


class _Matcher:
    """A truth, read once."""

    def __init__(self, truth: str, kind: AnswerKind | None, content: Content) -> None:
        self.truth, self.kind, self.content = truth, kind, content
        choice = parse_choice(truth, any_text=True) if kind in (None, AnswerKind.CHOICE) else None
        self.choice = choice if choice is not None and (kind is not None or is_choice(truth, choice)) else None
        self.boolean = _boolean(truth) if kind in (None, AnswerKind.BOOLEAN) else None

    def accepts(self, given: str) -> bool:
        if given == self.truth:
            return True
        if self.kind is AnswerKind.TEXT:
            return same_words(given, self.truth)
        if self.boolean is not None:
            return _boolean(given) == self.boolean
        if self.choice is not None:
            return self._accepts_choice(given, self.choice)
        if self._accepts_content(given):
            return True
        chosen = parse_choice(given)  # the truth is the text of an option
        return chosen is not None and bool(chosen.text) and self._accepts_content(chosen.text)

    def _accepts_choice(self, given: str, wanted: Choice) -> bool:
        if wanted.text and self._says_option(given, wanted):
            return True
        written = parse_choice(given)
        return written is not None and written.letters == wanted.letters and not (wanted.text and written.text)

    def _says_option(self, given: str, wanted: Choice) -> bool:
        """The option's text, alone or behind its letter."""
        written = parse_choice(given, any_text=True)
        if written is not None and written.text:
            return written.letters == wanted.letters and self.content.same(written.text, wanted.text)
        return (written is None or len(written.letters) > 1) and self.content.same(given, wanted.text)

    def _accepts_content(self, given: str) -> bool:
        """Hedging earns nothing: of `A or B`, both must be right, but where the truth itself has several."""
        if self.content.same(given, self.truth):
            return True
        offered = alternatives(given)
        if len(offered) > 1 and len(alternatives(self.truth)) == 1:
            return all(self.content.same(one, self.truth) for one in offered)
        remarked = with_remark(given)
        if remarked is not None:
            head, remark = remarked
            return self.content.same(head, self.truth) and (not remark or self.content.same(remark, self.truth))
        return False


def _boolean(text: str) -> bool | None:
    """What an answer that begins with yes or no, true or false, says; None for others, and for those that say both."""
    found = _BOOLEAN.fullmatch(text)
    if found is None or _SECOND_THOUGHT.match(found[2]) or _CONTRARY[found[1].casefold()].search(found[2]):
        return None
    return found[1].casefold() in ("yes", "true")
