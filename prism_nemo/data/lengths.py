"""How many tokens records have for one model, kept beside the indexes: int32 [records, 2] of (prompt, response), memory-mapped.

A file belongs to the data's fingerprint, to the model's tokenizer, template and processors, and to the settings that decide an
image's size. It does not know when an image file behind a path changes: lengths tell about data, training counts for itself.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from pathlib import Path

import numpy as np

from prism_nemo.config.schema import DataConfig

UNKNOWN, UNUSABLE = 0, -1
_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json", "config.json")
_SETTINGS = (
    *("system_prompt", "image_min_pixels", "image_max_pixels", "video_fps", "video_min_frames", "video_max_frames"),
    *("video_min_pixels", "video_max_pixels"),
)


class TokenLengths:
    """The known lengths; what is set is on the disk when `flush` returns."""

    def __init__(self, file: Path, num_records: int) -> None:
        shape = (num_records, 2)
        if not file.is_file() or file.stat().st_size != num_records * 8:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}.new")
            with temporary.open("wb") as new:
                new.truncate(num_records * 8)
            temporary.replace(file)
        self._values = np.memmap(file, dtype=np.int32, mode="r+", shape=shape)

    def get(self, index: int) -> tuple[int, int] | None:
        """(prompt, response) tokens, `UNUSABLE` twice for what cannot be encoded, None where nothing is known."""
        prompt, response = self._values[index].tolist()
        return None if prompt == UNKNOWN else (prompt, response)

    def set(self, index: int, prompt: int, response: int) -> None:
        self._values[index] = (prompt, response)

    def flush(self) -> None:
        self._values.flush()


def open_lengths(cache_dir: Path, fingerprint: str, num_records: int, model: Path, data: DataConfig) -> TokenLengths:
    """The lengths of these records for the model at `model`, a directory of HuggingFace files."""
    digest = hashlib.sha256(fingerprint.encode())
    for name in (*_FILES, "video_preprocessor_config.json"):
        file = model / name
        digest.update(hashlib.sha256(file.read_bytes()).digest() if file.is_file() else b"-")
    digest.update(json.dumps([getattr(data, name) for name in _SETTINGS]).encode())
    return TokenLengths(cache_dir / f"lengths-{digest.hexdigest()[:32]}.int32", num_records)
