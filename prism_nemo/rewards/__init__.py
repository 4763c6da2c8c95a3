"""Rewards: `score`, `Reward` and `AnswerKind`, loaded when first used: workers import this package and need little of it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prism_nemo.rewards.question import AnswerKind
    from prism_nemo.rewards.registry import Reward
    from prism_nemo.rewards.scoring import score

__all__ = ["AnswerKind", "Reward", "score"]

_HOMES = {"AnswerKind": "question", "Reward": "registry", "score": "scoring"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
