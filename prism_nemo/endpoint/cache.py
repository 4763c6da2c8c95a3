"""Answers on the disk, by what was asked.

    <cache>/<first two digits>/<sha256 of address and request>.json    {"reply": {…}, "sha256": of the reply}

Requests themselves are not kept, nor is the key. A file is written whole or not at all, by any number of processes; one that is
damaged is as good as none.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prism_nemo.errors import PrismError


@dataclass(frozen=True)
class Reply:
    """An endpoint's answer. Tokens are the endpoint's own count, None where it told none.

    finish_reason   why the answer ended: "stop", "length", …; "" where the endpoint does not say
    """

    text: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None


class ReplyCache:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @staticmethod
    def key(address: str, body: bytes) -> str:
        return hashlib.sha256(address.encode() + b"\0" + body).hexdigest()

    def get(self, key: str) -> Reply | None:
        try:
            entry = json.loads(self._path(key).read_bytes())
            reply = entry["reply"]
            return Reply(**reply) if entry["sha256"] == _digest(reply) else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def put(self, key: str, reply: Reply) -> None:
        """Raises PrismError where it cannot be written."""
        path = self._path(key)
        entry = asdict(reply)
        temporary = path.with_name(f".{key[:16]}.{os.getpid()}.{threading.get_ident()}.new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("w", encoding="ascii") as file:
                json.dump({"reply": entry, "sha256": _digest(entry)}, file)
                file.flush()
                os.fsync(file.fileno())  # it was paid for
            temporary.replace(path)
        except OSError as error:
            raise PrismError(
                f"an answer cannot be kept: {error.strerror}", where=str(path), remedy="free the disk, or set another cache_dir"
            ) from error

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


def _digest(reply: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(reply, sort_keys=True).encode("ascii")).hexdigest()
