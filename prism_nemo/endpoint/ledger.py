"""What an endpoint was asked and what that cost, over all processes and runs that share a cache, against what is allowed.

    <cache>/usage.jsonl    one line before every attempt {"requests": 1}, one behind every answer {"prompt_tokens": …, …}

The line before the attempt is on the disk before anything is sent, so a process that is killed has not forgotten what it spent.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

from prism_nemo.config.endpoint import EndpointConfig
from prism_nemo.endpoint.errors import BudgetExhausted, EndpointError
from prism_nemo.errors import PrismError

LEDGER = "usage.jsonl"


@dataclass
class Usage:
    """Counts: attempts sent, answers, and tokens by the endpoint's own count. `uncounted`: answers that told no tokens."""

    requests: int = 0
    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    uncounted: int = 0

    def add(self, counts: object) -> None:
        for name in (field.name for field in fields(self)):
            value = counts.get(name, 0) if isinstance(counts, dict) else 0
            if type(value) is int and value > 0:
                setattr(self, name, getattr(self, name) + value)

    def cost(self, config: EndpointConfig) -> float:
        """By the configured prices of a million tokens."""
        return (self.prompt_tokens * config.prompt_price + self.completion_tokens * config.completion_price) / 1e6


class Ledger:
    """Keeps the budget. Attempts that are under way when a limit of tokens or cost is met are still answered and paid for."""

    def __init__(self, folder: Path, config: EndpointConfig, section: str) -> None:
        self.path = folder / LEDGER
        self.config = config
        self.section = section
        self._usage = Usage()
        self._offset = 0
        self._lock = threading.Lock()

    def usage(self) -> Usage:
        """What all processes have used so far."""
        with self._lock, self._locked_file() as file:
            self._catch_up(file)
            return Usage(**vars(self._usage))

    def reserve(self) -> None:
        """Counts an attempt that is about to be sent. Raises BudgetExhausted when there may be none."""
        with self._lock, self._locked_file() as file:
            self._catch_up(file)
            self._refuse_excess()
            self._write(file, {"requests": 1})

    def settle(self, prompt_tokens: int | None, completion_tokens: int | None) -> None:
        """Counts an answer. Raises EndpointError where it told no tokens and there is a limit of them."""
        told = prompt_tokens is not None and completion_tokens is not None
        counts = {"answers": 1, "prompt_tokens": prompt_tokens or 0, "completion_tokens": completion_tokens or 0}
        with self._lock, self._locked_file() as file:
            self._write(file, counts if told else counts | {"uncounted": 1})
        limits = ("max_prompt_tokens", "max_completion_tokens", "max_cost")
        limited = [name for name in limits if getattr(self.config, name) is not None]
        if limited and not told:
            raise EndpointError(
                "the endpoint does not tell how many tokens an answer took (`usage`), so the budget cannot be kept",
                where=f"{self.section}.{limited[0]}",
                remedy=f"limit {self.section}.max_requests instead",
            )

    def _refuse_excess(self) -> None:
        used = {
            "max_requests": self._usage.requests,
            "max_prompt_tokens": self._usage.prompt_tokens,
            "max_completion_tokens": self._usage.completion_tokens,
            "max_cost": self._usage.cost(self.config),
        }
        for name, amount in used.items():
            limit = getattr(self.config, name)
            if limit is not None and amount >= limit:
                raise BudgetExhausted(
                    f"the budget is used up: {name[4:].replace('_', ' ')} {amount:g} of {limit:g}",
                    where=f"{self.section}.{name}",
                    remedy="raise it and run the same command again: what is answered is not asked again",
                )

    @contextmanager
    def _locked_file(self) -> Iterator[int]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                raise self._unusable(error) from error
            yield file
        finally:
            os.close(file)  # which unlocks it

    def _unusable(self, error: OSError) -> PrismError:
        remedy = f"set {self.section}.cache_dir to a folder that can be written, on a file system with locks"
        return PrismError(f"the account of what was used cannot be kept: {error.strerror}", where=str(self.path), remedy=remedy)

    def _catch_up(self, file: int) -> None:
        """Reads what other processes, and this one, have written since."""
        size = os.fstat(file).st_size
        if size < self._offset:  # somebody has cut or removed it
            self._usage, self._offset = Usage(), 0
        text = os.pread(file, size - self._offset, self._offset)
        whole = text[: text.rfind(b"\n") + 1]
        for line in whole.splitlines():
            try:
                self._usage.add(json.loads(line))
            except ValueError:  # torn by a crash of the machine; every other line stands for itself
                continue
        self._offset += len(whole)

    def _write(self, file: int, counts: dict[str, int]) -> None:
        size = os.fstat(file).st_size
        torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"
        os.write(file, (b"\n" if torn else b"") + json.dumps(counts).encode("ascii") + b"\n")
