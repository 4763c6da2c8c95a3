"""The rewards that a configuration can name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from prism_nemo.config.schema import RewardConfig
from prism_nemo.errors import ConfigError
from prism_nemo.rewards.answer import answers_match
from prism_nemo.rewards.format import parse_response


@dataclass(frozen=True)
class Reward:
    """What one response earned: `score`, and the `accuracy` and `format` (0 or 1 each) that it was made of."""

    score: float
    accuracy: float
    format: float


class RewardFunction(Protocol):
    def __call__(self, response: str, answer: str, *, accuracy_weight: float, format_weight: float) -> Reward: ...


def score(response: str, answer: str, *, accuracy_weight: float, format_weight: float) -> Reward:
    """`accuracy_weight * accuracy + format_weight * format` of a response against the verified answer; 0 for an invalid format.

    Raises DataError when the verified answer is empty or too long (`check_truth`).
    """
    parsed = parse_response(response)
    if parsed is None:
        return Reward(score=0.0, accuracy=0.0, format=0.0)
    accuracy = float(answers_match(parsed.answer, answer))
    return Reward(score=accuracy_weight * accuracy + format_weight, accuracy=accuracy, format=1.0)


REWARDS: dict[str, RewardFunction] = {
    "exact": score,  # the verified answer, up to the ways of writing it that `rewards.answer` knows
}


def reward_function(name: str) -> RewardFunction:
    """The reward of that name. Raises ConfigError when there is none."""
    if name not in REWARDS:
        raise ConfigError(f"there is no reward named {name!r}", remedy="choose one of " + ", ".join(sorted(REWARDS)))
    return REWARDS[name]


def rewards_of(responses: Sequence[str], answers: Sequence[str], config: RewardConfig) -> list[Reward]:
    """What each response earns against its verified answer."""
    reward = reward_function(config.name)
    weights = {"accuracy_weight": config.accuracy_weight, "format_weight": config.format_weight}
    return [reward(response, answer, **weights) for response, answer in zip(responses, answers, strict=True)]
