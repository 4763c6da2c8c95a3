"""Whether `data` names records that are there, and what a mixture of them may be."""

from __future__ import annotations

from pathlib import Path

from prism_nemo.config.compose import StageConfig
from prism_nemo.config.schema import CurateConfig, EvalConfig, GenerateConfig, PairsConfig
from prism_nemo.data.columns import check_columns
from prism_nemo.data.paths import expand_paths
from prism_nemo.errors import ConfigError, DataError


def check_data_files(config: StageConfig) -> None:
    """Raises ConfigError for data that the stage needs and does not have, for files and folders that do not exist."""
    data = config.data
    if isinstance(config, EvalConfig):
        if data.validation is None:
            raise ConfigError("there is no data file", where="data.validation", remedy="set data.validation=FILE")
    elif isinstance(config, PairsConfig | CurateConfig | GenerateConfig) and data.mixture:
        raise ConfigError("they are made of one set of records", where="data.mixture", remedy="set data.train, a run for each")
    elif data.train is not None and data.mixture:
        raise ConfigError("there are both data.train and data.mixture", where="data.mixture", remedy="set one of them")
    elif data.train is None and not data.mixture:
        raise ConfigError("there is no data file", where="data.train", remedy="set data.train=FILE")
    named = {"data.train": data.train, "data.validation": data.validation}
    named |= {f"data.mixture.{name}.path": source.path for name, source in data.mixture.items()}
    for key, path in named.items():
        published = isinstance(config, EvalConfig) and config.benchmark is not None and key == "data.validation"
        if path is not None:
            _check_path(key, path, published=published)
    roots = {"data.image_root": data.image_root}
    roots |= {f"data.mixture.{name}.image_root": source.image_root for name, source in data.mixture.items()}
    for key, root in roots.items():
        if root is not None and not Path(root).is_dir():
            raise ConfigError("the image folder does not exist", where=f"{key}: {root}", remedy="check the path")
    check_columns(data.columns, "data.columns")
    for name, source in data.mixture.items():
        check_columns(source.columns, f"data.mixture.{name}.columns")


def _check_path(key: str, path: str, *, published: bool) -> None:
    """A benchmark's published files have names of their own."""
    if published:
        if not Path(path).exists():
            raise ConfigError("the data file does not exist", where=f"{key}: {path}", remedy="check the path")
        return
    try:
        expand_paths(path)
    except DataError as error:
        raise ConfigError(error.what, where=f"{key}: {path}", remedy=error.remedy) from error
