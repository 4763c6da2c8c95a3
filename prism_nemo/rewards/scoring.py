"""One response's reward, without a run."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from prism_nemo.config.schema import RewardConfig
from prism_nemo.rewards.answer import check_truth
from prism_nemo.rewards.format import parse_response
from prism_nemo.rewards.grader import measured_reward
from prism_nemo.rewards.question import AnswerKind, Question
from prism_nemo.rewards.registry import Reward
from prism_nemo.rewards.verifier import Verifier


def score(response: str, answer: str, *, equivalent_answers: Sequence[str] = (), kind: AnswerKind | str | None = None) -> Reward:
    """What a response earns against the verified answer, with RewardConfig's weights and limits; 0 for an invalid format.

    equivalent_answers  other ways to write the answer that count too
    kind                what the answer is; None: told from its text

    From any thread. Where the rules do not decide, a worker process does; it is started once and ends with this process.
    Raises DataError when the verified answer is empty or too long (`check_truth`), ValueError for an unknown kind.
    """
    check_truth(answer)
    kind = None if kind is None else AnswerKind(kind)
    parsed = parse_response(response)
    if parsed is None:
        return Reward(score=0.0, accuracy=0.0, format=0.0)
    question = Question(given=parsed.answer, truth=answer, equivalent_answers=tuple(equivalent_answers), kind=kind)
    return measured_reward(_verifier().verdicts([question])[0], RewardConfig())


@cache
def _verifier() -> Verifier:
    return Verifier(RewardConfig())
