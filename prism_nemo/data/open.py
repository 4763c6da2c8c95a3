"""Data files -> streams of encoded batches, the same way in every stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from prism_nemo.config.schema import AlignConfig, DataConfig, RLVRConfig, SFTConfig, WarmupConfig
from prism_nemo.data.readers import RecordSet, read_records
from prism_nemo.data.records import Record
from prism_nemo.data.stream import RecordStream
from prism_nemo.errors import ConfigError

T = TypeVar("T")


def open_file(path: str, data: DataConfig, *, required: tuple[str, ...]) -> RecordSet:
    """A file's records, all with the `required` fields, and its unusable ones. Raises DataError past the share of bad ones."""
    image_root = Path(data.image_root) if data.image_root is not None else None
    return read_records(Path(path), image_root=image_root, max_bad_sample_share=data.max_bad_sample_share).require(*required)


def open_stream(
    config: SFTConfig | WarmupConfig | AlignConfig | RLVRConfig, encode: Callable[[Record], T], *, required: tuple[str, ...]
) -> RecordStream[T]:
    """The stream of `data.train`, each record encoded when its batch comes up. `bad` starts with what could not be read."""
    if config.data.train is None:
        raise ConfigError("there is no training data", where="data.train", remedy="name a .json, .jsonl or .parquet file")
    found = open_file(config.data.train, config.data, required=required)
    stream = RecordStream(
        found.records,
        encode,
        batch_size=config.trainer.global_batch_size,
        seed=config.runtime.seed,
        shuffle=config.data.shuffle,
        max_bad_sample_share=config.data.max_bad_sample_share,
    )
    stream.bad.extend(found.bad)
    return stream
