"""Streams over files that are not held in memory: the order and the batches of a list, resumption, mixtures, late bad records."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_nemo.config.schema import DataConfig, ExperimentConfig, MixtureSource, SFTConfig, TrainerConfig
from prism_nemo.data import parquet_items
from prism_nemo.data.items import Block
from prism_nemo.data.open import open_stream
from prism_nemo.data.order import CYCLE, EpochOrder, MixtureOrder
from prism_nemo.data.records import Record
from prism_nemo.data.stream import RecordStream
from prism_nemo.errors import CheckpointError, ConfigError, DataError, PrismError

COUNT = 300


def item(number: int, source: str = "r") -> dict[str, Any]:
    turns = [{"role": "user", "content": f"{source} {number}"}, {"role": "assistant", "content": "x" * (number % 50 + 1)}]
    return {"id": f"{source}{number}", "messages": turns}


def write(path: Path, items: list[Any]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(items), path, row_group_size=17)
    elif path.suffix == ".json":
        path.write_text(json.dumps(items, indent=1))
    else:
        path.write_text("".join(json.dumps(one) + "\n" for one in items))
    return path


def config_of(tmp_path: Path, *, batch: int = 7, seed: int = 3, **data: Any) -> SFTConfig:
    options: dict[str, Any] = {"cache_dir": str(tmp_path / "cache"), "index_above_mb": 0, **data}
    config = SFTConfig(data=DataConfig(**options), trainer=TrainerConfig(max_steps=1, global_batch_size=batch))
    config.runtime.seed = seed
    config.experiment = ExperimentConfig(dir="unused")
    return config


def opened(tmp_path: Path, **options: Any) -> RecordStream[str]:
    return open_stream(config_of(tmp_path, **options), lambda record: record.prompt, required=("response",))


def ids(stream: RecordStream[str], batches: int, rank: int = 0, ranks: int = 1) -> list[list[str]]:
    return [[record.id for record, _ in stream.next_batch(rank, ranks)] for _ in range(batches)]


@pytest.fixture
def items() -> list[dict[str, Any]]:
    return [item(number) for number in range(COUNT)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_an_index_gives_the_batches_of_a_list(suffix: str, items: list[Any], tmp_path: Path) -> None:
    path = str(write(tmp_path / f"d{suffix}", items))
    listed = RecordStream(
        [Record(id=f"r{number}", prompt="p") for number in range(COUNT)],
        lambda record: "",
        batch_size=7,
        seed=3,
        shuffle=True,
        max_bad_sample_share=0.0,
    )
    assert ids(opened(tmp_path, train=path), 100) == ids(listed, 100)
    assert ids(opened(tmp_path, train=path, index_above_mb=32), 100) == ids(opened(tmp_path, train=path), 100)
    assert ids(opened(tmp_path, train=path, shuffle=False), 2) == [[f"r{n}" for n in range(7)], [f"r{n}" for n in range(7, 14)]]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 4), (4, 1)])
def test_resumption_at_any_sample(suffix: str, before: int, after: int, items: list[Any], tmp_path: Path) -> None:
    path = str(write(tmp_path / f"d{suffix}", items))
    unbroken = ids(opened(tmp_path, train=path), 60)
    for stop in (1, 41, 55):  # in the first epoch, and beyond it
        first = opened(tmp_path, train=path)
        ids(first, stop, before - 1, before)
        shares = []
        for rank in range(after):
            stream = opened(tmp_path, train=path)
            stream.load_state_dict(json.loads(json.dumps(first.state_dict())))
            shares.append(ids(stream, 5, rank, after))
        for number, whole in enumerate(unbroken[stop : stop + 5]):
            assert [share[number] for share in shares] == [whole[rank::after] for rank in range(after)]


def test_parquet_epochs_go_through_windows_of_row_groups(
    items: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every epoch shows everything, in another order, and no row group is read twice in one."""
    path = write(tmp_path / "d.parquet", items)
    with pq.ParquetFile(path) as file:
        group_bytes = file.metadata.row_group(4).total_byte_size
    monkeypatch.setattr("prism_nemo.data.order.CACHED_BYTES", 3 * group_bytes)
    cache = parquet_items.GroupCache()
    monkeypatch.setattr(parquet_items, "GROUPS", cache)
    reads: list[tuple[str, int]] = []
    add = cache.add

    def counted(key: tuple[str, int], table: Any, num_bytes: int) -> None:
        reads.append(key)
        cache.limit = 3 * group_bytes
        add(key, table, num_bytes)

    monkeypatch.setattr(cache, "add", counted)
    stream = opened(tmp_path, train=str(path), batch=10)
    first, second = (sum(ids(stream, 30), []) for _ in range(2))  # noqa: RUF017 - short lists
    assert sorted(first) == sorted(second) == sorted(one["id"] for one in items)
    assert first != second != [one["id"] for one in items]
    groups = -(-COUNT // 17)
    assert len(reads) <= 2 * groups + 1  # and once as the stream was opened
    near = Counter(abs(int(a[1:]) - int(b[1:])) <= 17 for a, b in pairwise(first))
    assert near[False] > 50  # in the file's order there would be none


def test_parquet_sources_of_a_mixture_share_what_is_kept(
    items: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read side by side, their windows fit together: few row groups are read twice in an epoch."""
    paths = [write(tmp_path / name, items) for name in ("a.parquet", "b.parquet")]
    with pq.ParquetFile(paths[0]) as file:
        limit = 6 * file.metadata.row_group(4).total_byte_size
    cache = parquet_items.GroupCache(limit)
    monkeypatch.setattr(parquet_items, "GROUPS", cache)
    monkeypatch.setattr("prism_nemo.data.open.CACHED_BYTES", limit)
    reads: list[tuple[str, int]] = []
    add = cache.add

    def counted(*arguments: Any) -> None:
        reads.append(arguments[0])
        add(*arguments)

    monkeypatch.setattr(cache, "add", counted)
    mixture = {name: MixtureSource(path=str(path), weight=1.0) for name, path in zip("ab", paths, strict=True)}
    stream = opened(tmp_path, mixture=mixture, batch=10)
    sum(ids(stream, 60), [])  # noqa: RUF017 - short lists
    groups = -(-COUNT // 17)
    assert len(reads) <= 1.4 * 2 * groups  # a window that ends makes room a little late


def test_a_parquet_file_that_changes_while_it_is_read(items: list[Any], tmp_path: Path) -> None:
    path = write(tmp_path / "d.parquet", items)
    stream = opened(tmp_path, train=str(path), shuffle=False)
    ids(stream, 1)
    write(path, items[:200])
    with pytest.raises(PrismError, match="changed while it is in use") as caught:
        ids(stream, 20)
    assert not isinstance(caught.value, DataError)


def test_memory_of_row_groups_is_bounded() -> None:
    cache = parquet_items.GroupCache(limit=10)
    for number in range(5):
        cache.add(("f", number), f"table {number}", 4)
    assert [cache.get(("f", number)) for number in range(5)] == [None, None, None, "table 3", "table 4"]
    cache.add(("f", 9), "large", 100)
    assert cache.get(("f", 9)) == "large"
    assert cache.get(("f", 4)) is None


def test_other_data_is_refused(items: list[Any], tmp_path: Path) -> None:
    state = opened(tmp_path, train=str(write(tmp_path / "a.jsonl", items))).state_dict()
    changed = [*items[:5], item(5) | {"caption": "new"}, *items[6:]]
    (tmp_path / "b").mkdir()
    for other in (opened(tmp_path, train=str(write(tmp_path / "b" / "a.jsonl", changed))),):
        with pytest.raises(CheckpointError, match="fingerprint"):
            other.load_state_dict(state)
    moved = opened(tmp_path, train=str(write(tmp_path / "b" / "a.jsonl", items)))
    moved.load_state_dict(state)  # the same bytes elsewhere, with other times


# Records that are found late


def test_bad_records_are_found_as_they_come_up(items: list[Any], tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", items)
    lines = path.read_text().splitlines()
    lines[3], lines[5], lines[8] = "{", json.dumps({"id": "r5", "messages": [items[0]["messages"][0]]}), '"text"'
    path.write_text("\n".join(lines))
    stream = opened(tmp_path, train=str(path), shuffle=False)
    assert ids(stream, 2) == [["r0", "r1", "r2", "r4", "r6"], ["r7", *(f"r{n}" for n in range(9, 14))]]
    assert (stream.tried, stream.failed) == (7, 1)
    assert [(bad.id, bad.where) for bad in stream.bad] == [
        ("d:4", f"{path}:4"),
        ("r5", f"{path}:6"),
        ("d:9", f"{path}:9"),
    ]
    assert "the record has no response" in stream.bad[1].reason
    ids(stream, 42)
    assert len(stream.bad) == 3  # listed once, though they come up in every epoch


def test_data_that_is_altogether_wrong_is_found_at_the_start(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", [{"instruction": "q", "output": "a"}] * 200)
    with pytest.raises(DataError, match="none of 32 records can be used") as caught:
        opened(tmp_path, train=str(path))
    assert "neither `messages`" in str(caught.value)


def test_several_files_of_several_kinds(items: list[Any], tmp_path: Path) -> None:
    for number, suffix in enumerate((".jsonl", ".json", ".parquet")):
        write(tmp_path / f"part-{number}{suffix}", items[number * 100 : number * 100 + 100])
    for path in (str(tmp_path / "part-*"), str(tmp_path)):
        drawn = sum(ids(opened(tmp_path, train=path, batch=20), 15), [])  # noqa: RUF017 - short lists
        assert sorted(drawn) == sorted(one["id"] for one in items)


# Mixtures


def mixture(tmp_path: Path, **sources: tuple[int, float]) -> dict[str, MixtureSource]:
    made = {}
    for name, (count, weight) in sources.items():
        path = write(tmp_path / f"{name}.jsonl", [item(number, name) for number in range(count)])
        made[name] = MixtureSource(path=str(path), weight=weight)
    return made


@pytest.mark.parametrize("above", [0, 32])
def test_a_mixture_draws_by_its_weights(above: int, tmp_path: Path) -> None:
    stream = opened(tmp_path, mixture=mixture(tmp_path, a=(40, 3), b=(1000, 1), c=(10, 1)), index_above_mb=above, batch=10)
    drawn = [record for _ in range(100) for record, _ in stream.next_batch()]
    assert Counter(record.source for record in drawn) == {"a": 600, "b": 200, "c": 200}
    assert stream.state_dict()["drawn"] == {"a": 600, "b": 200, "c": 200}
    for start in range(0, 1000, 50):
        assert Counter(record.source for record in drawn[start : start + 50])["a"] == 30
    for name, count in (("a", 40), ("c", 10)):  # each in epochs of its own
        own = [record.id for record in drawn if record.source == name]
        assert all(len(set(own[start : start + count])) == count for start in range(0, len(own) - count + 1, count))
    unbroken = ids(stream, 4)
    again = opened(tmp_path, mixture=mixture(tmp_path, a=(40, 3), b=(1000, 1), c=(10, 1)), index_above_mb=above, batch=10)
    again.load_state_dict({**stream.state_dict(), "consumed_samples": 1000})
    assert [batch[1::2] for batch in unbroken] == ids(again, 4, 1, 2)


def test_other_weights_are_other_data(tmp_path: Path) -> None:
    state = opened(tmp_path, mixture=mixture(tmp_path, a=(40, 3), b=(40, 1))).state_dict()
    with pytest.raises(CheckpointError, match="fingerprint"):
        opened(tmp_path, mixture=mixture(tmp_path, a=(40, 2), b=(40, 1))).load_state_dict(state)


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [0.5, 0.3, 0.2], [7, 1e-3, 2.5, 1], list(range(1, 12))])
def test_shares_hold_everywhere(weights: list[float]) -> None:
    names = [str(number) for number in range(len(weights))]
    orders = [EpochOrder(5, [0, number], shuffle=True) for number in range(len(weights))]
    order = MixtureOrder(names, weights, orders, [5] * len(weights))
    sources = np.array([order(position) // 5 for position in range(CYCLE + 500)])
    exact = np.array(weights) / sum(weights)
    counts = np.cumsum(np.eye(len(weights))[sources], axis=0)
    expected = np.arange(1, len(sources) + 1)[:, None] * exact
    assert np.abs(counts - expected).max() < 2
    for position in (0, 1, 777, CYCLE, CYCLE + 400):
        assert list(order.drawn(position).values()) == np.bincount(sources[:position], minlength=len(weights)).tolist()


def test_a_weight_that_never_comes_up(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the weight of `b` is less than one in"):
        opened(tmp_path, mixture=mixture(tmp_path, a=(5, 1e6), b=(5, 1)))


# Orders


def test_blocks_are_shuffled_within_windows() -> None:
    blocks = [Block(items, 100 * 2**20) for items in (5, 7, 3, 4)]  # two fit
    order = EpochOrder(19, [1], shuffle=True, blocks=blocks)
    epochs = [[order(position) for position in range(19 * epoch, 19 * epoch + 19)] for epoch in range(20)]
    assert all(sorted(epoch) == list(range(19)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 20
    starts = np.cumsum([0, 5, 7, 3, 4])
    for epoch in epochs:
        held = [int(np.searchsorted(starts, index, side="right")) for index in epoch]
        windows = [set(held[: cut + 1]) for cut in range(19) if set(held[: cut + 1]).isdisjoint(held[cut + 1 :])]
        assert len(windows) == 2
        assert len(windows[0]) == 2
    assert [order(position) for position in range(57, 60)] == epochs[3][:3]  # going back


def test_the_printed_configuration_of_a_mixture_is_the_same_run(tmp_path: Path) -> None:
    from prism_nemo.config.compose import dump_config, load_config
    from prism_nemo.config.validate import validate

    sources = {"a": {"path": str(write(tmp_path / "a.jsonl", [item(0)])), "weight": 0.5, "columns": {"id": "uid"}}}
    given = ["model.path=m", "experiment.dir=d", "trainer.max_steps=1", f"data.mixture={json.dumps(sources)}", "data.train=null"]
    config = load_config("sft", given)
    printed = tmp_path / "printed.yaml"
    printed.write_text(dump_config(config))
    assert load_config("sft", config_file=printed) == config
    for broken, message in (({"path": "none.jsonl"}, "does not exist"), ({"weight": 0}, "weight is 0")):
        bad = {"a": {**sources["a"], **broken}}
        with pytest.raises(ConfigError, match=message):
            validate(load_config("sft", [*given, f"data.mixture={json.dumps(bad)}"]))
    with pytest.raises(ConfigError, match=r"both data\.train and data\.mixture"):
        validate(load_config("sft", [*given, f"data.train={sources['a']['path']}"]))


def test_row_groups_too_large_for_memory_are_read_in_order(
    items: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(write(tmp_path / "d.parquet", items))
    expected = ids(opened(tmp_path, train=path, shuffle=False), 90)
    monkeypatch.setattr(parquet_items, "MAX_GROUP_BYTES", 0)
    monkeypatch.setattr(parquet_items, "_ROWS_AT_ONCE", 5)
    with pytest.raises(DataError, match="cannot be shuffled") as caught:
        opened(tmp_path, train=path)
    assert "prism-nemo data convert" in (caught.value.remedy or "")
    assert ids(opened(tmp_path, train=path, shuffle=False), 90) == expected
    stream = opened(tmp_path, train=path, shuffle=False)
    assert ids(stream, 90, 1, 2) == [batch[1::2] for batch in expected]
