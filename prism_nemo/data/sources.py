"""Images and videos as a record names them, and the text with their placeholders.

An image is a path relative to the image root, bytes, or {"bytes": …, "path": …}.

A video is one of

* {"frames": [images], "fps": …} or {"path": a folder of frame images, "fps": …}: frames a second, the first at second 0;
* the same with "timestamps": [seconds of every frame] instead of "fps": then the model sees every frame;
* the path of a video file, its bytes, or {"bytes": …, "path": …}, for which PyAV has to be installed.

A turn's content is text with `<image>` and `<video>` placeholders, or a list of parts: {"type": "text", "text": …},
{"type": "image", "image": …}, {"type": "video", "video": path or frames, "fps" or "timestamps": …}; parts without `image` or
`video` take theirs from the record. Without any placeholder, images and then videos come before the text. URLs are not fetched.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_nemo.data.records import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, ImageSource, VideoSource
from prism_nemo.errors import DataError

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:/|data:")
_MAX_SECONDS = 1e7  # of a timestamp and between two frames: a third of a year; the prompt spells the number out
_PLACEHOLDERS = {"image": IMAGE_PLACEHOLDER, "video": VIDEO_PLACEHOLDER}


@dataclass(frozen=True)
class Content:
    """Text with placeholders, and the pictures that stood between it."""

    text: str
    images: tuple[ImageSource, ...] = ()
    videos: tuple[VideoSource, ...] = ()


def read_content(content: object, root: Path, *, turn: str) -> Content:
    """A turn's content. Raises DataError when it is neither text nor a list of parts."""
    if isinstance(content, str):
        return Content(content)
    if not isinstance(content, list):
        raise DataError(f"the {turn} turn holds {kind_of(content)}, not text")
    texts: list[str] = []
    images: list[ImageSource] = []
    videos: list[VideoSource] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str):
            what = f"of type {kind!r:.40}" if isinstance(part, Mapping) else kind_of(part)
            raise DataError(f"a part of the {turn} turn is {what}", remedy="known types: text, image, video")
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in _PLACEHOLDERS:
            texts.append(_PLACEHOLDERS[kind])
            if part.get(kind) is not None and kind == "image":
                images.append(image_source(part["image"], root))
            elif part.get(kind) is not None:
                videos.append(video_source(_video_part(part), root))
        else:
            raise DataError(f"a part of the {turn} turn is of type {kind!r:.40}", remedy="known types: text, image, video")
    return Content("".join(texts), tuple(images), tuple(videos))


def _video_part(part: Mapping[str, Any]) -> object:
    video = part["video"]
    if isinstance(video, Mapping):
        return video
    times = {name: part.get(name) for name in ("fps", "timestamps")}
    return {"bytes" if isinstance(video, bytes) else "frames" if isinstance(video, list) else "path": video, **times}


def with_record_fields(content: Content, item: Mapping[str, Any], root: Path) -> Content:
    """The prompt's content with the record's own `image`, `images`, `video` and `videos`, a placeholder for each.

    Raises DataError where placeholders and pictures do not match, and for an empty prompt.
    """
    images = _of_record(item, "image", content.images, lambda image: image_source(image, root))
    videos = _of_record(item, "video", content.videos, lambda video: video_source(video, root))
    text, front = content.text, ""
    for placeholder, count in ((IMAGE_PLACEHOLDER, len(images)), (VIDEO_PLACEHOLDER, len(videos))):
        found = text.count(placeholder)
        if count and not found:
            front += placeholder * count
        elif found != count:
            kind = placeholder.strip("<>")
            raise DataError(
                f"the prompt has {found} {placeholder} placeholders for {count} {kind}s",
                remedy="one placeholder per image or video, in order",
            )
    if not (front + text).strip():
        raise DataError("the prompt is empty")
    return Content(front + text, images, videos)


def _of_record(item: Mapping[str, Any], name: str, inside: tuple[Any, ...], read: Callable[[object], Any]) -> tuple[Any, ...]:
    given = item.get(f"{name}s")
    if given is None:
        given = item.get(name)
    if given is None:
        return inside
    if inside:
        raise DataError(f"{name}s are both in the turn and in the record's own field", remedy="give them in one place")
    return tuple(read(one) for one in (given if isinstance(given, list) else [given]))


def image_source(image: object, root: Path) -> ImageSource:
    """Raises DataError for what is not an image, and for a URL."""
    if isinstance(image, Mapping):
        data = image.get("bytes")
        image = image.get("path") if data is None else data
    if isinstance(image, bytes):
        return ImageSource(data=image)
    return ImageSource(path=_path(image, root, "image"))


def video_source(video: object, root: Path) -> VideoSource:
    """Raises DataError for what is not a video, for times that are no times, for frames without times, and for a URL."""
    if isinstance(video, list):
        video = {"frames": video}
    if not isinstance(video, Mapping):
        video = {"bytes" if isinstance(video, bytes) else "path": video}
    fps, timestamps = _fps(video.get("fps")), _timestamps(video.get("timestamps"))
    if fps is not None and timestamps is not None:
        raise DataError("the video has both `fps` and `timestamps`", remedy="give one of them")
    frames, data = video.get("frames"), video.get("bytes")
    if frames is None:
        if isinstance(data, bytes):
            return VideoSource(data=data, fps=fps, timestamps=timestamps)
        return VideoSource(path=_path(video.get("path"), root, "video"), fps=fps, timestamps=timestamps)
    if not isinstance(frames, list) or not frames:
        raise DataError(f"a video's frames are {'none' if frames == [] else kind_of(frames)}", remedy="give a list of images")
    if fps is None and timestamps is None:
        raise DataError(
            "the video's frames have no times", remedy='give {"frames": […]} with "fps" or "timestamps" (seconds, one per frame)'
        )
    if timestamps is not None and len(timestamps) != len(frames):
        raise DataError(f"the video has {len(timestamps)} timestamps for {len(frames)} frames")
    return VideoSource(frames=tuple(image_source(frame, root) for frame in frames), fps=fps, timestamps=timestamps)


def video_item(video: VideoSource, relative: Callable[[ImageSource], str]) -> dict[str, Any]:
    """The video as a record names it, for files that the stages write; `relative` gives a file's path below the image root.

    It takes a video's own path as an image's, and raises DataError where there is none.
    """
    times: dict[str, Any] = {} if video.fps is None else {"fps": video.fps}
    if video.timestamps is not None:
        times["timestamps"] = list(video.timestamps)
    if video.frames:
        return {"frames": [relative(frame) for frame in video.frames], **times}
    return {"path": relative(ImageSource(path=video.path)), **times}


def _path(path: object, root: Path, what: str) -> Path:
    if not isinstance(path, str) or not path or "\0" in path:
        raise DataError(f"{'an' if what == 'image' else 'a'} {what} is {kind_of(path)}, not a path or bytes")
    if _URL.match(path):
        raise DataError(
            f"the {what} {path[:80]!r} is a URL", remedy=f"URLs are not fetched: download the {what} and give its path"
        )
    return root / path


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:  # JSON's integers have no bounds
        return None
    return number if math.isfinite(number) else None


def _fps(value: object) -> float | None:
    if value is None:
        return None
    fps = _number(value)
    if fps is None or not 1 / _MAX_SECONDS <= fps <= _MAX_SECONDS:
        raise DataError(f"a video's `fps` is {value!r:.40}", remedy=f"frames a second, above 0 and at most {_MAX_SECONDS:g}")
    return fps


def _timestamps(values: object) -> tuple[float, ...] | None:
    if values is None:
        return None
    seconds = [_number(value) for value in values] if isinstance(values, list) else [None]
    known = [second for second in seconds if second is not None]
    if len(known) != len(seconds) or known != sorted(known) or (known and not 0 <= known[0] <= known[-1] <= _MAX_SECONDS):
        raise DataError(
            "a video's `timestamps` are not seconds in order",
            remedy=f"one number per frame, ascending, from 0 to {_MAX_SECONDS:g}",
        )
    return tuple(known)


def kind_of(value: object) -> str:
    """What a value is, for messages."""
    names = {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "nothing",
    }
    return names.get(type(value), type(value).__name__)
