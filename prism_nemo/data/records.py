"""The one record type that every reader makes and every stage takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

IMAGE_PLACEHOLDER = "<image>"
VIDEO_PLACEHOLDER = "<video>"


@dataclass(frozen=True)
class ImageSource:
    """Where an image's bytes are: a file below the image root, or the record itself."""

    path: Path | None = None
    data: bytes | None = None


@dataclass(frozen=True)
class VideoSource:
    """Where a video's frames are, and when each was taken.

    Exactly one of `frames` (an image each, in order), `path` (a folder of frames, or a video file, below the image root) and
    `data` (a video file's bytes). Frames and folders have either `fps`, frames a second from time 0, or `timestamps`, the
    seconds of every frame; a video file knows its own.
    """

    frames: tuple[ImageSource, ...] = ()
    path: Path | None = None
    data: bytes | None = None
    fps: float | None = None
    timestamps: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Record:
    """One prompt with what the stages need to know about it.

    prompt            the user's text, with one `<image>` placeholder per image and one `<video>` per video, in order
    response          SFT: the demonstration; warm-up and alignment: the teacher's response
    student_response  warm-up: the other side of the pair
    answer            RLVR and evaluation: the verified answer
    equivalent_answers  other ways to write it that count too
    answer_kind       what the answer is (see prism_nemo.rewards), where it should not be told from its text
    source            the data set that the record is from, where known
    caption           evaluation: the true perception, where known
    probe_response    `response` with one fact changed in each segment: the content probe's other side
    image_root        images and videos lie below it; None: whoever loads them says below what
    """

    id: str
    prompt: str
    images: tuple[ImageSource, ...] = ()
    response: str | None = None
    student_response: str | None = None
    answer: str | None = None
    equivalent_answers: tuple[str, ...] = ()
    answer_kind: str | None = None
    source: str | None = None
    caption: str | None = None
    probe_response: str | None = None
    videos: tuple[VideoSource, ...] = ()
    image_root: Path | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
