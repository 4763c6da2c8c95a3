"""WebDataset shards: members `key.json` (or `key.txt`) and `key.jpg`, `key.0.png`, `key.1.png` … in a row are one item.

The JSON is a record in any of the forms; without `images` of its own the key's images are the record's, in the order of their
numbers. `key.txt` is the prompt alone. Nothing is ever unpacked to the disk: an item's bytes are read from the shard, and members
that are no plain files, or whose names lead out of the shard, make their item unusable.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from prism_nemo.data.images import MAX_IMAGE_BYTES, too_many_bytes
from prism_nemo.data.index import Digest, open_index, scan_in_memory
from prism_nemo.data.items import MAX_ITEM_BYTES, SpannedFile, parse_json
from prism_nemo.data.tar_members import BLOCK, DamagedTar, Member, members
from prism_nemo.errors import DataError

MAX_SAMPLE_BYTES = 512 * 2**20  # of all members of one key
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")


class TarItems(SpannedFile):
    """The samples of a shard. Raises DataError for a file that is no tar archive at all."""

    def __init__(self, path: Path, cache_dir: Path | None) -> None:
        index = scan_in_memory(path, _scan) if cache_dir is None else open_index(path, _scan, cache_dir)
        super().__init__(path, index)

    def read(self, index: int) -> tuple[object, str | None]:
        start, end = self.span(index)
        raw = self.bytes_of(index, limit=MAX_SAMPLE_BYTES)
        if len(raw) < end - start:
            raise DataError("the shard ends within this sample", where=f"{self.path}, byte {start}", remedy="copy it again")
        try:
            found = {member.name: _content(raw, member) for member in members(io.BytesIO(raw)) if not member.folder}
        except DamagedTar as error:
            raise DataError(error.what, where=f"{self.path}, byte {start + error.offset}", remedy=error.remedy) from error
        return _item(found)


def _scan(path: Path, digest: Digest) -> Iterator[np.ndarray]:
    """The byte ranges of the samples: headers, names and contents of all members of one key."""
    size = path.stat().st_size
    samples: list[tuple[int, int, int]] = []
    key: str | None = None
    number = ended = 0
    try:
        with path.open("rb") as file:
            for member in members(file):
                ended = min(member.end, size + 1)
                digest.update(f"{member.name}\0{member.size}\0{member.mtime}\n".encode("utf-8", "surrogateescape"))
                if member.folder:
                    continue
                own = _split(member.name)[0]
                if own == key:
                    samples[-1] = (samples[-1][0], ended, number)
                else:
                    key, number = own, number + 1
                    samples.append((member.start, ended, number))
                if len(samples) > 10_000:
                    yield np.array(samples[:-1], dtype=np.int64)
                    samples = samples[-1:]
    except DamagedTar as error:
        if not ended:
            raise DataError(f"the file is not a tar archive: {error.what.rpartition(': ')[2]}", where=str(path)) from error
        ended = error.offset
    if ended >= size and samples:  # without its closing block, the last sample may miss members: reading it tells
        samples[-1] = (samples[-1][0], max(samples[-1][1], size + 1), number)
    elif not _is_end(path, ended):
        samples.append((ended, size, number + 1))  # reading it tells that it is damaged
    yield np.array(samples, dtype=np.int64).reshape(-1, 3)


def _is_end(path: Path, offset: int) -> bool:
    """Whether the archive's closing block of zeros is there."""
    with path.open("rb") as file:
        file.seek(offset)
        return not file.read(BLOCK).strip(b"\0")


def _split(name: str) -> tuple[str, str]:
    """Key and suffix of a member: up to the first dot of its file's name, and behind it."""
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix


def _content(shard: bytes, member: Member) -> bytes:
    name = PurePosixPath(member.name)
    if name.is_absolute() or ".." in name.parts:
        raise DataError(f"the member's name {member.name[:80]!r} leads out of the shard")
    if not member.plain:
        raise DataError(f"the member {member.name[:80]!r} is not a plain file", remedy="links and devices are not followed")
    suffix = _split(member.name)[1].lower()
    limit = MAX_IMAGE_BYTES if _image_number(suffix) is not None else MAX_ITEM_BYTES
    if member.size > limit:
        raise too_many_bytes(member.size, member.name, limit=limit)
    return shard[member.content : member.content + member.size]


def _image_number(suffix: str) -> tuple[int, str] | None:
    """Where `jpg`, `0.jpg`, `image2.png` … stand among a sample's images; None for what is no image."""
    front, _, kind = suffix.rpartition(".")
    if kind not in IMAGE_SUFFIXES:
        return None
    digits = "".join(character for character in front if character.isascii() and character.isdigit())
    return (int(digits[:9]) if digits else -1, suffix)


def _item(found: Mapping[str, bytes]) -> tuple[object, str | None]:
    """The record's item, with the images' bytes in it, and the sample's key."""
    parts = {_split(name)[1].lower(): content for name, content in found.items()}
    key = next((_split(name)[0] for name in found), None)
    if "json" in parts:
        item = parse_json(parts["json"])
    elif "txt" in parts:
        try:
            item = {"prompt": parts["txt"].decode("utf-8").removeprefix("\ufeff")}
        except UnicodeDecodeError as error:
            raise DataError(f"the sample's text is not UTF-8: {error}") from error
    else:
        raise DataError(f"the sample {key!r:.80} has neither .json nor .txt", remedy="one of them says what is asked")
    images = sorted((number, suffix) for suffix in parts if (number := _image_number(suffix)) is not None)
    if images and isinstance(item, dict):
        item = {**item, **_images(item, {suffix: parts[suffix] for _, suffix in images}, str(key))}
    return item, key


def _images(item: Mapping[str, Any], found: Mapping[str, bytes], key: str) -> dict[str, Any]:
    """The record's images: those that it names, by their suffixes or whole names, or all that are there."""
    named = item.get("images") if item.get("images") is not None else item.get("image")
    if named is None or named == []:
        return {"images": [{"bytes": data} for data in found.values()]}
    chosen = []
    for name in named if isinstance(named, list) else [named]:
        suffix = name.removeprefix(f"{key}.").removeprefix(f"{key.rpartition('/')[2]}.").lower() if isinstance(name, str) else ""
        if suffix not in found:
            raise DataError(f"the sample has no image {name!r:.80}", remedy=f"it has {', '.join(found)}")
        chosen.append({"bytes": found[suffix]})
    return {"images": chosen, "image": None}
