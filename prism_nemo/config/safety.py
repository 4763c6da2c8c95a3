"""What configuration files may not do: grow without bounds as they are read, and carry secrets into the run's files."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from prism_nemo.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_NODES = 100_000  # with every alias as long as what it stands for
MAX_DEPTH = 50
_SECRET = re.compile(
    r"KEY|TOKEN|SECRET|PASS|PWD|CREDENTIAL|AUTH|COOKIE|PRIVATE|BEARER|JWT|DSN|WEBHOOK|SIGNATURE|CONNECTION_?STRING",
    re.IGNORECASE,
)
_FOLDERS = ("PWD", "OLDPWD")
_HOLDS_SECRET = re.compile(
    r"(?:^|[_-])(?:api_?key|apikey|secret|secret_?key|password|passwd|authorization|(?:access|auth|bearer|api)_?token)$",
    re.IGNORECASE,
)
_URL_WITH_PASSWORD = re.compile(r"[a-z][a-z0-9+.-]*://[^/\s:@]*:[^/\s@]+@", re.IGNORECASE)
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_yaml(text: str, *, where: str) -> None:
    """Raises ConfigError for text that is too long, too deep, or grows too much by its aliases; YAMLError for what is no YAML."""
    if len(text) > MAX_BYTES:
        raise _too_much(f"it has {len(text)} characters, the limit is {MAX_BYTES}", where)
    sizes: dict[str, int] = {}  # of what has a name, in nodes
    open_nodes: list[tuple[str | None, int]] = [(None, 0)]
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
            if len(open_nodes) > MAX_DEPTH:
                raise _too_much(f"it is nested more than {MAX_DEPTH} deep", where)
            continue
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise _too_much(f"*{event.anchor} stands for something that holds it, or for nothing", where)
            anchor, size = None, sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        outer, so_far = open_nodes[-1]
        open_nodes[-1] = outer, so_far + size
        if so_far + size > MAX_NODES:
            raise _too_much(f"it has more than {MAX_NODES} values, counting what its aliases stand for", where)


def _too_much(what: str, where: str) -> ConfigError:
    return ConfigError(f"this is no configuration: {what}", where=where, remedy="write the settings out, in a file of their own")


def read_text(path: Path) -> str:
    """The file's text, unless it is far too long for a configuration."""
    if path.stat().st_size > 4 * MAX_BYTES:
        raise _too_much(f"it has {path.stat().st_size} bytes", str(path))
    return path.read_text(encoding="utf-8")


def keep_secrets_out() -> None:
    """`${oc.env:NAME}` in configurations, but not for names of secrets: what it gives is written to the run's config.yaml."""
    OmegaConf.register_new_resolver("oc.env", _environment, replace=True)


def _environment(name: str, *default: str | None) -> str | None:
    if name not in _FOLDERS and (_SECRET.search(name) or _URL_WITH_PASSWORD.search(os.environ.get(name, ""))):
        raise ValueError(f"{name} looks like a secret, which would be written into the run's files")
    if name in os.environ:
        return os.environ[name]
    if not default:
        raise ValueError(f"the environment variable {name} is not set")
    return None if default[0] is None else str(default[0])


def refuse_secrets(values: Any, where: str = "") -> None:
    """Raises ConfigError, without showing it, for a key, password or token among settings: they are written into the run's files.

    `values`: a configuration as plain data. Of use are the parts that have no schema, which go to others as they are.
    """
    if isinstance(values, dict):
        for name, value in values.items():
            if isinstance(value, str) and value and _HOLDS_SECRET.search(str(name)):
                raise _secret(f"{where}{name}")
            refuse_secrets(value, f"{where}{name}.")
    elif isinstance(values, list):
        for value in values:
            refuse_secrets(value, where)
    elif isinstance(values, str) and _URL_WITH_PASSWORD.search(values):
        raise _secret(where.rstrip("."))


def _secret(where: str) -> ConfigError:
    return ConfigError(
        "this looks like a secret, which would be written into the run's files",
        where=where,
        remedy="leave it to the environment: teacher.api_key_env names a variable, loggers read theirs (WANDB_API_KEY, …)",
    )
