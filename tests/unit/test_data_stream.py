"""The record stream: its order, its slices, its position and how it deals with records that cannot be encoded."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection

import pytest

from prism_nemo.data.records import Record
from prism_nemo.data.stream import RecordStream
from prism_nemo.errors import CheckpointError, ConfigError, DataError


def stream(
    count: int = 10,
    batch: int = 4,
    *,
    seed: int = 0,
    shuffle: bool = True,
    bad: Collection[int] = (),
    share: float = 1.0,
    prefix: str = "r",
) -> RecordStream[int]:
    records = [Record(id=f"{prefix}{index}", prompt="p", answer=str(index)) for index in range(count)]
    return RecordStream(records, encoder(bad), batch_size=batch, seed=seed, shuffle=shuffle, max_bad_sample_share=share)


def encoder(bad: Collection[int]) -> Callable[[Record], int]:
    def encode(record: Record) -> int:
        number = int(record.answer or "")
        if number in bad:
            raise DataError("no picture", where="a.png", remedy="draw one")
        return 100 + number

    return encode


def drawn(source: RecordStream[int], batches: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    return [[value - 100 for _, value in source.next_batch(rank, world_size)] for _ in range(batches)]


def test_without_shuffling_batches_run_across_epochs() -> None:
    source = stream(5, 3, shuffle=False)
    assert drawn(source, 4) == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]
    assert source.consumed_samples == 12


def test_a_batch_may_be_larger_than_an_epoch() -> None:
    assert drawn(stream(2, 5, shuffle=False), 2) == [[0, 1, 0, 1, 0], [1, 0, 1, 0, 1]]


def test_record_and_encoding_stay_together() -> None:
    assert all(value == 100 + int(record.answer or "") for record, value in stream().next_batch())


def test_every_epoch_is_another_permutation_of_all() -> None:
    flat = [number for batch in drawn(stream(10, 5), 6) for number in batch]
    epochs = [flat[0:10], flat[10:20], flat[20:30]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_seed_decides_the_order() -> None:
    assert drawn(stream(seed=3), 6) == drawn(stream(seed=3), 6)
    assert drawn(stream(seed=3), 6) != drawn(stream(seed=4), 6)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_share_the_global_batch(world_size: int) -> None:
    whole = drawn(stream(7, 6), 5)
    parts = [drawn(stream(7, 6), 5, rank, world_size) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        for rank in range(world_size):
            assert parts[rank][step] == batch[rank::world_size]


@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1), (1, 2), (2, 4)])
def test_resume_continues_exactly_with_any_number_of_ranks(before: int, after: int) -> None:
    unbroken = drawn(stream(7, 4), 9)
    first = stream(7, 4)
    drawn(first, 5, rank=before - 1, world_size=before)
    resumed = [stream(7, 4) for _ in range(after)]
    for source in resumed:
        source.load_state_dict(first.state_dict())
    parts = [drawn(source, 4, rank, after) for rank, source in enumerate(resumed)]
    for step, batch in enumerate(unbroken[5:]):
        assert [parts[rank][step] for rank in range(after)] == [batch[rank::after] for rank in range(after)]


def test_resume_refuses_other_records_or_another_order() -> None:
    state = stream().state_dict()
    for other in (stream(11), stream(prefix="x"), stream(seed=1), stream(shuffle=False)):
        with pytest.raises(CheckpointError, match="the checkpoint's data stream has"):
            other.load_state_dict(state)


def test_bad_records_are_left_out_and_listed_once() -> None:
    source = stream(5, 5, shuffle=False, bad={1, 3})
    assert drawn(source, 2) == [[0, 2, 4], [0, 2, 4]]
    assert [(bad.id, bad.where, bad.reason) for bad in source.bad] == [
        ("r1", "a.png", "no picture (draw one)"),
        ("r3", "a.png", "no picture (draw one)"),
    ]
    assert source.consumed_samples == 10


def counted(source: RecordStream[int], ranks: int = 1) -> list[int]:
    """The next global batch, drawn by so many ranks with a stream each that share one tally, as the stages' loop does it."""
    batch: list[int] = []
    tried = failed = 0
    for rank in range(ranks):
        own = copy.copy(source)
        own.bad = []
        batch += [value - 100 for _, value in own.next_batch(rank, ranks)]
        tried, failed = tried + own.tried, failed + own.failed
        source.bad += own.bad
    source.consumed_samples += source.batch_size
    source.tally.add(tried, failed, source.bad)
    return batch


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_too_many_bad_records_stop_the_run(ranks: int) -> None:
    """20 of the first 1,000 may be bad; the next one stops the run, whichever rank it comes to."""
    source = stream(1000, 12, shuffle=False, bad=range(8, 29), share=0.02)
    assert len(counted(source, ranks)) == 8  # 4 of 12 are above the share, but 12 are too few to tell
    assert len(counted(source, ranks)) == 0
    with pytest.raises(DataError, match=r"(?s)21 of 36 records.*r8 \[a.png\]: no picture.*and 16 more") as error:
        counted(source, ranks)
    assert "data.max_bad_sample_share" in str(error.value)


def test_a_file_without_a_good_record_stops_the_run_whatever_is_allowed() -> None:
    source = stream(4, 2, shuffle=False, bad=range(4), share=1.0)
    assert counted(source) == []
    with pytest.raises(DataError, match="4 of 4 records"):
        counted(source)


def test_a_share_of_bad_records_at_the_limit_is_allowed() -> None:
    source = stream(1000, 50, shuffle=False, bad=range(10, 30), share=0.02)
    assert sum(len(counted(source)) for _ in range(4)) == 180


def test_a_small_file_is_judged_by_all_of_its_records() -> None:
    source = stream(4, 2, shuffle=False, bad={0}, share=0.25)
    assert [counted(source) for _ in range(2)] == [[1], [2, 3]]
    with pytest.raises(DataError, match="1 of 2 records"):
        counted(stream(4, 2, shuffle=False, bad={0}, share=0.24))


def test_what_was_counted_is_saved() -> None:
    """A run that is stopped after every step does not start to count anew."""
    source = stream(1000, 12, shuffle=False, bad=range(8, 29), share=0.02)
    for _ in range(2):
        counted(source)
        resumed = stream(1000, 12, shuffle=False, bad=range(8, 29), share=0.02)
        resumed.load_state_dict(source.state_dict())
        source = resumed
    assert (source.tally.tried, source.tally.failed) == (24, 16)
    with pytest.raises(DataError, match="21 of 36 records"):
        counted(source)


def test_other_errors_are_not_swallowed() -> None:
    def encode(record: Record) -> int:
        raise KeyError(record.id)

    source = RecordStream([Record("a", "p")], encode, batch_size=1, seed=0, shuffle=False, max_bad_sample_share=1.0)
    with pytest.raises(KeyError):
        source.next_batch()


def test_impossible_streams() -> None:
    with pytest.raises(DataError, match="no records"):
        stream(0)
    with pytest.raises(ConfigError, match="global_batch_size"):
        stream(batch=0)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        stream().next_batch(2, 2)
