"""One SLURM for all tests of this folder, and jobs in it that run this checkout."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm.cluster import Cluster, cluster
from slurm.jobs import Jobs


@pytest.fixture(scope="session")
def slurm() -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        Path(folder).chmod(0o755)  # munge's user must get to its socket
        with cluster(Path(folder)) as found:
            yield found


@pytest.fixture
def jobs(slurm: Cluster, tmp_path: Path) -> Jobs:
    """What a test submits: in a folder of its own, as a user would, who stands in it."""
    return Jobs(slurm, tmp_path, sys.executable)


@pytest.fixture(autouse=True)
def all_nodes_are_there(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A test that failed leaves no job behind, which the next one would wait for."""
    yield
    if "slurm" in request.fixturenames:
        request.getfixturevalue("slurm").clear()
