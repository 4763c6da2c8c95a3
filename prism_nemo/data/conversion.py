"""`prism-nemo data convert`: records from files of one kind and form to another, one at a time.

Everything a record holds is kept, whatever the form: the new file gives the record that the old file gave. What a kind of file
cannot hold is an error that names the record, never left out in silence.

Images, as they are told:

    keep    paths stay paths, relative to the images' folder; bytes stay bytes (parquet, .tar)
    copy    every image becomes a file in `<out>_images/`, named by its content
    embed   every image's bytes go into the file (parquet, .tar)
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_nemo.config.schema import DataConfig
from prism_nemo.data.bad_records import BadRecord, listing
from prism_nemo.data.images import MAX_IMAGE_BYTES, contained_file
from prism_nemo.data.open import data_files
from prism_nemo.data.record_files import RecordFiles, UnusableRecord
from prism_nemo.data.records import ImageSource, Record, VideoSource
from prism_nemo.data.writers import Write, image_suffix, open_writer
from prism_nemo.errors import DataError

FORMS = ("sharegpt", "rl", "pairwise")
IMAGE_MODES = ("keep", "copy", "embed")
HOLDS_BYTES = (".parquet", ".tar")


@dataclass(frozen=True)
class Conversion:
    """What becomes what. `shard_records`: of one output file; None: all in one."""

    paths: tuple[str, ...]
    out: Path
    form: str
    images: str
    data: DataConfig
    skip_bad: bool = False
    overwrite: bool = False
    shard_records: int | None = None


@dataclass
class Outcome:
    written: int = 0
    files: list[Path] = field(default_factory=list)
    skipped: list[BadRecord] = field(default_factory=list)
    image_root: Path | None = None  # where paths start, when it is not the folder of the new file


def convert(task: Conversion) -> Outcome:
    """Writes the new files; each appears when it is complete, and on an error none stays.

    Raises DataError for unusable records, unless they are to be skipped, and for what the new file cannot hold.
    """
    files = [file for path in task.paths for file in data_files(path, task.data, in_memory=False)]
    records = RecordFiles(files)
    _check(task)
    outcome = Outcome()
    usable = _usable(records, task, outcome)
    try:
        with _image_folder(task) as folder:
            images = _Images(task, folder)
            for record in usable:
                path = _shard(task, len(outcome.files))
                with open_writer(path, task.form) as write:
                    shard = itertools.chain([record], usable)
                    for one in itertools.islice(shard, task.shard_records):
                        _write(one, task, images, write)
                        outcome.written += 1
                outcome.files.append(path)
            if not outcome.files:
                raise DataError("there is no usable record to write", where=", ".join(task.paths))
    except BaseException:
        for path in outcome.files:
            path.unlink(missing_ok=True)
        raise
    outcome.image_root = images.root_to_set()
    return outcome


def _write(record: Record, task: Conversion, images: _Images, write: Write) -> None:
    try:
        if task.form == "sharegpt" and record.response is not None and not record.response.strip():
            raise DataError("the response is empty, which an assistant's turn cannot be", remedy="--form pairwise or rl")
        write(to_item(record, task.form, images.image, images.video))
    except DataError as error:
        where = f"record {record.id}" + (f", {error.where}" if error.where else "")
        raise DataError(error.what, where=where, remedy=error.remedy) from error


def to_item(
    record: Record, form: str, image: Callable[[ImageSource, Path | None], Any], video: Callable[[VideoSource, Path | None], Any]
) -> dict[str, Any]:
    """The record in a form that `forms.to_record` reads as the same record."""
    metadata = {name: value for name, value in record.metadata.items() if name != "system"}
    system = record.metadata.get("system")
    turns = [{"role": "system", "content": system}] if system is not None else []
    turns.append({"role": "user", "content": record.prompt})
    item: dict[str, Any] = {"id": record.id}
    if form == "sharegpt":
        if record.response is not None:
            turns.append({"role": "assistant", "content": record.response})
        item |= {"messages": turns, "answer": record.answer}
    elif form == "rl":
        truth = None if record.answer is None else {"style": "rule", "ground_truth": record.answer}
        item |= {"prompt": turns, "reward_model": truth, "teacher_response": record.response}
    else:
        item |= {"prompt": record.prompt, "system": system, "teacher_response": record.response, "answer": record.answer}
    item |= {
        "images": [image(one, record.image_root) for one in record.images],
        "videos": [video(one, record.image_root) for one in record.videos],
        "student_response": record.student_response,
        "equivalent_answers": list(record.equivalent_answers),
        "answer_kind": record.answer_kind,
        "data_source": record.source,
        "caption": record.caption,
        "probe_response": record.probe_response,
        "metadata": metadata or None,
    }
    return {name: value for name, value in item.items() if value is not None and value != []}


class _Images:
    """What stands for an image in the new file."""

    def __init__(self, task: Conversion, folder: Path | None) -> None:
        self._task = task
        self._folder = folder
        self._bytes = task.out.suffix.lower() in HOLDS_BYTES
        self._roots: set[Path] = set()

    def image(self, source: ImageSource, root: Path | None) -> Any:
        """A path, or the image's bytes as they are. Raises DataError for an image that is not there or does not fit the mode."""
        if self._task.images == "keep":
            if source.path is not None:
                return self._kept(source.path, root)
            if not self._bytes:
                raise DataError(
                    f"the image is in the record, which {self._task.out.suffix} cannot hold",
                    remedy="--images copy writes it to a file",
                )
        data = source.data
        if data is None:
            assert source.path is not None, "an image has a path or bytes"
            data = contained_file(source.path, root, max_bytes=MAX_IMAGE_BYTES).read_bytes()
        if self._folder is None:
            return {"bytes": data}
        name = f"{hashlib.sha256(data).hexdigest()[:32]}.{image_suffix(data)}"
        file = self._folder / name
        if not file.exists():
            file.write_bytes(data)
        return f"{image_folder(self._task.out).name}/{name}"

    def video(self, source: VideoSource, root: Path | None) -> Any:
        """Videos stay where they are."""
        times: dict[str, Any] = {"fps": source.fps, "timestamps": source.timestamps and list(source.timestamps)}
        times = {name: value for name, value in times.items() if value is not None}
        if self._task.images != "keep" or self._task.out.suffix.lower() == ".tar":
            raise DataError("videos are not copied or embedded", remedy="--images keep, and .jsonl, .json or .parquet")
        if source.frames:
            return {"frames": [self.image(frame, root) for frame in source.frames], **times}
        if source.path is not None:
            return {"path": self._kept(source.path, root), **times}
        if not self._bytes:
            raise DataError(f"the video is in the record, which {self._task.out.suffix} cannot hold")
        return {"bytes": source.data, **times}

    def root_to_set(self) -> Path | None:
        root = next(iter(self._roots), None)
        return None if root is None or root.resolve() == self._task.out.parent.resolve() else root

    def _kept(self, path: Path, root: Path | None) -> str:
        assert root is not None, "readers give every record its root"
        self._roots.add(root)
        if len(self._roots) > 1:
            raise DataError(
                f"the images lie below several folders: {', '.join(map(str, sorted(self._roots)))}",
                remedy="--images copy or embed, or one --image-root above them",
            )
        return str(path.relative_to(root)) if path.is_relative_to(root) else os.fspath(path)


def image_folder(out: Path) -> Path:
    """Where `--images copy` puts them."""
    return out.with_name(f"{out.stem}_images")


def _check(task: Conversion) -> None:
    suffix = task.out.suffix.lower()
    if suffix not in (".json", ".jsonl", ".parquet", ".tar"):
        raise DataError(f"`{task.out}` says no kind of file", remedy="--out NAME.json, .jsonl, .parquet or .tar")
    if task.images == "embed" and suffix not in HOLDS_BYTES:
        raise DataError(f"{suffix} cannot hold images", where="--images embed", remedy="copy, or --out NAME.parquet or NAME.tar")
    if suffix == ".tar" and task.images != "embed":
        raise DataError("a shard holds its images", where=f"--images {task.images}", remedy="--images embed")
    taken = [path for path in (task.out, _shard(task, 0)) if path.exists()]
    if task.images == "copy" and image_folder(task.out).exists():
        taken.append(image_folder(task.out))
    if taken and not task.overwrite:
        raise DataError("the output is already there", where=str(taken[0]), remedy="choose another name, or --overwrite")


def _shard(task: Conversion, number: int) -> Path:
    if task.shard_records is None:
        return task.out
    return task.out.with_name(f"{task.out.stem}-{number:05d}{task.out.suffix}")


@contextmanager
def _image_folder(task: Conversion) -> Iterator[Path | None]:
    """The new folder of copied images, which takes its name when the block ends without an error."""
    if task.images != "copy":
        yield None
        return
    final = image_folder(task.out)
    partial = final.with_name(f".{final.name}.new")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if final.exists():
            shutil.rmtree(final)
        partial.replace(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _usable(records: RecordFiles, task: Conversion, outcome: Outcome) -> Iterator[Record]:
    for index in range(len(records)):
        try:
            yield records[index]
        except UnusableRecord as error:
            if not task.skip_bad:
                raise DataError(
                    f"a record cannot be used:\n{listing([error.bad])}",
                    where=", ".join(task.paths),
                    remedy="mend it (`prism-nemo data validate` lists all), or leave such records out with --skip-bad",
                ) from error
            outcome.skipped.append(error.bad)


def summary(task: Conversion, outcome: Outcome) -> str:
    """What was written, left out, and has to be set to use it."""
    named = str(outcome.files[0]) if len(outcome.files) == 1 else f"{outcome.files[0]} … {outcome.files[-1].name}"
    lines = [f"{outcome.written} records in {named}"]
    if outcome.skipped:
        lines.append(f"{len(outcome.skipped)} unusable records left out:\n{listing(outcome.skipped)}")
    if outcome.image_root is not None:
        lines.append(f"images are below {outcome.image_root}: set data.image_root to it")
    return "\n".join(lines) + "\n"


def default_images(out: Path) -> str:
    """What becomes of the images where nothing is said."""
    return "embed" if out.suffix.lower() == ".tar" else "keep"
