"""Videos -> chosen frames, sizes, timestamps and patches: against transformers' processor piece by piece, and against Pillow."""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

from prism_nemo.config.schema import DataConfig
from prism_nemo.data import video, video_frames
from prism_nemo.data.records import ImageSource, VideoSource
from prism_nemo.data.video import VideoProcessor
from prism_nemo.data.video_frames import FrameReader, open_video
from prism_nemo.errors import ConfigError, DataError

# Through the package it imports with torchvision only, which most of it does without.
theirs = importlib.import_module("transformers.models.qwen3_vl.video_processing_qwen3_vl")

VISION = {"in_channels": 3, "patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}
BOUNDS = {"shortest_edge": 4096, "longest_edge": 64 * 1024}
CONFIG = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, "size": BOUNDS}


def processor(**data: Any) -> VideoProcessor:
    return VideoProcessor.from_config(CONFIG, VISION, DataConfig(**data))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def reader(
    images: Sequence[Image.Image], *, fps: float | None = None, timestamps: tuple[float, ...] | None = None
) -> FrameReader:
    frames = tuple(ImageSource(data=png(image)) for image in images)
    return open_video(VideoSource(frames=frames, fps=fps, timestamps=timestamps), None)


def of_length(count: int, fps: float) -> FrameReader:
    def nothing(indices: Sequence[int]) -> Iterator[Image.Image]:
        raise AssertionError("no frame should be read")

    return FrameReader("v", count, fps, None, nothing)


@pytest.mark.parametrize("fps", [0.5, 1.0, 2.0, 7.0, 23.976, 24.0, 30.0, 60.0])
def test_frames_are_chosen_as_in_transformers(fps: float) -> None:
    for count in (2, 3, 4, 5, 9, 47, 48, 100, 1001, 23_000):
        for wanted, least, most in ((2.0, 4, 768), (0.3, 2, 16), (30.0, 6, 6)):
            own = processor(video_fps=wanted, video_min_frames=least, video_max_frames=most)
            limits = SimpleNamespace(fps=wanted, min_frames=least, max_frames=most)
            metadata = VideoMetadata(total_num_frames=count, fps=fps)
            expected = theirs.Qwen3VLVideoProcessor.sample_frames(limits, metadata, fps=wanted)
            assert own.choose_frames(of_length(count, fps)) == expected.tolist()


def test_every_frame_with_a_timestamp_is_seen() -> None:
    images = [picture(32, 32, seed) for seed in range(6)]
    timestamps = (0.0, 0.1, 0.2, 5.0, 5.0, 9.0)
    assert processor(video_fps=0.1).choose_frames(reader(images, timestamps=timestamps)) == list(range(6))
    with pytest.raises(DataError, match=r"6 frames with timestamps, the limit is 5(?s:.)*data\.video_max_frames"):
        processor(video_max_frames=5).choose_frames(reader(images, timestamps=timestamps))


def test_sizes_equal_transformers() -> None:
    numbers = np.random.default_rng(0)
    seen = set()
    for low, high in ((4096, 64 * 1024), (128 * 1024, 768 * 1024), (4096, 25_165_824)):
        own = processor(video_min_pixels=low, video_max_pixels=high)
        for _ in range(400):
            frames, height, width = (int(2 ** numbers.uniform(1, top)) for top in (7, 11, 11))
            if max(height, width) > 150 * min(height, width):
                continue
            expected = theirs.smart_resize(frames, height, width, 2, 32, low, high)
            assert own.frame_size(frames, height, width) == expected, (frames, height, width)
            seen.add((frames * height * width > high, frames * height * width < low, min(height, width) < 32, frames % 2))
    assert len(seen) >= 10  # scaled up and down, tiny, odd and even numbers of frames
    with pytest.raises(DataError, match="more than 200 times as long as wide"):
        processor().frame_size(4, 32, 6433)


def test_timestamps_equal_transformers() -> None:
    for fps in (1.0, 3.0, 23.976, 30.0):
        for indices in ([0, 7], [0, 3, 9], list(range(0, 101, 7))):
            expected = Qwen3VLProcessor._calculate_timestamps(None, list(indices), fps, 2)
            assert processor().timestamps([of_length(200, fps).seconds(index) for index in indices]) == expected
    assert processor().timestamps((0.25, 0.75, 4.0)) == [0.5, 4.0]


@pytest.mark.parametrize("count", [4, 5])
def test_patches_are_cut_as_in_transformers(count: int) -> None:
    """Frames of the very size that the bounds leave: the pixels themselves, normalised; an odd last frame counts twice."""
    images = [picture(96, 64, seed) for seed in range(count)]
    block = processor()(reader(images, fps=2.0))
    pixels = torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2)[None]
    expected, *grid = theirs.Qwen3VLVideoProcessor.patchify(None, (pixels.float() - 127.5) / 127.5, 16, 2, 2)
    assert torch.equal(block.pixel_values, expected[0])
    assert block.grid.tolist() == [[1, 4, 6]] * -(-count // 2) == [[1, *grid[1:]]] * grid[0]


@pytest.mark.parametrize(("width", "height"), [(90, 131), (400, 230), (20, 50)])
def test_frames_are_scaled_as_pillow_scales_them(width: int, height: int) -> None:
    """Bicubic with antialiasing; the two cut off between rows and columns differently, so no colours at the ends here."""
    images = [picture(width, height, seed).point(lambda value: 96 + value // 4) for seed in range(4)]
    block = processor()(reader(images, fps=2.0))
    rows, columns = block.grid[0, 1:].tolist()
    assert (columns * 16, rows * 16) != (width, height)
    scaled = [image.resize((columns * 16, rows * 16), Image.Resampling.BICUBIC) for image in images]
    pixels = torch.from_numpy(np.stack([np.array(image) for image in scaled])).permute(0, 3, 1, 2)[None]
    expected, *_ = theirs.Qwen3VLVideoProcessor.patchify(None, (pixels.float() - 127.5) / 127.5, 16, 2, 2)
    torch.testing.assert_close(block.pixel_values, expected[0], atol=1.01 / 127.5, rtol=0)
    assert (block.pixel_values - expected[0]).abs().mean() < 0.5 / 127.5


def test_equal_to_transformers_processor() -> None:
    """Bit by bit, where torchvision is installed, without which transformers processes no video."""
    pytest.importorskip("torchvision")
    for width, height, count, fps in ((131, 90, 7, 4.0), (64, 96, 12, 3.0), (500, 320, 30, 24.0)):
        images = [picture(width, height, seed) for seed in range(count)]
        block = processor()(reader(images, fps=fps))
        pixels = torch.from_numpy(np.stack([np.array(image) for image in images])).permute(0, 3, 1, 2)
        metadata = VideoMetadata(total_num_frames=count, fps=fps, frames_indices=list(range(count)))
        whole = theirs.Qwen3VLVideoProcessor(**CONFIG, image_mean=[0.5] * 3, image_std=[0.5] * 3)
        expected = whole(videos=[pixels], video_metadata=[metadata], do_sample_frames=True, return_tensors="pt")
        assert torch.equal(block.pixel_values, expected["pixel_values_videos"])
        times, *grid = expected["video_grid_thw"][0].tolist()
        assert block.grid.tolist() == [[1, *grid]] * times


def test_frames_of_several_sizes() -> None:
    images = [picture(64, 64), picture(64, 64), picture(64, 32), picture(64, 64)]
    with pytest.raises(DataError, match="64 x 64 and 64 x 32 pixels"):
        processor()(reader(images, fps=2.0))


def test_limits_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    images = [picture(64, 64, seed) for seed in range(4)]
    tokens = 2 * 2 * 2
    processor(max_prompt_length=tokens)(reader(images, fps=2.0))
    with pytest.raises(DataError, match=rf"{tokens} visual tokens, the limit of a prompt is {tokens - 1}"):
        processor(max_prompt_length=tokens - 1)(reader(images, fps=2.0))
    monkeypatch.setattr(video, "MAX_VIDEO_PIXELS", 4 * 64 * 64)
    processor()(reader(images, fps=2.0))
    monkeypatch.setattr(video, "MAX_VIDEO_PIXELS", 4 * 64 * 64 - 1)
    with pytest.raises(DataError, match="4 frames have 16384 pixels, the limit is 16383"):
        processor()(reader(images, fps=2.0))
    with pytest.raises(DataError, match="has 1 frame"):
        processor()(reader(images[:1], fps=2.0))
    monkeypatch.setattr(video_frames, "MAX_VIDEO_FRAMES", 3)
    reader(images[:3], fps=2.0)
    with pytest.raises(DataError, match="has 4 frames, the limit is 3"):
        reader(images, fps=2.0)


def test_a_video_that_exceeds_the_prompt_is_refused_after_its_first_frame() -> None:
    whole, broken = ImageSource(data=png(picture(640, 640))), ImageSource(data=b"never decoded")
    source = VideoSource(frames=(whole, *[broken] * 9), fps=2.0)
    with pytest.raises(DataError, match="visual tokens"):
        processor(max_prompt_length=4)(open_video(source, None))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 14}, "patch_size is 14, the model's is 16"),
        ({"temporal_patch_size": None}, "temporal_patch_size is None, the model's is 2"),
        ({"do_resize": False}, "do_resize is False, only True"),
        ({"resample": 2}, "resample is 2, only 3"),
        ({"cap_pixels_per_frame": True}, "caps the pixels of single frames"),
        ({"size": None}, "between None and None pixels"),
        ({"size": {"shortest_edge": 10, "longest_edge": 2047}}, "between 10 and 2047 pixels"),
        ({"size": {"shortest_edge": 5000, "longest_edge": 4000}}, "between 5000 and 4000 pixels"),
    ],
)
def test_processors_that_cannot_be_used(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        VideoProcessor.from_config(CONFIG | changes, VISION, DataConfig())
    assert "video_preprocessor_config.json" in str(error.value)


def test_configured_pixels_replace_the_processors() -> None:
    assert processor(video_min_pixels=7000, video_max_pixels=8000).frame_size(4, 640, 640) == (32, 32)
    own = VideoProcessor.from_config(
        CONFIG | {"size": None}, VISION, DataConfig(video_min_pixels=1, video_max_pixels=4 * 64 * 64)
    )
    assert own.frame_size(4, 640, 640) == (64, 64)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Eleven frames, whose names sort by number, and files that are no frames."""
    place = tmp_path / "clip"
    place.mkdir()
    for number in range(1, 12):
        (place / f"frame_{number}.png").write_bytes(png(Image.new("RGB", (32, 32), (number, 0, 0))))
    (place / "notes.txt").write_text("no frame")
    return tmp_path


def reds(found: FrameReader, indices: Sequence[int]) -> list[int]:
    return [image.getpixel((0, 0))[0] for image in found.read(indices)]


def test_a_folder_of_frames(folder: Path) -> None:
    found = open_video(VideoSource(path=folder / "clip", fps=5.0), folder)
    assert (found.count, found.seconds(10)) == (11, 2.0)
    assert reds(found, range(11)) == list(range(1, 12))
    assert reds(found, [0, 9]) == [1, 10]
    timed = open_video(VideoSource(path=Path("clip"), timestamps=tuple(range(11))), folder)
    assert timed.seconds(7) == 7


def test_names_sort_by_their_text_and_then_by_their_number(tmp_path: Path) -> None:
    names = ["a.png", "a1.png", "a2.png", "a10.png", "a10b1.PNG", "b.jpg", "b1.png"]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(png(Image.new("RGB", (32, 32), (number, 0, 0))))
    assert reds(open_video(VideoSource(path=tmp_path, fps=5.0), tmp_path), range(7)) == [1, 2, 3, 4, 0, 6, 5]


def refuse(source: VideoSource, root: Path | None) -> str:
    with pytest.raises(DataError) as error:
        list(open_video(source, root).read([0]))
    return str(error.value)


def test_videos_that_leave_the_root(folder: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "links").mkdir(parents=True)
    (root / "clip").symlink_to(folder / "clip")
    (root / "links" / "a.png").symlink_to(folder / "clip" / "frame_1.png")
    for path in (Path("../clip"), folder / "clip", Path("clip"), Path("clip/frame_1.png")):
        assert "the video lies outside the image root" in refuse(VideoSource(path=path, fps=1.0), root)
    assert "lies outside the image root" in refuse(VideoSource(path=Path("links"), fps=1.0), root)
    assert "lies outside" in refuse(VideoSource(frames=(ImageSource(path=Path("links/a.png")),) * 2, fps=1.0), root)
    assert "the video does not exist" in refuse(VideoSource(path=Path("missing"), fps=1.0), root)
    assert "no image root" in refuse(VideoSource(path=Path("clip"), fps=1.0), None)
    os.mkfifo(root / "pipe.mp4")
    assert "not a regular file" in refuse(VideoSource(path=Path("pipe.mp4")), root)


def test_folders_that_cannot_be_used(folder: Path) -> None:
    (folder / "empty").mkdir()
    assert "has no frames" in refuse(VideoSource(path=Path("empty"), fps=1.0), folder)
    assert "frames have no times" in refuse(VideoSource(path=Path("clip")), folder)
    assert "both `fps` and `timestamps`" in refuse(VideoSource(path=Path("clip"), fps=1.0, timestamps=(1.0,)), folder)
    assert "2 timestamps for 11 frames" in refuse(VideoSource(path=Path("clip"), timestamps=(1.0, 2.0)), folder)
    (folder / "clip" / "frame_1.png").write_bytes(b"broken")
    assert "cannot be decoded" in refuse(VideoSource(path=Path("clip"), fps=1.0), folder)


def test_a_video_file_without_a_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the setting, not of the record: nothing is skipped."""
    (tmp_path / "a.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match="pip install av"):
        open_video(VideoSource(path=Path("a.mp4")), tmp_path)
