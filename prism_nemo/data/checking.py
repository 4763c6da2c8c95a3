"""`prism-nemo data validate`: everything that is wrong with the records of some files, over several processes.

A record is broken when it cannot be read, lacks what the stage needs, or names an image or video that is not there; with
`--images` also when an image, or a frame of a video that a run would choose, cannot be decoded. An id that several records share
is a warning: ids name records in messages.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from prism_nemo.config.schema import DataConfig
from prism_nemo.data.bad_records import BadRecord
from prism_nemo.data.images import MAX_IMAGE_BYTES, contained, contained_file, load_image
from prism_nemo.data.open import data_files
from prism_nemo.data.record_files import RecordFiles, UnusableRecord
from prism_nemo.data.records import ImageSource, Record, VideoSource
from prism_nemo.data.video import choose_frames
from prism_nemo.data.video_frames import MAX_VIDEO_BYTES, open_video
from prism_nemo.errors import DataError
from prism_nemo.printable import printable
from prism_nemo.rewards.format import parse_response
from prism_nemo.rewards.grader import check_answer

STAGES = {  # what records need in each
    "sft": ("response",),
    "pairs": ("response",),
    "warmup": ("response", "student_response"),
    "align": ("response",),
    "rlvr": ("answer",),
    "eval": ("answer",),
}
_IN_FORMAT = {"warmup": ("response", "student_response"), "align": ("response",)}  # responses of <caption>, <think>, <answer>
_AT_ONCE = 512  # records of one piece of work
_WARNINGS_SHOWN = 1000


@dataclass(frozen=True)
class Checks:
    """What is looked at, and where; `paths` as `data.train` takes them."""

    paths: tuple[str, ...]
    data: DataConfig
    stage: str | None = None
    images: bool = False


@dataclass
class Found:
    """What is wrong: broken records in the files' order, and (id, where, where it was first) of repeated ids."""

    records: int = 0
    broken: list[BadRecord] = field(default_factory=list)
    repeated: list[tuple[str, str, str]] = field(default_factory=list)


def open_records(checks: Checks) -> RecordFiles:
    """All files, over indexes in the cache. Raises DataError for a file that is broken as a whole."""
    files = [file for path in checks.paths for file in data_files(path, checks.data, in_memory=False)]
    return RecordFiles(files, required=STAGES[checks.stage] if checks.stage else ())


def check_record(record: Record, checks: Checks) -> None:
    """Raises DataError for the first thing that is wrong with a record that could be read."""
    for source in record.images:
        _check_image(source, record.image_root, decode=checks.images)
    for video in record.videos:
        _check_video(video, record.image_root, checks)
    if record.answer is not None and checks.stage in (None, "align", "rlvr", "eval"):
        check_answer(record)
    for name in _IN_FORMAT.get(checks.stage or "", ()):
        if parse_response(getattr(record, name) or "") is None:
            raise DataError(f"the {name} is not <caption>…</caption> <think>…</think> <answer>…</answer>")


def find_problems(checks: Checks, *, workers: int = 1) -> Found:
    """Checks every record. Raises DataError for a file that cannot be opened."""
    records = open_records(checks)
    found = Found(records=len(records))
    hashes = np.zeros(len(records), dtype=np.uint64)
    for start, ids, broken in _pieces(checks, records, workers):
        hashes[start : start + len(ids)] = ids
        found.broken += broken
    found.repeated = list(_repeated(records, hashes))
    return found


def run(checks: Checks, *, workers: int, as_json: bool) -> bool:
    """Prints everything that is wrong; whether nothing is."""
    try:
        found = find_problems(checks, workers=workers)
    except DataError as error:  # a whole file
        found = Found(broken=[BadRecord("(the whole file)", error.where or ", ".join(checks.paths), error.what)])
    if as_json:
        repeated = [{"id": one, "where": where, "first": first} for one, where, first in found.repeated]
        broken = [asdict(bad) for bad in found.broken]
        print(json.dumps({"records": found.records, "broken": broken, "repeated_ids": repeated}, indent=2))
        return not found.broken
    for bad in found.broken:
        print(bad)
    for one, where, first in found.repeated[:_WARNINGS_SHOWN]:
        print(printable(f"warning: {one} [{where}]: the id is that of {first} too"))
    if len(found.repeated) > _WARNINGS_SHOWN:
        print(f"warning: and {len(found.repeated) - _WARNINGS_SHOWN} more ids that are not the first of their name")
    sys.stdout.flush()
    print(f"{len(found.broken)} of {found.records} records are broken, {len(found.repeated)} repeat an id", file=sys.stderr)
    return not found.broken


def _check_image(source: ImageSource, root: Path | None, *, decode: bool) -> None:
    if decode:
        load_image(source, root)
    elif source.path is not None:
        contained_file(source.path, root, max_bytes=MAX_IMAGE_BYTES)


def _check_video(video: VideoSource, root: Path | None, checks: Checks) -> None:
    if checks.images:
        reader, data = open_video(video, root), checks.data
        chosen = choose_frames(reader, fps=data.video_fps, bounds=(data.video_min_frames, data.video_max_frames))
        sizes = {image.size for image in reader.read(chosen)}
        if len(sizes) > 1:
            raise DataError(f"the video's frames have {len(sizes)} sizes", where=reader.where, remedy="give all of them one")
        return
    if video.path is not None:
        place = contained(video.path, root, what="video")
        if not place.is_dir():
            contained_file(video.path, root, max_bytes=MAX_VIDEO_BYTES, what="video")
    for frame in video.frames:
        _check_image(frame, root, decode=False)


def _pieces(checks: Checks, records: RecordFiles, workers: int) -> Iterator[tuple[int, np.ndarray, list[BadRecord]]]:
    starts = range(0, len(records), _AT_ONCE)
    if workers <= 1:
        for start in starts:
            yield _check_piece(records, checks, start)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(checks,)) as pool:
        try:
            yield from pool.map(_work, starts)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_worker: tuple[Any, ...] = ()  # the records and checks of a worker process


def _start_worker(checks: Checks) -> None:
    global _worker
    _worker = (open_records(checks), checks)


def _work(start: int) -> tuple[int, np.ndarray, list[BadRecord]]:
    records, checks = _worker
    return _check_piece(records, checks, start)


def _check_piece(records: RecordFiles, checks: Checks, start: int) -> tuple[int, np.ndarray, list[BadRecord]]:
    """The first record's index, a hash of every record's id (0 where it cannot be read), and what is broken."""
    ids: list[int] = []
    broken: list[BadRecord] = []
    for index in range(start, min(start + _AT_ONCE, len(records))):
        try:
            record = records[index]
        except UnusableRecord as error:
            broken.append(error.bad)
            ids.append(0)
            continue
        ids.append(_hash(record.id))
        try:
            check_record(record, checks)
        except DataError as error:
            path, number = records.where(index)
            bad = BadRecord.from_error(record.id, f"{path}:{number}", error)
            broken.append(bad if error.where is None else BadRecord(bad.id, f"{path}:{number}, {bad.where}", bad.reason))
    return start, np.array(ids, dtype=np.uint64), broken


def _hash(identifier: str) -> int:
    return int.from_bytes(hashlib.blake2b(identifier.encode("utf-8", "surrogatepass"), digest_size=8).digest()) or 1


def _repeated(records: RecordFiles, hashes: np.ndarray) -> Iterator[tuple[str, str, str]]:
    """Records whose id an earlier one has, by 64 bits of a hash and then by the ids themselves."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    again = np.flatnonzero((ordered[1:] == ordered[:-1]) & (ordered[1:] != 0)) + 1
    firsts = np.searchsorted(ordered, ordered[again])
    pairs = sorted(zip(order[again].tolist(), order[firsts].tolist(), strict=True))
    for index, first in pairs:
        one = records[index].id
        if one == records[first].id:
            yield one, _place(records, index), _place(records, first)


def _place(records: RecordFiles, index: int) -> str:
    path, number = records.where(index)
    return f"{path}:{number}"
