"""Settings of the bundled digits task."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class DigitsConfig:
    """The bundled digits task, written to `data/` and `model/` of the run directory before the first stage."""

    enabled: bool = False  # write the task's records and its untrained model
    num_public: int = 1000  # noisy demonstrations
    num_teacher: int = 1000  # clean demonstrations
    num_prompts: int = 1000  # prompts with answers
    num_test: int = 400  # held-out problems, over digits that no other file shows
