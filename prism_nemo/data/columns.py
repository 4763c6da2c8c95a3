"""Other names for a record's fields, turns and roles, as LLaMA-Factory's dataset_info.json gives them: `data.columns`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prism_nemo.errors import ConfigError

FIELDS = (
    "id",
    "messages",
    "prompt",
    "system",
    "images",
    "videos",
    "answer",
    "caption",
    "probe_response",
    "data_source",
    "equivalent_answers",
    "answer_kind",
    "teacher_caption",
    "teacher_cot",
    "teacher_answer",
    "teacher_response",
    "student_caption",
    "student_cot",
    "student_answer",
    "student_response",
)
TAGS = {  # LLaMA-Factory's names, and what they are called here
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
}
_TURNS = ("role_tag", "content_tag")


def check_columns(columns: Mapping[str, str], where: str) -> None:
    """Raises ConfigError for a name that is neither a field nor a tag."""
    unknown = sorted(set(columns) - {*FIELDS, *TAGS})
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)}: no field of a record", where=where, remedy=f"some of {', '.join((*FIELDS, *TAGS))}"
        )


def rename(item: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The item with its own names replaced by ours; what does not carry the other name stays as it is."""
    theirs = {other: name for name, other in columns.items() if name in FIELDS}
    renamed = {name: value for name, value in item.items() if name not in theirs}
    renamed |= {theirs[name]: value for name, value in item.items() if name in theirs}
    turns = renamed.get("messages")
    if isinstance(turns, list) and any(tag in columns for tag in TAGS):
        renamed["messages"] = [_turn(turn, columns) if isinstance(turn, Mapping) else turn for turn in turns]
    return renamed


def _turn(turn: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    names = {columns[tag]: TAGS[tag] for tag in _TURNS if tag in columns}
    roles = {columns[tag]: TAGS[tag] for tag in TAGS if tag in columns and tag not in _TURNS}
    renamed = {names.get(name, name): value for name, value in turn.items()}
    for name in ("role", "from"):
        if isinstance(renamed.get(name), str):
            renamed[name] = roles.get(renamed[name], renamed[name])
    return renamed
