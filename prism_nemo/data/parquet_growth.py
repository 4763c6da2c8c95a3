"""Parquet files that grow as they are read: a value stored once may stand in every row.

So texts and bytes of columns with a dictionary are read as dictionaries, and only counted, before anything makes rows of them.
The file's own footer says which columns these are; a file whose footer lies is not kept from filling the memory.
"""

from __future__ import annotations

from typing import Any

from prism_nemo.errors import DataError

_BYTES_PER_VALUE = 8  # of Arrow's, at least about so many, however short it is in the file
_GROWING = ("BYTE_ARRAY", "FIXED_LEN_BYTE_ARRAY")


def group_bytes(group: Any, limit: int) -> int:
    """What a row group takes in memory by its footer; for one of more values than `limit` allows, at least what these take."""
    values = _BYTES_PER_VALUE * sum(group.column(number).num_values for number in range(group.num_columns))
    return int(values) if values > limit else int(group.total_byte_size)


def growing_columns(metadata: Any, limit: int) -> list[str]:
    """The columns of which a row group could grow beyond `limit` bytes."""
    found = set()
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        for column in map(group.column, range(group.num_columns)):
            most = column.num_values * column.total_uncompressed_size
            if column.has_dictionary_page and column.physical_type in _GROWING and most > limit:
                found.add(column.path_in_schema)
    return sorted(found)


def check_growth(table: Any, limit: int) -> None:
    """Raises DataError for a table, or a part of one, whose values take more than `limit` bytes once each stands for itself."""
    size = sum(_grown(column) for column in table.columns)
    if size > limit:
        raise DataError(
            f"the values grow to {size} bytes as they are read, the limit is {limit}",
            remedy="write the file with smaller row groups, or put large things into files",
        )


def _grown(array: Any) -> int:
    import pyarrow as pa
    import pyarrow.compute as pc

    if isinstance(array, pa.ChunkedArray):
        return sum(map(_grown, array.chunks))
    if pa.types.is_dictionary(array.type):
        lengths = pc.fill_null(pc.cast(pc.binary_length(array.dictionary), pa.int64()), 0)
        return int(pc.sum(lengths.take(array.indices)).as_py() or 0)
    if pa.types.is_struct(array.type):
        return sum(map(_grown, array.flatten()))
    if pa.types.is_map(array.type):
        return _grown(array.keys) + _grown(array.items)
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        return _grown(array.flatten())
    return int(array.nbytes)
