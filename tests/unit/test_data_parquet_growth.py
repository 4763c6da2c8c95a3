"""Parquet files that are small on the disk and large once they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_nemo.data import parquet_items
from prism_nemo.data.item_files import open_items
from prism_nemo.errors import DataError
from prism_nemo.evaluation.benchmarks.files import rows

ROWS = 20_000
MEGABYTE = b"x" * 900_000


def written(path: Path, values: Any, **options: Any) -> Path:
    pq.write_table(pa.table(values), path, dictionary_pagesize_limit=2**30, store_schema=False, **options)
    return path


def shared(value: bytes, count: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), pa.array([value]))


def nested(value: bytes, count: int) -> pa.Array:
    """Lists of {"bytes"}, as images are stored."""
    struct = pa.StructArray.from_arrays([shared(value, count)], ["bytes"])
    return pa.ListArray.from_arrays(pa.array(range(count + 1), pa.int32()), struct)


@pytest.mark.parametrize("column", [shared, nested])
def test_a_value_that_stands_in_every_row(column: Any, tmp_path: Path) -> None:
    """18 GB in 43 kB: read as it stands, it would end the process."""
    bomb = written(tmp_path / "bomb.parquet", {"images": column(MEGABYTE, ROWS)})
    assert bomb.stat().st_size < 100_000
    items = open_items(bomb, None)
    assert len(items) == ROWS
    before = pa.total_allocated_bytes()
    with pytest.raises(DataError, match="grow to 18000000000 bytes"):
        items.read(0)
    assert pa.default_memory_pool().max_memory() - before < 200 << 20
    with pytest.raises(DataError, match="grow to"):
        items.read(ROWS - 1)


def test_in_a_benchmarks_file(tmp_path: Path) -> None:
    """Which is read some rows at a time; one value of so many images is still too much."""
    images = pa.ListArray.from_arrays(pa.array([0, ROWS], pa.int32()), nested(MEGABYTE, ROWS).values)
    bomb = written(tmp_path / "bomb.parquet", {"images": images})
    with pytest.raises(DataError, match="grow to 18000000000 bytes"):
        list(rows(bomb))


def test_in_a_group_that_is_read_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_items, "MAX_GROWN_BYTES", 10_000_000)
    monkeypatch.setattr(parquet_items, "MAX_GROUP_BYTES", 1_000_000)
    values = {"a": shared(b"x" * 200_000, 2000), "b": [bytes([i % 256]) * 9000 for i in range(2000)]}
    bomb = written(tmp_path / "bomb.parquet", values, use_dictionary=["a"])
    with pytest.raises(DataError, match="grow to"):
        open_items(bomb, None).read(0)


def test_values_that_take_no_room(tmp_path: Path) -> None:
    """Two hundred million times nothing, in some kB: such a group is read in its own order, some rows at a time."""
    nothing = pa.nulls(2_000_000, pa.int64())
    file = tmp_path / "nothing.parquet"
    pq.write_table(pa.table({str(number): nothing for number in range(100)}), file, row_group_size=2_000_000)
    assert file.stat().st_size < 500_000
    items = open_items(file, None)
    assert items.blocks is not None and items.blocks[0].num_bytes > parquet_items.MAX_GROUP_BYTES
    assert items.read(0)[0] == {str(number): None for number in range(100)}


@pytest.mark.parametrize("column", [shared, nested])
def test_values_that_repeat_within_reason(column: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows, whether columns are read as dictionaries or not."""
    file = written(tmp_path / "some.parquet", {"images": column(b"abc" * 100, 50), "n": list(range(50)), "t": ["x", None] * 25})
    plain = [open_items(file, None).read(index)[0] for index in range(50)]
    monkeypatch.setattr(parquet_items, "MAX_GROWN_BYTES", 16_000)
    monkeypatch.setattr(parquet_items, "GROUPS", parquet_items.GroupCache())
    items = open_items(file, None)
    assert items._growing and [items.read(index)[0] for index in range(50)] == plain
