"""`prism-nemo data inspect`: what is in some files, as text, JSON and a picture.

Of large data so many records are looked at as `--limit` says, evenly spread; counts and shares are of these.
"""

from __future__ import annotations

import io
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from prism_nemo.config.schema import DataConfig
from prism_nemo.data.bad_records import BadRecord, listing
from prism_nemo.data.columns import rename
from prism_nemo.data.forms import form_of
from prism_nemo.data.images import FORMATS, MAX_IMAGE_BYTES, contained_file, reason
from prism_nemo.data.lengths import UNUSABLE, TokenLengths, open_lengths
from prism_nemo.data.open import cache_of, data_files
from prism_nemo.data.record_files import RecordFiles, UnusableRecord
from prism_nemo.data.records import ImageSource, Record
from prism_nemo.errors import ConfigError, DataError
from prism_nemo.printable import printable

if TYPE_CHECKING:
    from prism_nemo.data.chat import ChatEncoder

OPTIONAL = ("response", "student_response", "answer", "caption", "probe_response")
PERCENTILES = (0, 50, 90, 99, 100)
_BINS = 20
_BAR = 40
_BATCH = 256  # demonstrations that are packed together for the estimate


@dataclass
class Inspection:
    """Counts over the records that were looked at; `lengths` and `image_sizes` hold one number or pair each."""

    files: list[dict[str, Any]] = field(default_factory=list)
    records: int = 0
    looked_at: int = 0
    forms: Counter[str] = field(default_factory=Counter)
    fields: Counter[str] = field(default_factory=Counter)
    images: Counter[int] = field(default_factory=Counter)  # records with so many
    videos: Counter[int] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    answer_kinds: Counter[str] = field(default_factory=Counter)
    image_sizes: list[tuple[int, int]] = field(default_factory=list)
    lengths: dict[str, list[int]] = field(default_factory=dict)
    bad: list[BadRecord] = field(default_factory=list)


def inspect(
    paths: Sequence[str], data: DataConfig, *, limit: int | None, encoder: ChatEncoder | None, lengths_of: Path | None = None
) -> Inspection:
    """Looks at the records. With an encoder, whose files are in `lengths_of`, it counts tokens as well."""
    files = [file for path in paths for file in data_files(path, data, in_memory=False)]
    records = RecordFiles(files)
    found = Inspection(records=len(records))
    for file in files:
        path = file.items.path
        found.files.append({"path": str(path), "records": len(file.items), "bytes": path.stat().st_size})
    lengths = None
    if encoder is not None:
        assert lengths_of is not None
        lengths = open_lengths(cache_of(data), records.fingerprint, len(records), lengths_of, data)
    for index in _spread(len(records), limit):
        found.looked_at += 1
        try:
            _look(found, records, index, data)
            if encoder is not None and lengths is not None:
                _count_tokens(found, records, index, encoder, lengths)
        except UnusableRecord as error:
            found.bad.append(error.bad)
    if lengths is not None:
        lengths.flush()
    return found


def _spread(count: int, limit: int | None) -> Iterator[int]:
    if limit is None or limit >= count:
        yield from range(count)
    else:
        yield from (number * count // limit for number in range(limit))


def _look(found: Inspection, records: RecordFiles, index: int, data: DataConfig) -> None:
    record = records[index]
    item = records.item(index)
    assert isinstance(item, Mapping), "a record was made of it"
    item = rename(item, data.columns) if data.columns else item
    found.forms[form_of(item) or "?"] += 1
    found.fields.update(str(name) for name, value in item.items() if value is not None and value != [])
    found.images[len(record.images)] += 1
    found.videos[len(record.videos)] += 1
    found.sources[record.source or "(none)"] += 1
    if record.answer is not None:
        found.answer_kinds[record.answer_kind or "(not told)"] += 1
    _add(found, "prompt characters", len(record.prompt))
    for name in ("response", "student_response"):
        text = getattr(record, name)
        if text is not None:
            _add(found, f"{name} characters", len(text))
    for source in record.images:
        try:
            found.image_sizes.append(image_size(source, record.image_root))
        except DataError as error:
            found.bad.append(BadRecord.from_error(record.id, f"record {record.id}", error))


def image_size(source: ImageSource, root: Path | None) -> tuple[int, int]:
    """Width and height, from the image's head alone. Raises DataError where there is none."""
    opened: Any
    if source.path is not None:
        opened = contained_file(source.path, root, max_bytes=MAX_IMAGE_BYTES)
    else:
        opened = io.BytesIO(source.data or b"")
    try:
        with Image.open(opened, formats=FORMATS) as image:
            return image.size
    except Exception as error:  # decoders of foreign bytes raise anything
        raise DataError(
            f"the image cannot be decoded: {reason(error)}", where=str(source.path or "bytes in the record")
        ) from error


def _count_tokens(found: Inspection, records: RecordFiles, index: int, encoder: ChatEncoder, lengths: TokenLengths) -> None:
    known = lengths.get(index)
    if known is None:
        known = _encoded_length(found, records[index], encoder)
        lengths.set(index, *known)
    elif known[0] == UNUSABLE:
        _encoded_length(found, records[index], encoder)  # only to say why
    if known[0] != UNUSABLE:
        _add(found, "prompt tokens", known[0])
        if known[1]:
            _add(found, "response tokens", known[1])


def _encoded_length(found: Inspection, record: Record, encoder: ChatEncoder) -> tuple[int, int]:
    try:
        prompt = len(encoder.encode_prompt(record))
        return prompt, len(encoder.encode_response(record.response)) if record.response is not None else 0
    except DataError as error:
        found.bad.append(BadRecord.from_error(record.id, f"record {record.id}", error))
        return UNUSABLE, UNUSABLE


def _add(found: Inspection, name: str, value: int) -> None:
    found.lengths.setdefault(name, []).append(value)


def rows_needed(lengths: Sequence[int], row_tokens: int) -> tuple[int, float]:
    """Rows that `lengths` fill when so many demonstrations at a time are packed first-fit-decreasing, and how full they are."""
    rows: list[int] = []
    kept = [length for length in lengths if length <= row_tokens]
    for start in range(0, len(kept), _BATCH):
        bins: list[int] = []
        for length in sorted(kept[start : start + _BATCH], reverse=True):
            slot = next((number for number, used in enumerate(bins) if used + length <= row_tokens), None)
            if slot is None:
                bins.append(length)
            else:
                bins[slot] += length
        rows += bins
    return len(rows), sum(rows) / (len(rows) * row_tokens) if rows else 0.0


def as_json(found: Inspection) -> dict[str, Any]:
    """Everything, with lengths and sizes as percentiles."""
    sizes = np.array(found.image_sizes or [(0, 0)])
    return {
        "files": found.files,
        "records": found.records,
        "looked_at": found.looked_at,
        **{name: dict(getattr(found, name).most_common()) for name in ("forms", "fields", "sources", "answer_kinds")},
        **{name: {str(key): count for key, count in sorted(getattr(found, name).items())} for name in ("images", "videos")},
        "image_width": _percentiles(sizes[:, 0]) if found.image_sizes else {},
        "image_height": _percentiles(sizes[:, 1]) if found.image_sizes else {},
        "lengths": {name: _percentiles(values) for name, values in found.lengths.items()},
        "broken": len(found.bad),
    }


def as_text(found: Inspection, data: DataConfig, *, row_tokens: int) -> str:
    """For people."""
    lines = [f"{printable(file['path'])}: {file['records']} records, {file['bytes'] / 1e6:.1f} MB" for file in found.files[:20]]
    if len(found.files) > 20:
        lines.append(f"and {len(found.files) - 20} more files: {found.records} records in all")
    if found.looked_at < found.records:
        lines.append(f"{found.looked_at} of {found.records} records, evenly spread (--limit 0: all)")
    told = as_json(found)
    lines += ["", *(f"{name:<14}{_counts(told[name], found.looked_at)}" for name in ("forms", "fields", "sources"))]
    lines += [f"{name:<14}{_counts(told[name], found.looked_at)}" for name in ("images", "videos", "answer_kinds") if told[name]]
    for name in ("image_width", "image_height"):
        if told[name]:
            lines.append(f"{name:<14}{_shown(told[name])}")
    for name, values in found.lengths.items():
        lines += ["", f"{name}: {_shown(told['lengths'][name])}", *_histogram(values)]
    lines += _limits(found, data, row_tokens)
    if found.bad:
        lines += ["", f"{len(found.bad)} broken (`prism-nemo data validate` lists all):", listing(found.bad)]
    return "\n".join(lines) + "\n"


def _limits(found: Inspection, data: DataConfig, row_tokens: int) -> list[str]:
    prompts, responses = found.lengths.get("prompt tokens", []), found.lengths.get("response tokens", [])
    if not prompts:
        return []
    long_prompts = sum(length > data.max_prompt_length for length in prompts)
    long_responses = sum(length > data.max_response_length for length in responses)
    lines = [
        "",
        f"{long_prompts} prompts above data.max_prompt_length={data.max_prompt_length}, "
        f"{long_responses} responses above data.max_response_length={data.max_response_length}",
    ]
    if len(prompts) == len(responses):
        rows, fill = rows_needed([sum(both) for both in zip(prompts, responses, strict=True)], row_tokens)
        lines.append(f"packed {_BATCH} at a time into rows of {row_tokens} tokens: {rows} rows, {fill:.0%} full")
    return lines


def draw(found: Inspection, out: Path) -> None:
    """Histograms of every length as a picture. Raises ConfigError without matplotlib."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ConfigError("pictures need matplotlib", where="--plot", remedy="pip install 'prism-nemo[report]'") from error
    panels = [(name, values) for name, values in found.lengths.items() if values]
    if found.image_sizes:
        panels.append(("image megapixels", [width * height / 1e6 for width, height in found.image_sizes]))  # type: ignore[misc]
    figure, axes = pyplot.subplots(len(panels) or 1, 1, figsize=(8, 2.2 * max(1, len(panels))), squeeze=False)
    for axis, (name, values) in zip(axes[:, 0], panels, strict=False):
        axis.hist(values, bins=60, color="#0072b2")
        axis.set_yscale("log")
        axis.set_xlabel(name)
        axis.set_ylabel("records" if "image" not in name else "images")
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def print_report(found: Inspection, data: DataConfig, *, row_tokens: int, json_wanted: bool) -> None:
    """To standard output."""
    text = json.dumps(as_json(found), indent=2) + "\n" if json_wanted else as_text(found, data, row_tokens=row_tokens)
    sys.stdout.write(text)


def _percentiles(values: Any) -> dict[str, float]:
    numbers = np.percentile(np.asarray(values), PERCENTILES, method="inverted_cdf")
    return {
        "min" if q == 0 else "max" if q == 100 else f"p{q}": int(value) for q, value in zip(PERCENTILES, numbers, strict=True)
    }


def _shown(percentiles: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:g}" for name, value in percentiles.items())


def _counts(counts: Mapping[str, int], total: int) -> str:
    shown = [f"{printable(name)} {count} ({count / max(1, total):.0%})" for name, count in list(counts.items())[:12]]
    return ", ".join(shown) + (f", and {len(counts) - 12} more" if len(counts) > 12 else "")


def _histogram(values: Sequence[int]) -> list[str]:
    counts, edges = np.histogram(values, bins=min(_BINS, max(1, max(values) - min(values))))
    width = len(f"{edges[-1]:.0f}")
    return [
        f"  {low:>{width}.0f} to {high:>{width}.0f}  {'#' * -(-int(count) * _BAR // int(counts.max())):<{_BAR}}  {count}"
        for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True)
    ]
