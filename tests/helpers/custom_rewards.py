"""Rewards of a user's own, as a configuration names them."""

from __future__ import annotations

from prism_nemo.data.records import Record
from prism_nemo.rewards import Reward

NOT_A_FUNCTION = 3


def brevity(response: str, record: Record) -> float:
    return 1.0 / len(response)


def half(response: str, record: Record) -> Reward:
    return Reward(score=0.5, accuracy=0.25, format=1.0)


def failing(response: str, record: Record) -> float:
    return float(record.metadata["absent"])


def infinite(response: str, record: Record) -> float:
    return float("inf")


def nothing(response: str, record: Record) -> float:
    return None  # type: ignore[return-value]
