"""Data files -> records: LLaMA-Factory `sharegpt` multimodal files and pairwise teacher/student files.

Both forms may come as .json (a list), .jsonl or .parquet. A record is

* `messages` [{role, content}] or `conversations` [{from, value}] (an optional system turn, one user turn, at most one assistant
  turn), `images`, `videos`, and optionally `id`, `answer`, `caption`, `probe_response`, `student_response`, `metadata`; or
* `prompt`, `image`/`images`, `video`/`videos`, and for `teacher` and `student` either `…_response`, or `…_caption` and `…_cot`
  (with `…_answer` when the reasoning does not hold its answer; for the teacher, `answer`).

Images and videos are as `prism_nemo.data.sources` says; a turn's content may also be a list of parts, as in chat templates.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_nemo.config.schema import DataConfig
from prism_nemo.data.bad_records import BadRecord, refuse_bad_share
from prism_nemo.data.records import Record
from prism_nemo.data.sources import Content, kind_of, read_content, with_record_fields
from prism_nemo.errors import DataError

_ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}


@dataclass(frozen=True)
class RecordSet:
    """What a data file holds: the usable records in the file's order, and the others."""

    path: Path
    records: list[Record]
    bad: list[BadRecord]

    def require(self, *fields: str) -> RecordSet:
        """This set, if every record has the named optional fields (`response`, `answer`, …); otherwise a DataError."""
        for record in self.records:
            missing = [name for name in fields if getattr(record, name) is None]
            if missing:
                raise DataError(
                    f"record {record.id} has no {' and no '.join(missing)}",
                    where=str(self.path),
                    remedy=f"this stage needs {', '.join(fields)} in every record",
                )
        return self


def read_records(
    path: Path, *, image_root: Path | None, max_bad_sample_share: float = DataConfig.max_bad_sample_share
) -> RecordSet:
    """Read every record of a .json, .jsonl or .parquet file. Images are not opened.

    Relative image paths are taken from `image_root`, or from the folder of the file when it is None. A record without an id
    is called `<file stem>:<line>` (the item's number in .json and .parquet). Raises DataError when the file is missing, is not
    of these kinds, holds nothing, or when more than `max_bad_sample_share` of its records cannot be used.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError("the data file does not exist", where=str(path), remedy="check data.train and data.validation")
    items = {".json": _json_items, ".jsonl": _jsonl_items, ".parquet": _parquet_items}.get(path.suffix.lower())
    if items is None:
        raise DataError(f"a data file cannot end in {path.suffix!r}", where=str(path), remedy="use .json, .jsonl or .parquet")
    root = (path.parent if image_root is None else Path(image_root)).absolute()  # paths stay right wherever they are used
    records: list[Record] = []
    bad: list[BadRecord] = []
    for number, item in items(path):
        record_id = _record_id(item, f"{path.stem}:{number}")
        try:
            if isinstance(item, DataError):
                raise item
            records.append(_to_record(item, record_id, root))
        except DataError as error:
            bad.append(BadRecord.from_error(record_id, f"{path}:{number}", error))
    if not records and not bad:
        raise DataError("the data file holds no records", where=str(path))
    refuse_bad_share(bad, num_bad=len(bad), num_seen=len(records) + len(bad), max_share=max_bad_sample_share, where=str(path))
    return RecordSet(path, records, bad)


def _jsonl_items(path: Path) -> Iterator[tuple[int, object]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:  # ValueError: malformed JSON, or bytes that are not UTF-8
                yield number, DataError(f"the line is not JSON: {error}", remedy="one JSON object per line, in UTF-8")


def _json_items(path: Path) -> Iterator[tuple[int, object]]:
    try:
        items = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"the file is not JSON: {error}", where=str(path), remedy="a .json data file is one list of records, in UTF-8"
        ) from error
    if not isinstance(items, list):
        raise DataError(
            f"the file holds {kind_of(items)}, not a list of records",
            where=str(path),
            remedy="use .jsonl for one record per line",
        )
    yield from enumerate(items, start=1)


def _parquet_items(path: Path) -> Iterator[tuple[int, object]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for item in batch.to_pylist():
                    number += 1
                    yield number, item
    except pa.ArrowException as error:
        raise DataError(f"the file is not readable parquet: {error}", where=str(path)) from error


def _record_id(item: object, default: str) -> str:
    given = item.get("id") if isinstance(item, Mapping) else None
    return str(given) if isinstance(given, (str, int)) and str(given) else default


def _to_record(item: object, record_id: str, root: Path) -> Record:
    if not isinstance(item, Mapping):
        raise DataError(f"a record is an object, this is {kind_of(item)}")
    if item.get("audios"):
        raise DataError("audios are not supported", remedy="leave the record out")
    metadata = dict(_optional(item, "metadata", Mapping) or {})
    if "messages" in item or "conversations" in item:
        system, content, response = _sharegpt_turns(item, root)
        student = _text(item, "student_response")
    elif "prompt" in item or "question" in item:
        system, content = _text(item, "system"), Content(_text(item, "prompt") or _text(item, "question") or "")
        response, student = _pair_side(item, "teacher"), _pair_side(item, "student")
    else:
        raise DataError(
            "the record has neither `messages`, `conversations` nor `prompt`",
            remedy="see prism_nemo.data.readers for the two forms",
        )
    if system is not None:
        metadata["system"] = system
    content = with_record_fields(content, item, root)
    return Record(
        id=record_id,
        prompt=content.text,
        images=content.images,
        videos=content.videos,
        response=response,
        student_response=student,
        answer=_answer(item, "answer"),
        caption=_text(item, "caption"),
        probe_response=_text(item, "probe_response"),
        image_root=root,
        metadata=metadata,
    )


def _sharegpt_turns(item: Mapping[str, Any], root: Path) -> tuple[str | None, Content, str | None]:
    """The system's text, the user's content and the assistant's text."""
    name = "messages" if "messages" in item else "conversations"
    turns = item[name]
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
            raise DataError(f"a turn has the role {given!r}", remedy=f"known roles: {', '.join(_ROLES)}")
        contents[role] = found = read_content(content, root, turn=str(given))
        if role != "user" and (found.images or found.videos):
            raise DataError(f"the {given} turn holds images or videos", remedy="they belong into the user's turn")
        if role == "assistant" and not found.text.strip():
            raise DataError("the assistant's turn is empty", remedy="leave the turn out where there is no response")
        roles.append(role)
    if [role for role in roles if role != "system"] not in (["user"], ["user", "assistant"]) or "system" in roles[1:]:
        raise DataError(
            f"the turns are {', '.join(roles) or 'none'}",
            remedy="an optional system turn, one user turn, at most one assistant turn",
        )
    system = contents["system"].text if "system" in contents else _text(item, "system")
    return system, contents["user"], contents["assistant"].text if "assistant" in contents else None


def _pair_side(item: Mapping[str, Any], side: str) -> str | None:
    """A side's whole response, put together from its parts where the file holds parts."""
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
        if answer is None and side == "teacher":
            answer = _answer(item, "answer")
        if answer is None:
            raise DataError(f"`{side}_cot` holds no <answer>, and there is no `{side}_answer`")
        reasoning = f"{reasoning} <answer> {answer.strip()} </answer>"
    return f"{caption} {reasoning}"


def _text(item: Mapping[str, Any], name: str) -> str | None:
    return _optional(item, name, str)


def _answer(item: Mapping[str, Any], name: str) -> str | None:
    """Answers may be numbers in the file; they are text here."""
    value = item.get(name)
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else _text(item, name)


def _optional(item: Mapping[str, Any], name: str, kind: type) -> Any:
    value = item.get(name)
    if value is not None and not isinstance(value, kind):
        raise DataError(f"`{name}` is {kind_of(value)}")
    return value
