"""Asks a teacher about many records at a time, and each again until one of its answers is right."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from prism_nemo.config.schema import CurateConfig
from prism_nemo.curate.teacher import answer_seed, teacher_messages
from prism_nemo.data.chat import DEFAULT_SYSTEM_PROMPT
from prism_nemo.data.records import Record
from prism_nemo.endpoint.cache import Reply
from prism_nemo.endpoint.client import Endpoint
from prism_nemo.endpoint.errors import BudgetExhausted, RefusedRequest
from prism_nemo.endpoint.pool import RequestPool
from prism_nemo.errors import DataError
from prism_nemo.rewards.format import parse_response
from prism_nemo.rewards.grader import Grader

ACCEPTED = "accepted"
WRONG_FORMAT = "teacher: wrong format"
WRONG_ANSWER = "teacher: wrong answer"
REFUSED = "teacher: refused"
UNSENDABLE = "cannot be sent"


@dataclass(frozen=True)
class Ask:
    """The teacher's answer of that number, from 0, to the record of that number."""

    record: int
    number: int


Outcome = Reply | DataError | RefusedRequest | BudgetExhausted


class TeacherAsking:
    """Works through records on one rank. A record's seeds, and so what is asked about it, do not depend on the others.

    A row of a record that is done: {"record": its number, "outcome": ACCEPTED or why there is no demonstration, "answers": how
    many were asked for}, and "response" or "why".
    """

    def __init__(
        self, records: Sequence[Record], todo: Iterable[int], config: CurateConfig, endpoint: Endpoint, grader: Grader
    ) -> None:
        self.records = records
        self.config = config
        self.endpoint = endpoint
        self.grader = grader
        self.exhausted: BudgetExhausted | None = None
        self._waiting = deque(Ask(number, 0) for number in todo)
        self._pool = RequestPool[Ask, Outcome](config.teacher.max_concurrency)
        told = (config.curate.system_prompt, config.data.system_prompt, DEFAULT_SYSTEM_PROMPT)
        self._system_prompt = next(text for text in told if text is not None)

    def __enter__(self) -> TeacherAsking:
        return self

    def __exit__(self, *error: Any) -> None:
        """Drops what waits, and waits for the answers that are under way: they are paid for, and the cache keeps them."""
        self.endpoint.close()
        self._pool.__exit__(*error)

    @property
    def done(self) -> bool:
        """Nothing is under way, and nothing more may or need be asked."""
        return not self._pool.busy and (not self._waiting or self.exhausted is not None)

    @property
    def num_left(self) -> int:
        return len(self._waiting)

    def work(self, seconds: float, stopped: Callable[[], bool]) -> list[dict[str, Any]]:
        """The rows of the records that were done in about so many seconds.

        Once `stopped` says so nothing more is asked, and it comes back when what is under way is answered.
        """
        rows: list[dict[str, Any]] = []
        end = time.monotonic() + seconds
        while not self.done and (time.monotonic() < end or stopped()):
            if stopped():
                self._waiting.clear()
            self._submit()
            rows += self._settle(self._pool.wait(timeout=max(0.1, min(1.0, end - time.monotonic()))))
        return rows

    def _submit(self) -> None:
        if self.exhausted is None:
            for _ in range(min(self._pool.free, len(self._waiting))):
                ask = self._waiting.popleft()
                self._pool.submit(ask, lambda ask=ask: self._ask(ask))  # type: ignore[misc]

    def _ask(self, ask: Ask) -> Outcome:
        record = self.records[ask.record]
        try:
            messages = teacher_messages(record, self._system_prompt, max_pixels=self.config.curate.image_max_pixels)
            return self.endpoint.ask(messages, seed=answer_seed(self.config.runtime.seed, record, ask.number))
        except (DataError, RefusedRequest, BudgetExhausted) as error:
            return error

    def _settle(self, ended: Sequence[tuple[Ask, Outcome]]) -> list[dict[str, Any]]:
        """Verifies answers; records whose answer is not right go to the front of the queue, the others give rows."""
        replies = [(ask, outcome) for ask, outcome in ended if isinstance(outcome, Reply)]
        texts = [outcome.text.strip() for _, outcome in replies]
        rewards = self.grader.grade(texts, [self.records[ask.record] for ask, _ in replies])
        rows = []
        for (ask, _), text, reward in zip(replies, texts, rewards, strict=True):
            assert reward is not None, "only records with an answer are curated"
            if parse_response(text) is None:
                rows += self._again(ask, WRONG_FORMAT)
            elif reward.accuracy < 1.0:
                rows += self._again(ask, WRONG_ANSWER)
            else:
                rows.append({"record": ask.record, "outcome": ACCEPTED, "answers": ask.number + 1, "response": text})
        for ask, outcome in ended:
            if isinstance(outcome, BudgetExhausted):
                self.exhausted = outcome
            elif isinstance(outcome, DataError | RefusedRequest):
                kind = UNSENDABLE if isinstance(outcome, DataError) else REFUSED
                rows.append({"record": ask.record, "outcome": kind, "answers": ask.number, "why": outcome.what})
        return rows

    def _again(self, ask: Ask, outcome: str) -> list[dict[str, Any]]:
        answers = ask.number + 1
        if answers < self.config.curate.max_answers:
            self._waiting.appendleft(Ask(ask.record, answers))
            return []
        return [{"record": ask.record, "outcome": outcome, "answers": answers, "why": f"the last of {answers} answers"}]
