"""Video files, decoded by PyAV as transformers decodes them; run where PyAV is installed."""

from __future__ import annotations

import io
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers.video_utils import load_video

from prism_nemo.config.schema import DataConfig
from prism_nemo.data import video_frames
from prism_nemo.data.records import VideoSource
from prism_nemo.data.video import VideoProcessor
from prism_nemo.data.video_frames import open_video
from prism_nemo.errors import DataError

av = pytest.importorskip("av", reason="video files need PyAV")

FORMATS = {"mp4": "mpeg4", "mkv": "ffv1", "avi": "mpeg4", "webm": "libvpx"}


def encode(kind: str, *, frames: int = 12, rate: Fraction | int = 4, size: tuple[int, int] = (64, 32)) -> bytes:
    """Frame i is grey, as bright as 20 i."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format={"mkv": "matroska"}.get(kind, kind)) as container:
        stream = container.add_stream(FORMATS[kind], rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for number in range(frames):
            frame = av.VideoFrame.from_image(Image.new("RGB", size, (20 * number,) * 3))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_frames_equal_transformers(kind: str, tmp_path: Path) -> None:
    data = encode(kind)
    (tmp_path / f"a.{kind}").write_bytes(data)
    found = open_video(VideoSource(path=Path(f"a.{kind}")), tmp_path)
    assert (found.count, found.fps, found.timestamps) == (12, 4.0, None)
    frames = np.stack([np.asarray(image) for image in found.read(range(12))])
    assert np.abs(frames.mean(axis=(1, 2, 3)) - 20 * np.arange(12)).max() < 3
    assert [int(np.asarray(image).mean() / 20 + 0.5) for image in found.read([0, 5, 11])] == [0, 5, 11]
    again = open_video(VideoSource(data=data), None)
    assert np.array_equal(np.stack([np.asarray(image) for image in again.read(range(12))]), frames)
    if kind in ("mp4", "avi"):  # transformers reads the number of frames from the header, which the others lack
        expected, metadata = load_video(str(tmp_path / f"a.{kind}"), backend="pyav", sample_indices_fn=lambda metadata: range(12))
        assert np.array_equal(expected, frames)
        assert (metadata.total_num_frames, metadata.fps) == (found.count, found.fps)


def test_a_file_through_the_processor() -> None:
    """12 frames at 4 a second are 6 at 2 a second: the frames 0, 2, 4, 7, 9 and 11, in pairs."""
    config = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, "size": {"shortest_edge": 1024, "longest_edge": 65536}}
    vision = {"patch_size": 16, "spatial_merge_size": 2, "temporal_patch_size": 2}
    block = VideoProcessor.from_config(config, vision, DataConfig())(open_video(VideoSource(data=encode("mkv")), None))
    assert block.grid.tolist() == [[1, 2, 4]] * 3
    assert [part.split(" ")[0] for part in block.text.split("<") if "seconds" in part] == ["0.2", "1.4", "2.5"]
    levels = (block.pixel_values.view(3, 8, 3, 2, 256).mean(dim=(1, 2, 4)) + 1) * 127.5 / 20
    assert levels.round().int().tolist() == [[0, 2], [4, 7], [9, 11]]


def reason(source: VideoSource, root: Path | None = None) -> str:
    with pytest.raises(DataError) as error:
        found = open_video(source, root)
        list(found.read(range(found.count)))
    return str(error.value)


def test_damaged_files() -> None:
    whole = encode("mp4")
    for data in (b"", b"no video", whole[:40], whole[: len(whole) // 2], encode("avi")[:200]):
        assert "video" in reason(VideoSource(data=data))
    text = io.BytesIO()
    with av.open(text, "w", format="matroska") as container:  # sound alone
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    assert "holds no video" in reason(VideoSource(data=text.getvalue()))


def test_an_mkv_that_is_cut_short() -> None:
    """What is left of it has as many frames as are left: nothing claims more."""
    whole = encode("mkv")
    found = open_video(VideoSource(data=whole[: 2 * len(whole) // 3]), None)
    assert found.count < 12
    assert len(list(found.read(range(found.count)))) == found.count


@pytest.mark.parametrize("kind", ["hls", "concat"])
def test_files_that_name_other_files_are_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / "secret.mp4").write_bytes(encode("mp4"))
    lists = {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:3,\n{tmp_path}/secret.mp4\n#EXT-X-ENDLIST\n",
        "concat": f"ffconcat version 1.0\nfile {tmp_path}/secret.mp4\n",
    }
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.mp4").write_text(lists[kind])
    assert "cannot be decoded" in reason(VideoSource(path=Path("a.mp4")), tmp_path / "root")


def test_times_of_a_file_are_its_own() -> None:
    data = encode("mp4")
    assert "times of its own" in reason(VideoSource(data=data, fps=2.0))
    assert "times of its own" in reason(VideoSource(data=data, timestamps=(0.0,) * 12))
    slow = open_video(VideoSource(data=encode("mp4", rate=Fraction(24000, 1001))), None)
    assert slow.fps == pytest.approx(23.976, abs=1e-3)


def test_limits_are_exact(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    data = encode("mp4")
    (tmp_path / "a.mp4").write_bytes(data)
    for name, value in (("MAX_VIDEO_FRAMES", 12), ("MAX_IMAGE_PIXELS", 64 * 32), ("MAX_VIDEO_BYTES", len(data))):
        monkeypatch.setattr(video_frames, name, value)
        for source in (VideoSource(data=data), VideoSource(path=Path("a.mp4"))):
            assert open_video(source, tmp_path).count == 12
            monkeypatch.setattr(video_frames, name, value - 1)
            assert f"the limit is {value - 1}" in reason(source, tmp_path)
            monkeypatch.setattr(video_frames, name, value)


def test_frames_that_grow_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head says 32 x 32; the third frame has a million pixels."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="avi") as container:
        stream = container.add_stream("mjpeg", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
        for number, side in enumerate((32, 32, 1000, 32)):
            jpeg = io.BytesIO()
            Image.new("RGB", (side, side)).save(jpeg, "JPEG")
            packet = av.Packet(jpeg.getvalue())
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 4)
            container.mux(packet)
    monkeypatch.setattr(video_frames, "MAX_IMAGE_PIXELS", 500_000)
    video = open_video(VideoSource(data=buffer.getvalue()), None)
    assert [image.size for image in video.read([0, 1])] == [(32, 32), (32, 32)]
    with pytest.raises(DataError, match="frames of 1000000 pixels"):
        list(video.read([0, 1, 2, 3]))
