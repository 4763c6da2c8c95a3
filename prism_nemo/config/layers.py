"""The layers that a configuration is made of: YAML files with Hydra's `defaults:` lists, and the command line.

The subset of Hydra that `conf/` needs, with errors that name file and key: a `defaults:` list of `group: option` entries and
`_self_`, options in `conf/<group>/<option>.yaml`, placed below the group's name or, behind `# @package _global_`, at the top.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prism_nemo.config.keys import did_you_mean
from prism_nemo.config.safety import check_yaml, read_text
from prism_nemo.errors import ConfigError

SELF = "_self_"
COMMAND_LINE = "command line"
GLOBAL_PACKAGE = "# @package _global_"


@dataclass(frozen=True)
class Layer:
    """Values from one source, still nested; later layers win."""

    source: str
    values: Mapping[str, Any]


@dataclass(frozen=True)
class Document:
    """One YAML file: its own values, and the entries of its `defaults:` list as (group, option), `_self_` with option None."""

    source: str
    values: Mapping[str, Any]
    defaults: tuple[tuple[str, str | None], ...]

    @property
    def groups(self) -> set[str]:
        return {group for group, _ in self.defaults if group != SELF}


def conf_root() -> Path:
    """The folder of the shipped YAML files: in the package of an installed wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "sft.yaml").is_file():
            return folder
    raise ConfigError(
        "the shipped configuration files are missing",
        where=f"{package / 'conf'} and {package.parent / 'conf'}",
        remedy="install prism-nemo again, or run it from a complete checkout",
    )


def read_document(path: Path) -> Document:
    """Reads one YAML file.

    Raises ConfigError when the file is missing, is not YAML, or its `defaults:` list is not understood.
    """
    content = _read_yaml(path)
    values = {key: value for key, value in content.items() if key != "defaults"}
    entries = content.get("defaults", [SELF])
    if not isinstance(entries, list):
        raise ConfigError(f"`defaults` is {entries!r}", where=str(path), remedy="a list of `group: option` entries and `_self_`")
    defaults = tuple(_default_entry(entry, path) for entry in entries)
    if (SELF, None) not in defaults:
        defaults = (*defaults, (SELF, None))
    return Document(str(path), values, defaults)


def expand(document: Document, *, without: Collection[str] = ()) -> Iterator[Layer]:
    """The layers of a document in the order of its `defaults:` list, leaving out groups that a later layer chooses anew."""
    for group, option in document.defaults:
        if group == SELF:
            yield Layer(document.source, document.values)
        elif option is not None and group not in without:
            yield read_option(group, option, where=document.source)


def read_option(group: str, option: str, *, where: str) -> Layer:
    """The layer of `conf/<group>/<option>.yaml`. Raises ConfigError, naming what there is, when there is no such option."""
    options = option_names(group)
    if option not in options:
        raise ConfigError(
            f"{group}={option}: there is no such option of {group}",
            where=where,
            remedy=did_you_mean(option, options) or f"one of {', '.join(options)}; a single key is set as {group}.KEY=VALUE",
        )
    path = conf_root() / group / f"{option}.yaml"
    values, is_global = _read_option(path)
    if "defaults" in values:
        remedy = "put it into the stage's file"
        raise ConfigError("an option of a group cannot have a `defaults:` list", where=str(path), remedy=remedy)
    return Layer(str(path), values if is_global else {group: values})


@cache
def read_shipped_document(path: Path) -> Document:
    """`read_document`, once a process: a pipeline reads the shipped files for each of its stages."""
    return read_document(path)


@cache
def _read_option(path: Path) -> tuple[dict[str, Any], bool]:
    return _read_yaml(path), path.read_text(encoding="utf-8").startswith(GLOBAL_PACKAGE)


def option_names(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_root() / group).glob("*.yaml"))


@cache
def group_names() -> frozenset[str]:
    return frozenset(path.name for path in conf_root().iterdir() if path.is_dir())


def split_overrides(overrides: Sequence[str]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Command-line overrides as ({group: option}, [(key, text of the value)]), each in the given order.

    Raises ConfigError for anything that is not `key=value`.
    """
    groups: dict[str, str] = {}
    values: list[tuple[str, str]] = []
    known_groups = group_names()
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            remedy = "as in optimizer.lr=1e-5 or algorithm=dapo"
            raise ConfigError(f"`{override}` is not of the form key=value", where=COMMAND_LINE, remedy=remedy)
        if key[0] in "+~-":
            raise ConfigError(
                f"`{override}`: keys are neither added nor removed, every key has a value already",
                where=COMMAND_LINE,
                remedy=f"write {key.lstrip('+~-')}=VALUE, with null for no value",
            )
        if not text:
            raise ConfigError(f"`{override}` has no value", where=COMMAND_LINE, remedy=f"{key}=VALUE, or {key}=null for none")
        if key in known_groups:
            groups[key] = text
        else:
            values.append((key, text))
    return groups, values


def parse_yaml_value(text: str, *, where: str) -> Any:
    """The YAML value of one override's text: a number, true, null, a list, …  Raises ConfigError when it is not YAML."""
    try:
        check_yaml(text, where=where)
        return _plain(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except (yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        what = f"`{text:.200}` cannot be read as a YAML value: {first_line(error)}"
        raise ConfigError(what, where=where, remedy="quote it, or mend its brackets") from error


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError("there is no such configuration file", where=str(path), remedy="check the path")
    try:
        # OmegaConf's loader, unlike PyYAML's own, reads 1e-5 as a number and refuses a key that is given twice.
        check_yaml(read_text(path), where=str(path))
        config = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError, RecursionError) as error:
        what = f"this file cannot be read as YAML: {error}"
        raise ConfigError(what, where=str(path), remedy="mend the line it names") from error
    if not isinstance(config, DictConfig):
        remedy = "as in `optimizer:` with `lr: 1e-5` below it"
        raise ConfigError("this file is not a mapping of keys to values", where=str(path), remedy=remedy)
    return _plain(config)


def _plain(config: DictConfig) -> dict[str, Any]:
    container = OmegaConf.to_container(config, resolve=False)
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _default_entry(entry: Any, path: Path) -> tuple[str, str | None]:
    if entry == SELF:
        return SELF, None
    known = group_names()
    if isinstance(entry, dict) and len(entry) == 1:
        [(group, option)] = entry.items()
        if group in known and (option is None or isinstance(option, str)):
            return group, option
    raise ConfigError(
        f"`defaults` has the entry {entry!r}",
        where=str(path),
        remedy=f"`_self_`, or `group: option` with one of the groups {', '.join(sorted(known))}",
    )
