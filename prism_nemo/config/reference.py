"""The list of a stage's keys for `prism-nemo STAGE --help`, made from the schema's own comments."""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from prism_nemo.config.compose import SCHEMAS, compose, options_for
from prism_nemo.config.keys import MISSING, Key, sections
from prism_nemo.config.layers import group_names


def render_keys(stage: str) -> str:
    """Every key of a stage by section: name, default, comment, type. Defaults are what the stage's YAML file leaves in place."""
    schema = SCHEMAS[stage]
    config = OmegaConf.to_container(compose(stage), resolve=False, enum_to_str=True)
    blocks = ["settings as key=value (null: none; required: there is no default)"]
    for section in sections(schema):
        if not section.keys:
            continue
        lines = [_line(key, _select(config, key.name)) for key in section.keys]
        title = f"{section.name}: {section.title}" if section.name else "(no section)"
        blocks.append("\n".join([title, *lines]))
    blocks.append("\n".join(["settings as group=option, from the shipped files", *_group_lines(stage)]))
    return "\n\n".join(blocks) + "\n"


def _line(key: Key, default: Any) -> str:
    setting = f"{key.name}={'(required)' if default == MISSING else _yaml(default)}"
    return f"  {setting:<54} {key.comment} ({key.type_text})"


def _yaml(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _select(config: Any, name: str) -> Any:
    for part in name.split("."):
        config = config[part]
    return config


def _group_lines(stage: str) -> list[str]:
    fitting = {group: options_for(stage, group) for group in sorted(group_names())}
    return [f"  {group}={' | '.join(options)}" for group, options in fitting.items() if options]
