"""JSON files that others may have written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prism_nemo.errors import PrismError

MAX_BYTES = 256 << 20


def read_json_object(path: Path, *, remedy: str | None = None, kind: type[PrismError] = PrismError) -> dict[str, Any]:
    """The object in a JSON file. Raises `kind` for a file that is none, is nested too deeply, too long or cannot be read."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ValueError(f"{size} bytes, the limit is {MAX_BYTES}")
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise kind("this file is not JSON: it is nested too deeply", where=str(path), remedy=remedy) from error
    except (OSError, ValueError) as error:
        raise kind(f"this file is not JSON: {error}", where=str(path), remedy=remedy) from error
    if not isinstance(content, dict):
        raise kind("this file holds no JSON object", where=str(path), remedy=remedy)
    return content
