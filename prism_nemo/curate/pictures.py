"""Where a file of records that a stage writes finds the images and videos of the records that it was made of."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prism_nemo.data.images import MAX_IMAGE_BYTES, contained_file
from prism_nemo.data.records import ImageSource, Record, VideoSource
from prism_nemo.data.sources import video_item
from prism_nemo.errors import DataError

FOLDER = "images"
_MAGIC = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"GIF8": ".gif", b"BM": ".bmp", b"II*\0": ".tif", b"MM\0*": ".tif"}


class Pictures:
    """Paths of the records' pictures, relative to `root`, the image root of the file that is written.

    As a rule nothing is copied: `root` is the records' own image root. Where pictures are inside the data file (parquet, tar), or
    records have different roots, all images are written to `<folder>/images/`, named by their content, and `root` is `folder`.
    """

    def __init__(self, records: Iterable[Record], folder: Path) -> None:
        roots: set[Path | None] = set()
        inside = False
        for record in records:
            roots.add(record.image_root)
            inside = inside or any(map(_is_inside, record.images)) or any(map(_is_inside, record.videos))
        self.copies = inside or len(roots) != 1 or None in roots
        self.root = folder.absolute() if self.copies else next(root for root in roots if root is not None)

    def fields(self, record: Record) -> dict[str, Any]:
        """`images`, and where there are some `videos`, as the readers take them. Raises DataError for what has no such path."""
        videos = [self._video(video, record) for video in record.videos]
        return {
            **({"videos": videos} if videos else {}),
            "images": [self._path(image, record) for image in record.images],
        }

    def _video(self, video: VideoSource, record: Record) -> dict[str, Any]:
        if video.data is not None:
            times = {name: value for name, value in (("fps", video.fps), ("timestamps", video.timestamps)) if value is not None}
            return {"path": self._written(video.data, ".mp4"), **times}
        if self.copies and video.path is not None:
            raise DataError(
                "the video's path cannot be kept, as this file's pictures are written to files of their own",
                where=str(video.path),
                remedy="make a file of its own of the records whose pictures are paths below one image root",
            )
        return video_item(video, lambda source: self._path(source, record))

    def _path(self, image: ImageSource, record: Record) -> str:
        if image.data is not None:
            return self._written(image.data, _suffix(image.data))
        assert image.path is not None
        if self.copies:
            data = contained_file(image.path, record.image_root, max_bytes=MAX_IMAGE_BYTES).read_bytes()
            return self._written(data, _suffix(data))
        for path, folder in (
            (image.path, self.root),
            (image.path.resolve(), self.root.resolve()),
        ):  # as written; where links lead
            if path.is_relative_to(folder):
                return str(path.relative_to(folder))
        raise DataError("the image lies outside the image root", where=str(image.path), remedy="set data.image_root")

    def _written(self, data: bytes, suffix: str) -> str:
        """The relative path of a file with these bytes, whoever writes it first."""
        name = hashlib.sha256(data).hexdigest()[:32]
        relative = Path(FOLDER, name[:2], f"{name}{suffix}")
        path = self.root / relative
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{name}.{os.getpid()}.new")
            temporary.write_bytes(data)
            temporary.replace(path)
        return str(relative)


def _is_inside(picture: ImageSource | VideoSource) -> bool:
    frames = picture.frames if isinstance(picture, VideoSource) else ()
    return picture.data is not None or any(frame.data is not None for frame in frames)


def _suffix(data: bytes) -> str:
    return next(
        (suffix for magic, suffix in _MAGIC.items() if data.startswith(magic)), ".webp" if data[8:12] == b"WEBP" else ".img"
    )
