"""The harness itself: results in order, and failures that say which rank did what."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest
from helpers.ranks import RankError, run_ranks


def environment(prefix: str) -> tuple[str, str, str, str]:
    """No torch here: these launches take a fraction of a second."""
    return prefix + os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["LOCAL_RANK"], os.environ["OMP_NUM_THREADS"]


def one_fails(flag: Path) -> None:
    if os.environ["RANK"] == "1":
        while not flag.exists():
            time.sleep(0.01)
        raise ValueError("the second one fell over")
    flag.touch()
    wait_for_the_other()


def wait_for_the_other() -> None:
    time.sleep(60)


def leaves(status: int) -> None:
    sys.exit(status)


def test_results_come_in_rank_order() -> None:
    assert run_ranks(environment, 3, "rank ") == [(f"rank {rank}", "3", str(rank), "1") for rank in range(3)]


def test_a_failing_rank_ends_all_and_shows_both_tracebacks(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(RankError) as caught:
        run_ranks(one_fails, 2, tmp_path / "flag")
    assert time.monotonic() - start < 30
    message = str(caught.value)
    first, second = message.split("--- rank 1")
    assert "one_fails on 2 ranks: rank 1 ended with status 1" in first
    assert "in wait_for_the_other" in first
    assert "ValueError: the second one fell over" in second


def test_time_limit_shows_where_every_rank_stands() -> None:
    with pytest.raises(RankError, match="not finished after 3 s") as caught:
        run_ranks(wait_for_the_other, 2, timeout_seconds=3)
    assert str(caught.value).count("in wait_for_the_other") == 2


def test_leaving_early_is_a_failure_even_without_an_exception() -> None:
    with pytest.raises(RankError, match="status 3"):
        run_ranks(leaves, 2, 3)
