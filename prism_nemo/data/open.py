"""Data files -> streams of encoded batches, the same way in every stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from prism_nemo.config.schema import AlignConfig, DataConfig, RLVRConfig, SFTConfig, WarmupConfig
from prism_nemo.data.bad_records import BadRecord, listing
from prism_nemo.data.index import default_cache_dir
from prism_nemo.data.order import EpochOrder, MixtureOrder
from prism_nemo.data.parquet_items import CACHED_BYTES, refuse_large_groups
from prism_nemo.data.paths import expand_paths
from prism_nemo.data.readers import RecordSet, read_files, record_file
from prism_nemo.data.record_files import JoinedRecords, RecordFile, RecordFiles, RecordList, RecordSource, UnusableRecord
from prism_nemo.data.records import Record
from prism_nemo.data.stream import RecordStream
from prism_nemo.errors import ConfigError, DataError

T = TypeVar("T")

_PROBED = 32  # records of indexed data that are read at the start
_MB = 2**20


def open_file(path: str, data: DataConfig, *, required: tuple[str, ...]) -> RecordSet:
    """The records of a file, a folder or a pattern, all with the `required` fields, and the unusable ones.

    Raises DataError past the share of bad ones.
    """
    found = read_files(data_files(path, data, in_memory=True), Path(path), max_bad_sample_share=data.max_bad_sample_share)
    return found.require(*required)


def open_stream(
    config: SFTConfig | WarmupConfig | AlignConfig | RLVRConfig,
    encode: Callable[[Record], T],
    *,
    required: tuple[str, ...],
    batch_size: int | None = None,
) -> RecordStream[T]:
    """The stream of `data.train` or `data.mixture`, each record encoded when its batch comes up.

    batch_size: records drawn at a time over all ranks; None: `trainer.global_batch_size`.

    Data of up to `data.index_above_mb` is read and checked here, and `bad` starts with what could not be read. Larger data is
    read record by record; of it only some records are tried here, to find what is altogether wrong.
    """
    data = config.data
    bad: list[BadRecord] = []
    seed = config.runtime.seed
    order = None
    records: RecordSource
    if data.mixture:
        sources = {
            name: _open_source(source.path, data, required, bad, image_root=source.image_root, columns=source.columns, name=name)
            for name, source in data.mixture.items()
        }
        weights = [source.weight for source in data.mixture.values()]
        sizes = [len(source) for source in sources.values()]
        # The sources' windows are read side by side, and all of them must fit into what is kept.
        window_bytes = CACHED_BYTES // max(1, sum(source.blocks is not None for source in sources.values()))
        orders = [
            EpochOrder(len(source), [seed, 1 + number], shuffle=data.shuffle, blocks=source.blocks, window_bytes=window_bytes)
            for number, source in enumerate(sources.values())
        ]
        records, order = JoinedRecords(sources, weights), MixtureOrder(list(sources), weights, orders, sizes)
    elif data.train is not None:
        records = _open_source(data.train, data, required, bad)
    else:
        raise ConfigError("there is no training data", where="data.train", remedy="set data.train=FILE")
    stream = RecordStream(
        records,
        encode,
        batch_size=batch_size or config.trainer.global_batch_size,
        seed=seed,
        shuffle=data.shuffle,
        max_bad_sample_share=data.max_bad_sample_share,
        order=order,
    )
    stream.bad.extend(bad)
    return stream


def data_files(
    path: str,
    data: DataConfig,
    *,
    in_memory: bool,
    image_root: str | None = None,
    columns: Mapping[str, str] | None = None,
    source: str | None = None,
) -> list[RecordFile]:
    """The opened files of a path as `data.train` takes it; their indexes are kept in the cache, or in memory alone."""
    root = image_root or data.image_root
    cache_dir = None if in_memory else cache_of(data)
    return [
        record_file(
            file,
            Path(root) if root is not None else None,
            columns=columns or data.columns,
            source=source,
            cache_dir=cache_dir,
        )
        for file in expand_paths(path)
    ]


def cache_of(data: DataConfig) -> Path:
    """Where indexes and token lengths are kept."""
    return Path(data.cache_dir) if data.cache_dir is not None else default_cache_dir()


def _open_source(
    path: str,
    data: DataConfig,
    required: tuple[str, ...],
    bad: list[BadRecord],
    *,
    image_root: str | None = None,
    columns: Mapping[str, str] | None = None,
    name: str | None = None,
) -> RecordSource:
    """Small data as a list, whose bad records go to `bad`; large data as files."""
    in_memory = sum(file.stat().st_size for file in expand_paths(path)) <= data.index_above_mb * _MB
    files = data_files(path, data, in_memory=in_memory, image_root=image_root, columns=columns, source=name)
    if not in_memory:
        for file in files if data.shuffle else ():
            refuse_large_groups(file.items)
        records = RecordFiles(files, required=required)
        _probe(records, path)
        return records
    found = read_files(files, Path(path), max_bad_sample_share=data.max_bad_sample_share).require(*required)
    bad += found.bad
    if not found.records:
        raise DataError("the data holds no usable record", where=path)
    return RecordList(found.records)


def _probe(records: RecordFiles, path: str) -> None:
    """Raises DataError when none of some records, from all over the files, can be used: then something else is wrong."""
    bad = []
    for number in range(_PROBED):
        try:
            records[number * len(records) // _PROBED]
            return
        except UnusableRecord as error:
            bad.append(error.bad)
    raise DataError(
        f"none of {_PROBED} records can be used:\n{listing(list(dict.fromkeys(bad)))}",
        where=path,
        remedy="`prism-nemo data validate` lists everything that is wrong",
    )
