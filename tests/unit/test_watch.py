"""Who is to blame when ranks fall silent, fail or wait, from what they tell; and that a run's end is not taken for a loss."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta

import pytest
import torch.distributed as dist

from prism_nemo.engine.watch import BEAT_SECONDS, SOONER_SECONDS, RankLost, Sign, State, Watch, _is_from_a_collective


@pytest.fixture
def store() -> dist.Store:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


@pytest.fixture
def watch(store: dist.Store) -> Iterator[Watch]:
    """The main rank's of three, without its threads."""
    found = Watch(store, 0, 3, 30.0)
    for rank in (1, 2):
        tell(found, rank, Sign(f"host{rank}", doing=f"step {rank}"))
    yield found


def tell(watch: Watch, rank: int, sign: Sign) -> None:
    watch._store.set(f"rank{rank}", json.dumps(asdict(sign)))


def rounds(watch: Watch, seconds: float, *alive: int, **signs: Sign) -> str | None:
    """So many seconds go by, in which the named ranks beat; what the main rank then thinks."""
    reason = None
    for beat in range(1, int(seconds) + 1):
        watch._beat()
        for rank in alive:
            sign = signs.get(f"rank{rank}", Sign(f"host{rank}", doing=f"step {rank}"))
            sign.beats = beat
            tell(watch, rank, sign)
        reason = watch._judge(1.0)
        if reason is not None:
            return f"{beat}: {reason}"
    return reason


def test_ranks_that_beat_are_left_alone_however_long_a_step_takes(watch: Watch) -> None:
    assert rounds(watch, 4000, 1, 2) is None


def test_a_silent_rank_is_named(watch: Watch) -> None:
    found = rounds(watch, 100, 1)
    assert found == "31: no sign of life for 31 s from rank 2 on host2, which was at: step 2: its process is dead or stopped"
    assert watch._store.get("verdict").decode() in found, "the other ranks read it there"


def test_sooner_when_a_connection_has_broken(watch: Watch) -> None:
    found = rounds(watch, 100, 1, rank1=Sign("host1", state=State.cut_off, cause="RuntimeError: Connection reset by peer"))
    assert found is not None
    assert int(found.split(":")[0]) <= SOONER_SECONDS + 3
    assert "from rank 2 on host2" in found


def test_a_failure_is_the_reason_not_its_consequences(watch: Watch) -> None:
    found = rounds(
        watch,
        100,
        1,
        2,
        rank1=Sign("host1", state=State.cut_off, cause="RuntimeError: Connection reset by peer"),
        rank2=Sign("host2", state=State.failed, doing="step 7", cause="MemoryError: none left"),
    )
    assert found == "1: rank 2 on host2, which was at: step 7, has failed: MemoryError: none left"


def test_one_that_lives_and_does_not_come_is_named_when_a_collective_gives_up(watch: Watch) -> None:
    signs = {
        "rank1": Sign("host1", state=State.cut_off, cause="RuntimeError: Timed out waiting 600000ms"),
        "rank2": Sign("host2", doing="step 7, rollout", where="wait_for_ever, loop.py:3"),
    }
    found = rounds(watch, 100, 1, 2, **signs)
    assert found is not None
    assert "rank 2 on host2, which was at: step 7, rollout (in wait_for_ever, loop.py:3)" in found
    assert "Timed out waiting 600000ms" in found


def test_a_rank_that_is_done_may_be_silent(watch: Watch) -> None:
    tell(watch, 2, Sign("host2", state=State.done))
    assert rounds(watch, 100, 1) is None


def test_others_listen_to_the_main_rank_and_to_its_verdict(watch: Watch, store: dist.Store) -> None:
    other = Watch(store, 1, 3, 30.0)
    for _ in range(10):
        watch._beat()
        assert other._listen(1.0) is None
    silent = [other._listen(1.0) for _ in range(40)]
    assert next(reason for reason in silent if reason).startswith("no sign of life for 31 s from rank 0 on ")
    watch._beat()
    assert watch._store.check(["verdict"]), "the one who finds it tells the rest"
    assert Watch(store, 2, 3, 30.0)._listen(1.0) == watch._store.get("verdict").decode()


def test_a_job_that_was_suspended_as_a_whole_has_lost_nobody(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour goes by between two beats of the thread itself."""
    now, passed = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watch, "_judge", lambda seconds: passed.append(seconds))

    class Clock:
        def wait(self, seconds: float) -> bool:
            now[0] += 3600.0
            return len(passed) == 3

    monkeypatch.setattr(watch, "_stop", Clock())
    watch._talk()
    assert passed == [2 * BEAT_SECONDS] * 3


def test_errors_that_come_from_another_rank() -> None:
    assert _is_from_a_collective(RuntimeError("[../gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"))
    assert _is_from_a_collective(dist.DistNetworkError("broken"))
    assert not _is_from_a_collective(RuntimeError("the size of tensor a (3) must match"))
    assert not _is_from_a_collective(ConnectionResetError("a rollout server's"))


def test_an_error_of_ones_own_is_told_and_stays_what_it_is(store: dist.Store) -> None:
    main, other = Watch(store, 0, 2, 30.0), Watch(store, 1, 2, 30.0)
    other.start()
    error = ValueError("of its own")
    assert other.explain(error) is error
    assert other.explain(error) is error
    reason = main._judge(1.0)
    assert reason is not None
    assert reason.endswith("has failed: ValueError: of its own")
    other.stop()
    assert not isinstance(other.explain(SystemExit(75)), RankLost)


def stuck_after(watch: Watch, *signs: Sign) -> str | None:
    watch.stuck_seconds = 40.0
    watch._signs = list(signs)
    return watch._stuck()


def test_who_does_nothing_while_all_others_wait_is_named(watch: Watch) -> None:
    waits, stuck = Sign("host", waiting=12.0), Sign("host1", doing="step 7", where="read, loader.py:3", idle=41.0, waiting=41.0)
    found = stuck_after(watch, waits, stuck, waits)
    assert found is not None
    assert found.startswith("rank 1 on host1, which was at: step 7 (in read, loader.py:3), has done nothing for 41 s: ")
    both = stuck_after(watch, stuck, stuck, waits)
    assert both is not None
    assert both.startswith("rank 0 on host1")
    assert "; rank 1 on host1" in both


def test_nobody_is_stuck_while_anybody_works_or_has_only_begun_to_wait(watch: Watch) -> None:
    waits, stuck = Sign("host", waiting=1e6), Sign("host", idle=41.0, waiting=41.0)
    assert stuck_after(watch, waits, stuck, Sign("host", waiting=0.0)) is None, "it may be what the idle one waits for"
    assert stuck_after(watch, waits, stuck, Sign("host", waiting=9.0)) is None
    assert stuck_after(watch, waits, Sign("host", idle=39.0, waiting=39.0), waits) is None
    assert stuck_after(watch, waits, waits, waits) is None, "in collectives: their own limit ends that"
    assert stuck_after(watch, waits, Sign("host", idle=1e6, waiting=1e6, state=State.done), waits) is None
    watch.stuck_seconds = None
    watch._signs = [stuck, stuck, stuck]
    assert watch._stuck() is None
