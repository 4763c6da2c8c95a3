"""What a teacher is asked about a record, and the demonstration that its answer makes."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Mapping
from typing import Any

from PIL import Image

from prism_nemo.data.images import FORMATS, MAX_IMAGE_BYTES, contained_file, load_image
from prism_nemo.data.records import IMAGE_PLACEHOLDER, ImageSource, Record
from prism_nemo.errors import DataError

_SENT_AS_THEY_ARE = ("PNG", "JPEG", "WEBP")
_ORIENTATION = 0x0112


def teacher_messages(record: Record, system_prompt: str, *, max_pixels: int | None) -> list[dict[str, Any]]:
    """The conversation that asks for a response, images in the places of their placeholders.

    Raises DataError for images that cannot be read, and for videos, which these endpoints do not take.
    """
    if record.videos:
        raise DataError("the record has videos, which cannot be sent to an endpoint", remedy="leave it out")
    images = iter(record.images)
    content: list[dict[str, Any]] = []
    for part in re.split(f"({re.escape(IMAGE_PLACEHOLDER)})", record.prompt):
        if part == IMAGE_PLACEHOLDER:
            content.append({"type": "image_url", "image_url": {"url": image_url(next(images), record, max_pixels=max_pixels)}})
        elif part.strip():
            content.append({"type": "text", "text": part.strip()})
    return [{"role": "system", "content": system_prompt}, {"role": "user", "content": content}]


def image_url(source: ImageSource, record: Record, *, max_pixels: int | None) -> str:
    """The image as a data: URL: its own bytes where all see the same in them, otherwise a PNG of what the policy sees."""
    image = load_image(source, record.image_root)
    if source.data is not None:
        data = source.data
    else:
        assert source.path is not None
        data = contained_file(source.path, record.image_root, max_bytes=MAX_IMAGE_BYTES).read_bytes()
    too_large = max_pixels is not None and image.width * image.height > max_pixels
    with Image.open(io.BytesIO(data), formats=FORMATS) as original:
        kind = str(original.format)
        plain = kind in _SENT_AS_THEY_ARE and original.getexif().get(_ORIENTATION, 1) == 1
        plain = plain and original.mode in ("RGB", "L") and getattr(original, "n_frames", 1) == 1
    if too_large or not plain:
        if too_large:
            assert max_pixels is not None
            scale = (max_pixels / (image.width * image.height)) ** 0.5
            size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
            image = image.resize(size, Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        data, kind = buffer.getvalue(), "PNG"
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode('ascii')}"


def answer_seed(seed: int, record: Record, number: int) -> int:
    """The sampling seed of the teacher's answer of that number, 31 bits."""
    digest = hashlib.sha256(f"{seed}/{record.id}/{number}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def demonstration(record: Record, response: str, pictures: Mapping[str, Any], about: Mapping[str, Any]) -> dict[str, Any]:
    """A record in `sharegpt` form. `pictures`: its image paths; `about`: what metadata says of how it was made."""
    turns = [{"role": "user", "content": record.prompt}, {"role": "assistant", "content": response}]
    if "system" in record.metadata:
        turns.insert(0, {"role": "system", "content": record.metadata["system"]})
    facts = {"data_source": record.source, "answer_kind": record.answer_kind, "caption": record.caption}
    return {
        "id": record.id,
        "messages": turns,
        **pictures,
        "answer": record.answer,
        **({"equivalent_answers": list(record.equivalent_answers)} if record.equivalent_answers else {}),
        **{name: value for name, value in facts.items() if value is not None},
        "metadata": {**{name: value for name, value in record.metadata.items() if name != "system"}, **about},
    }
