"""The examples of docs/algorithms.md, executed."""

from __future__ import annotations

import doctest
import inspect
import re
from pathlib import Path

from prism_nemo.algorithms import advantages, discriminator_loss, kl, metrics, policy_loss, rollout_correction

PAGE = Path(__file__).parents[2] / "docs" / "algorithms.md"


def test_the_examples_run() -> None:
    outcome = doctest.testfile(str(PAGE), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert outcome.failed == 0
    assert outcome.attempted > 30


def test_every_public_function_is_on_the_page() -> None:
    text = PAGE.read_text()
    for module in (advantages, discriminator_loss, kl, metrics, policy_loss, rollout_correction):
        functions = [
            name for name, value in inspect.getmembers(module, inspect.isfunction) if value.__module__ == module.__name__
        ]
        for name in functions:
            if not name.startswith("_") and name not in ("mean_of", "prefixed"):  # conveniences without a formula
                assert re.search(rf"\b{name}\b", text), f"{module.__name__}.{name} is missing"
