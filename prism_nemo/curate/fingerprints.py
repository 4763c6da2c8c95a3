"""What two records are compared by: the words and numbers of their prompts, and their pictures.

An image is known by its pixels (any lossless form of the same picture is the same) and by a difference hash: of its mean grey
values in 17 x 16 fields, whether each is brighter than its left neighbour, 256 bits that scaling and recompression hardly
change. A picture with next to no such gradients (a white page with little on it) is compared by its pixels alone.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from prism_nemo.data.images import load_image
from prism_nemo.data.records import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, ImageSource, Record, VideoSource

if TYPE_CHECKING:
    from PIL.Image import Image

HASH_SIDE = 16
_MIN_SET_BITS = 24  # of 256, set and unset: with fewer the hash says little
_TOKEN = re.compile(r"\w+|[^\w\s]")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@dataclass(frozen=True)
class Fingerprint:
    """Of one record.

    prompt    its text: one form of every character, no case, no placeholders, single spaces
    pictures  of every image, in order, its pixels' digest and its difference hash (64 hexadecimal digits, "" where it says
              nothing); of every video, what names it and ""
    """

    prompt: str
    pictures: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, record: Record) -> Fingerprint:
        """Raises DataError for an image that cannot be read."""
        images = [image_fingerprint(load_image(source, record.image_root)) for source in record.images]
        return cls(normalized(record.prompt), (*images, *((_video_name(video), "") for video in record.videos)))

    def to_json(self) -> dict[str, Any]:
        return {"prompt": self.prompt, "pictures": [list(picture) for picture in self.pictures]}

    @classmethod
    def from_json(cls, item: Mapping[str, Any]) -> Fingerprint:
        return cls(item["prompt"], tuple((pixels, gradients) for pixels, gradients in item["pictures"]))


def normalized(prompt: str) -> str:
    text = prompt.replace(IMAGE_PLACEHOLDER, " ").replace(VIDEO_PLACEHOLDER, " ")
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(prompt: str) -> list[str]:
    """Of a normalized prompt: words, numbers, and each sign between them."""
    return _TOKEN.findall(prompt)


def numbers(prompt: str) -> tuple[str, ...]:
    """In order. Prompts that differ in one are different problems, however alike the rest is."""
    return tuple(_NUMBER.findall(prompt))


@lru_cache(maxsize=1 << 13)
def shingles(prompt: str) -> frozenset[tuple[str, ...]]:
    """Of a normalized prompt: every three words in a row; all of them where there are fewer."""
    found = words(prompt)
    return frozenset(tuple(found[start : start + 3]) for start in range(max(1, len(found) - 2)))


def similarity(first: frozenset[tuple[str, ...]], second: frozenset[tuple[str, ...]]) -> float:
    """Jaccard's: the share of all shingles that both have."""
    return len(first & second) / len(first | second)


def image_fingerprint(image: Image) -> tuple[str, str]:
    """The digest of an RGB image's pixels and its difference hash."""
    pixels = hashlib.sha256(f"{image.width} {image.height} ".encode() + image.tobytes()).hexdigest()
    small = np.asarray(image.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), 4), dtype=np.int16)  # 4: box, which averages
    bits = np.packbits(small[:, 1:] > small[:, :-1])
    set_bits = int(np.unpackbits(bits).sum())
    telling = _MIN_SET_BITS <= set_bits <= HASH_SIDE**2 - _MIN_SET_BITS
    return pixels[:32], bits.tobytes().hex() if telling else ""


def _video_name(video: VideoSource) -> str:
    """Equal for videos that are the same bytes or the same files; they are not decoded."""
    digest = hashlib.sha256(video.data or b"")
    for source in (ImageSource(path=video.path), *video.frames):
        digest.update(str(source.path.resolve() if source.path else "").encode() + b"\0" + (source.data or b""))
    return digest.hexdigest()[:32]
