"""Where a video's frames come from: image files, a folder of them, or a video file (with PyAV, which is optional).

Frames are read one at a time, and only those that are asked for, so that a long video costs the memory of one frame. Nothing
outside the image root is read, a video file's own references to other files or addresses included.
"""

from __future__ import annotations

import importlib
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from prism_nemo.data.images import MAX_IMAGE_PIXELS, contained, contained_file, load_image, too_many_bytes
from prism_nemo.data.records import ImageSource, VideoSource
from prism_nemo.errors import ConfigError, DataError

MAX_VIDEO_BYTES = 4 * 2**30
MAX_VIDEO_FRAMES = 2**18  # of a folder or file, before frames are chosen: 2.4 hours at 30 a second
FRAME_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
_DEMUXERS = "mov,matroska,webm,avi"  # by content, whatever the file's name; a playlist would open other files


@dataclass(frozen=True)
class FrameReader:
    """A video before any of its frames is decoded.

    fps         frames a second, the first at second 0; None where `timestamps` holds the seconds of every frame
    read        RGB images of the frames at ascending indices
    """

    where: str
    count: int
    fps: float | None
    timestamps: tuple[float, ...] | None
    read: Callable[[Sequence[int]], Iterator[Image.Image]]

    def seconds(self, index: int) -> float:
        """When the frame was taken."""
        if self.timestamps is not None:
            return self.timestamps[index]
        assert self.fps is not None
        return index / self.fps


def open_video(source: VideoSource, root: Path | None) -> FrameReader:
    """Finds a video's frames; files lie below `root`.

    Raises DataError for a video that is missing, outside, too large, undecodable, without frames, or whose frames have no times
    or more or fewer times than there are frames; ConfigError for a video file without PyAV.
    """
    if source.data is not None:
        if len(source.data) > MAX_VIDEO_BYTES:
            raise too_many_bytes(len(source.data), "video bytes in the record", limit=MAX_VIDEO_BYTES, what="video")
        return _video_file(source, source.data, "video bytes in the record")
    if source.path is None:
        return _frame_files(source, source.frames, root, where=f"a video of {len(source.frames)} frames")
    place = contained(source.path, root, what="video")
    if not place.is_dir():
        return _video_file(source, contained_file(source.path, root, max_bytes=MAX_VIDEO_BYTES, what="video"), str(place))
    files = [entry for entry in place.iterdir() if entry.suffix.lower() in FRAME_SUFFIXES]
    frames = [ImageSource(path=file) for file in sorted(files, key=lambda file: _natural(file.name))]
    return _frame_files(source, frames, root, where=str(place))


def _natural(name: str) -> tuple[list[tuple[str, int]], str]:
    """Sorts frame_2 before frame_10."""
    return [(text, int(digits or -1)) for text, digits in re.findall(r"(\D*)(\d*)", name)], name


def _frame_files(source: VideoSource, frames: Sequence[ImageSource], root: Path | None, *, where: str) -> FrameReader:
    if not frames:
        raise DataError("the video has no frames", where=where, remedy=f"frames end in {', '.join(FRAME_SUFFIXES)}")
    _check_count(len(frames), where)
    if (source.fps is None) == (source.timestamps is None):
        raise DataError(
            "the video's frames have no times" if source.fps is None else "the video has both `fps` and `timestamps`",
            where=where,
            remedy='give {"path" or "frames": …} with either "fps" or "timestamps" (seconds, one per frame)',
        )
    if source.timestamps is not None and len(source.timestamps) != len(frames):
        raise DataError(f"the video has {len(source.timestamps)} timestamps for {len(frames)} frames", where=where)

    def read(indices: Sequence[int]) -> Iterator[Image.Image]:
        return (load_image(frames[index], root) for index in indices)

    return FrameReader(where, len(frames), source.fps, source.timestamps, read)


def _check_count(count: int, where: str) -> None:
    if count > MAX_VIDEO_FRAMES:
        raise DataError(
            f"the video has {count} frames, the limit is {MAX_VIDEO_FRAMES}", where=where, remedy="cut it into shorter ones"
        )


def _video_file(source: VideoSource, content: Path | bytes, where: str) -> FrameReader:
    if source.fps is not None or source.timestamps is not None:
        raise DataError(
            "a video file has times of its own",
            where=where,
            remedy="leave `fps` and `timestamps` out; data.video_fps says how many frames the model sees",
        )
    try:
        av = importlib.import_module("av")
    except ImportError as error:
        raise ConfigError(
            "video files need PyAV, which is not installed",
            where=where,
            remedy="pip install av, or give videos as folders or lists of frames with fps or timestamps",
        ) from error
    with _open(av, content, where) as container:
        stream = _stream(container, where)
        rate = stream.average_rate
        count = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
    if not rate or not count:
        raise DataError("the video file has no frames or no frame rate", where=where, remedy="encode it again, as MP4")
    _check_count(count, where)
    return FrameReader(where, count, float(rate), None, lambda indices: _decoded(av, content, indices, where))


def _decoded(av: Any, content: Path | bytes, indices: Sequence[int], where: str) -> Iterator[Image.Image]:
    wanted = iter(indices)
    index = next(wanted, None)
    with _open(av, content, where) as container:
        for number, frame in enumerate(container.decode(_stream(container, where))):
            _refuse_large_frame(frame.width * frame.height, where)
            while index == number:
                yield frame.to_image()
                index = next(wanted, None)
            if index is None:
                return
    raise DataError("the video file ends before its last frame", where=where, remedy="it is cut short: copy or encode it again")


@contextmanager
def _open(av: Any, content: Path | bytes, where: str) -> Iterator[Any]:
    """The container. ffmpeg may use the formats above and open no other file or address; what it raises becomes a DataError."""
    options = {"format_whitelist": _DEMUXERS, "protocol_whitelist": "none"}
    try:
        file = content.open("rb") if isinstance(content, Path) else io.BytesIO(content)
        with file, av.open(file, options=options) as container:
            yield container
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise DataError(f"the video cannot be decoded: {error}", where=where, remedy=f"a whole video as {_DEMUXERS}") from error


def _stream(container: Any, where: str) -> Any:
    if not container.streams.video:
        raise DataError("the file holds no video", where=where)
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise DataError("the video's codec is not known", where=where, remedy="encode it again, as H.264 in MP4")
    width, height = stream.codec_context.width, stream.codec_context.height
    _refuse_large_frame(width * height, where)
    return stream


def _refuse_large_frame(pixels: int, where: str) -> None:
    """The head's size is not every frame's: streams may change theirs on the way."""
    if pixels > MAX_IMAGE_PIXELS:
        raise DataError(
            f"the video has frames of {pixels} pixels, the limit is {MAX_IMAGE_PIXELS}", where=where, remedy="scale it down"
        )
