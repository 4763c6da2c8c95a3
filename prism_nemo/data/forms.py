"""One item of a data file -> a record. An item is in one of three forms, told by its fields:

* `sharegpt`: `messages` [{role, content}] or `conversations` [{from, value}]: an optional system turn, one user turn, at most one
  assistant turn, whose text is the response;
* RL: `prompt`, a list of such turns or text, and `reward_model` {"ground_truth": the verified answer} (or that as JSON text);
* pairwise: `prompt` or `question`, and for `teacher` and `student` either `…_response`, or `…_caption` and `…_cot` (with
  `…_answer` when the reasoning does not hold its answer; for the teacher, the verified answer).

All may have `id`, `image`/`images`, `video`/`videos`, `system`, `answer`, `equivalent_answers`, `answer_kind`, `data_source`,
`caption`, `probe_response`, `teacher_…` and `student_…`, `metadata` and `extra_info` (objects, or JSON text of one). Images and
videos are as `prism_nemo.data.sources` says; a turn's content may also be a list of parts, as in chat templates.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_nemo.data.columns import rename
from prism_nemo.data.records import Record
from prism_nemo.data.sources import Content, kind_of, read_content, with_record_fields
from prism_nemo.errors import DataError

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


@dataclass(frozen=True)
class Reading:
    """How the items of a file are read.

    root     images and videos lie below it
    columns  other names of fields and roles (see `data.columns`)
    source   the data set's name, for records that do not tell theirs
    """

    root: Path
    columns: Mapping[str, str] = field(default_factory=dict)
    source: str | None = None


def record_id(item: object, default: str, columns: Mapping[str, str]) -> str:
    """The item's own id, or the default where it has none."""
    given = item.get(columns.get("id", "id")) if isinstance(item, Mapping) else None
    return str(given) if isinstance(given, (str, int)) and str(given) else default


def form_of(item: Mapping[str, Any]) -> str | None:
    """`sharegpt`, `rl`, `pairwise`, or None."""
    if "messages" in item or "conversations" in item:
        return "sharegpt"
    if "prompt" in item or "question" in item:
        return "rl" if item.get("reward_model") is not None or isinstance(item.get("prompt"), list) else "pairwise"
    return None


def to_record(item: object, identifier: str, reading: Reading) -> Record:
    """The record. Raises DataError for an item that makes none."""
    if not isinstance(item, Mapping):
        raise DataError(f"a record is an object, this is {kind_of(item)}")
    if reading.columns:
        item = rename(item, reading.columns)
    if item.get("audios"):
        raise DataError("audios are not supported", remedy="leave the record out")
    metadata = {**(_object(item, "extra_info") or {}), **(_object(item, "metadata") or {})}
    form = form_of(item)
    if form is None:
        raise DataError(
            "the record has neither `messages`, `conversations` nor `prompt`",
            remedy="see prism_nemo.data.forms for the forms of records",
        )
    root = reading.root
    answer = _verified_answer(item)
    response: str | None = None
    if form == "sharegpt":
        name = "messages" if "messages" in item else "conversations"
        system, content, response = _turns(item[name], name, root)
    elif isinstance(item.get("prompt"), list):
        system, content, response = _turns(item["prompt"], "prompt", root)
    else:
        system, content = None, Content(_text(item, "prompt") or _text(item, "question") or "")
    system = _text(item, "system") if system is None else system
    if system is not None:
        metadata["system"] = system
    content = with_record_fields(content, item, root)
    return Record(
        id=identifier,
        prompt=content.text,
        images=content.images,
        videos=content.videos,
        response=_pair_side(item, "teacher", answer) if response is None else response,
        student_response=_pair_side(item, "student", None),
        answer=answer,
        equivalent_answers=_answers(item, "equivalent_answers"),
        answer_kind=_text(item, "answer_kind"),
        source=_text(item, "data_source") or reading.source,
        caption=_text(item, "caption"),
        probe_response=_text(item, "probe_response"),
        image_root=root,
        metadata=metadata,
    )


def _turns(turns: object, name: str, root: Path) -> tuple[str | None, Content, str | None]:
    """The system's text, the user's content and the assistant's text."""
    if not isinstance(turns, list):
        raise DataError(f"`{name}` is {kind_of(turns)}, not a list of turns")
    contents: dict[str, Content] = {}
    roles = []
    for turn in turns:
        if not isinstance(turn, Mapping):
            raise DataError(f"a turn of `{name}` is {kind_of(turn)}, not an object")
        given, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        role = _ROLES.get(given) if isinstance(given, str) else None
        if role is None:
            raise DataError(f"a turn has the role {given!r:.40}", remedy=f"known roles: {', '.join(_ROLES)}; see data.columns")
        contents[role] = found = read_content(content, root, turn=str(given))
        if role != "user" and (found.images or found.videos):
            raise DataError(f"the {given} turn holds images or videos", remedy="they belong into the user's turn")
        if role == "assistant" and not found.text.strip():
            raise DataError("the assistant's turn is empty", remedy="leave the turn out where there is no response")
        roles.append(role)
    if [role for role in roles if role != "system"] not in (["user"], ["user", "assistant"]) or "system" in roles[1:]:
        raise DataError(
            f"the turns are {', '.join(roles[:8]) or 'none'}",
            remedy="an optional system turn, one user turn, at most one assistant turn",
        )
    system = contents["system"].text if "system" in contents else None
    return system, contents["user"], contents["assistant"].text if "assistant" in contents else None


def _pair_side(item: Mapping[str, Any], side: str, truth: str | None) -> str | None:
    """A side's whole response, put together from its parts where the file holds parts; `truth` stands in for its answer."""
    response = _text(item, f"{side}_response")
    if response is not None:
        return response
    caption, reasoning = _text(item, f"{side}_caption"), _text(item, f"{side}_cot")
    if caption is None and reasoning is None:
        return None
    if caption is None or reasoning is None:
        raise DataError(f"only one of `{side}_caption` and `{side}_cot` is there", remedy=f"give both, or `{side}_response`")
    if "<caption>" not in caption:
        caption = f"<caption> {caption.strip()} </caption>"
    if "<think>" not in reasoning:
        reasoning = f"<think> {reasoning.strip()} </think>"
    if "<answer>" not in reasoning:
        answer = _answer(item, f"{side}_answer")
        answer = truth if answer is None else answer
        if answer is None:
            raise DataError(f"`{side}_cot` holds no <answer>, and there is no `{side}_answer`")
        reasoning = f"{reasoning} <answer> {answer.strip()} </answer>"
    return f"{caption} {reasoning}"


def _verified_answer(item: Mapping[str, Any]) -> str | None:
    """`answer`, or what the RL form calls the ground truth."""
    model = _object(item, "reward_model")
    return _answer(item, "answer") if model is None or item.get("answer") is not None else _answer(model, "ground_truth")


def _object(item: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """An object, or the JSON text of one, as parquet files hold it."""
    value = item.get(name)
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"`{name}` is not JSON: {error}") from error
    if value is not None and not isinstance(value, Mapping):
        raise DataError(f"`{name}` is {kind_of(value)}")
    return None if value is None else dict(value)


def _answers(item: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = item.get(name)
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError(f"`{name}` is not JSON: {error}") from error
    if value is None:
        return ()
    answers = [_answer({name: one}, name) for one in (value if isinstance(value, list) else [value])]
    return tuple(answer for answer in answers if answer is not None)


def _text(item: Mapping[str, Any], name: str) -> str | None:
    value = item.get(name)
    if value is not None and not isinstance(value, str):
        raise DataError(f"`{name}` is {kind_of(value)}")
    return value


def _answer(item: Mapping[str, Any], name: str) -> str | None:
    """Answers may be numbers in the file; they are text here."""
    value = item.get(name)
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else _text(item, name)
