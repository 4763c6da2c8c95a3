"""What a response earns, and the rewards that a configuration can name."""

from __future__ import annotations

import importlib
import math
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from prism_nemo.data.records import Record
from prism_nemo.errors import ConfigError, DataError

VERIFIED_ANSWER = "answer"
"""The reward of RewardConfig's formula: the weighted sum of a correct answer and a valid format."""


@dataclass(frozen=True)
class Reward:
    """What one response earned: `score`, and the `accuracy` and `format` (0 to 1 each) that it was made of."""

    score: float
    accuracy: float
    format: float


RewardFunction = Callable[[str, Record], Reward | float]
"""A custom reward: (response, record) to the reward, or to the score alone; accuracy and format are then as measured."""

REWARDS: dict[str, RewardFunction] = {}
"""Custom rewards by name. Code that runs before the configuration is read may add to it."""


def reward_function(name: str) -> RewardFunction | None:
    """The reward of that name, of REWARDS or `package.module:function`; None for the verified answer's own.

    Raises ConfigError when there is none.
    """
    if name == VERIFIED_ANSWER:
        return None
    if name in REWARDS:
        return REWARDS[name]
    module_name, separator, attribute = name.partition(":") if ":" in name else name.rpartition(".")
    if not separator:
        names = ", ".join(sorted((VERIFIED_ANSWER, *REWARDS)))
        raise ConfigError(
            f"there is no reward named {name!r}",
            where="reward.name",
            remedy=f"choose one of {names}, or name a function of your own: package.module:function",
        )
    return _imported(name, module_name, attribute)


def custom_reward(name: str, function: RewardFunction, response: str, record: Record, measured: Reward) -> Reward:
    """What `function` gives the response. Raises DataError, naming the record, when it fails or gives no finite number."""
    where = f"record {record.id}"
    try:
        given = function(response, record)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise DataError(
            f"the reward {name} failed: {type(error).__name__}: {error}",
            where=f"{where}, {place.filename} line {place.lineno}",
            remedy="mend the function, or what it does not expect in the record",
        ) from error
    reward = given
    if isinstance(given, (int, float)):
        reward = Reward(score=float(given), accuracy=measured.accuracy, format=measured.format)
    if not (isinstance(reward, Reward) and all(_is_finite(part) for part in (reward.score, reward.accuracy, reward.format))):
        raise DataError(
            f"the reward {name} gave {given!r}",
            where=where,
            remedy="it must return a finite number or a prism_nemo.rewards.Reward of finite numbers",
        )
    return reward


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _imported(name: str, module_name: str, attribute: str) -> RewardFunction:
    try:
        module = importlib.import_module(module_name)
        function = getattr(module, attribute)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"the reward {name} cannot be imported: {error}",
            where="reward.name",
            remedy=f"Python looks for it in {', '.join(path or '.' for path in sys.path[:3])}, …; PYTHONPATH adds folders",
        ) from error
    if not callable(function):
        raise ConfigError(
            f"the reward {name} is no function", where="reward.name", remedy="name a function of (response: str, record: Record)"
        )
    loaded: RewardFunction = function
    return loaded
