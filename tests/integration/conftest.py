from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture
def events(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What rollouts and their servers log."""
    with caplog.at_level(logging.INFO, logger="prism_nemo.rollout"):
        yield caplog
