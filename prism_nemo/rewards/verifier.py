"""Whether answers are right: by the rules in process, else from the cache, else by computer algebra in the pool."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType

from prism_nemo.config.schema import RewardConfig
from prism_nemo.rewards.answer import decide_by_rules
from prism_nemo.rewards.pool import Decision, Pool
from prism_nemo.rewards.question import Question


@dataclass
class Counts:
    """How questions were decided."""

    graded: int = 0  # all of them
    symbolic: int = 0  # those that the rules could not decide
    cache_hits: int = 0  # of the symbolic ones: decided before, or asked twice at once
    timeouts: int = 0  # of the symbolic ones: not equal because the time was over
    crashes: int = 0  # of the symbolic ones: not equal because memory was over, or the worker died of it


class Verifier:
    """Decides questions. A context manager; it starts no process before a question needs one."""

    def __init__(self, config: RewardConfig) -> None:
        self._pool = Pool(
            num_workers=config.num_workers,
            time_limit_seconds=config.time_limit_seconds,
            memory_limit_mb=config.memory_limit_mb,
        )
        self._cache: OrderedDict[Question, Decision] = OrderedDict()
        self._cache_size = config.cache_size
        self._counts = Counts()
        self._lock = threading.Lock()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._pool.close()

    def verdicts(self, questions: Sequence[Question]) -> list[bool]:
        """Whether each question's answer is the verified one, in order. May be called from several threads.

        Raises DataError where `check_truth` does, and PrismError when no worker can be started.
        """
        by_rules = [decide_by_rules(question) for question in questions]
        open_questions = [question for question, verdict in zip(questions, by_rules, strict=True) if verdict is None]
        with self._lock:
            decisions = self._decisions(open_questions)
            self._counts.graded += len(questions)
            self._counts.symbolic += len(open_questions)
            self._counts.timeouts += sum(decisions[question] is Decision.TIMEOUT for question in open_questions)
            self._counts.crashes += sum(decisions[question] is Decision.CRASH for question in open_questions)
        return [
            decisions[question] is Decision.EQUAL if verdict is None else verdict
            for question, verdict in zip(questions, by_rules, strict=True)
        ]

    def take_counts(self) -> Counts:
        """Since the last call."""
        with self._lock:
            counts, self._counts = self._counts, Counts()
        return counts

    def _decisions(self, questions: Sequence[Question]) -> dict[Question, Decision]:
        decisions: dict[Question, Decision] = {}
        for question in dict.fromkeys(questions):
            known = self._cache.get(question)
            if known is not None:
                decisions[question] = known
        unknown = [question for question in dict.fromkeys(questions) if question not in decisions]
        self._counts.cache_hits += len(questions) - len(unknown)
        decisions.update(zip(unknown, self._pool.decide(unknown), strict=True))
        self._remember(decisions)
        return decisions

    def _remember(self, decisions: dict[Question, Decision]) -> None:
        """The latest used stay."""
        for question, decision in decisions.items():
            self._cache[question] = decision
            self._cache.move_to_end(question)
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
