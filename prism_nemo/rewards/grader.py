"""What a run's responses earn, by the reward that its configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from prism_nemo.config.schema import RewardConfig
from prism_nemo.data.records import Record
from prism_nemo.rewards.registry import Reward, reward_function, rewards_of


class Grader:
    """Grades responses; open while a run lasts.

    Raises ConfigError for a reward that does not exist.
    """

    def __init__(self, config: RewardConfig) -> None:
        reward_function(config.name)
        self.config = config

    def __enter__(self) -> Grader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def grade(self, responses: Sequence[str], records: Sequence[Record]) -> list[Reward | None]:
        """What each response earns against its record's verified answer; None where the record has none."""
        verified = [index for index, record in enumerate(records) if record.answer is not None]
        answers = [records[index].answer or "" for index in verified]
        rewards = rewards_of([responses[index] for index in verified], answers, self.config)
        result: list[Reward | None] = [None] * len(responses)
        for index, reward in zip(verified, rewards, strict=True):
            result[index] = reward
        return result
