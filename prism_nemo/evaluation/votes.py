"""Which of several responses to a prompt give the same answer, by the rules of the reward: what majority@k counts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prism_nemo.errors import DataError
from prism_nemo.rewards.answer import check_truth
from prism_nemo.rewards.question import AnswerKind, Question

Verdicts = Callable[[Sequence[Question]], list[bool]]
"""`Verifier.verdicts`: whether each question's answer is its truth."""


def votes_of(answers: Sequence[Sequence[str | None]], kinds: Sequence[str | None], verdicts: Verdicts) -> list[list[int | None]]:
    """For the answers to each prompt, which of them each one votes for: the first that it is the same as, itself at the latest.

    answers  to each prompt, in the order of sampling; None, a response of invalid format, does not vote
    kinds    each prompt's `answer_kind`
    One call of `verdicts` decides all prompts. What is no answer by the rules of the reward (see `check_truth`) is the same as
    the very same text only.
    """
    questions: dict[tuple[int, str, str], Question] = {}
    for prompt, (given, kind) in enumerate(zip(answers, kinds, strict=True)):
        distinct = [text for text in dict.fromkeys(answer.strip() for answer in given if answer is not None) if _comparable(text)]
        for later, text in enumerate(distinct):
            for earlier in distinct[:later]:
                question = Question(text, earlier, kind=None if kind is None else AnswerKind(kind))
                questions[prompt, text, earlier] = question
    decided = zip(questions, verdicts(list(questions.values())), strict=True)
    same = {place for place, verdict in decided if verdict}
    return [_votes(prompt, given, same) for prompt, given in enumerate(answers)]


def _votes(prompt: int, given: Sequence[str | None], same: set[tuple[int, str, str]]) -> list[int | None]:
    candidates: dict[str, int] = {}  # texts that stand for themselves, and where each was given first
    votes: list[int | None] = []
    for index, answer in enumerate(given):
        if answer is None:
            votes.append(None)
            continue
        text = answer.strip()
        vote = candidates.get(text)
        if vote is None:
            vote = next((place for other, place in candidates.items() if (prompt, text, other) in same), index)
        if vote == index:
            candidates[text] = index
        votes.append(vote)
    return votes


def _comparable(text: str) -> bool:
    try:
        check_truth(text)
    except DataError:
        return False
    return True
