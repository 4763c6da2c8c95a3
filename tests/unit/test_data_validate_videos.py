"""`prism-nemo data validate --images` opens videos: the frames that a run would choose."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

from prism_nemo.config.schema import DataConfig
from prism_nemo.data.checking import Checks, find_problems


def problems(folder: Path, **data: float) -> list[str]:
    checks = Checks((str(folder / "d.jsonl"),), DataConfig(cache_dir=str(folder / "cache"), **data), images=True)  # type: ignore[arg-type]
    return [bad.reason.partition(" (")[0] for bad in find_problems(checks).broken]


def test_frames_in_a_folder(tmp_path: Path) -> None:
    """Nine frames at one a second: all of them, or at half a frame a second the first, the last and those between."""
    (tmp_path / "clip").mkdir()
    for number in range(9):
        Image.new("RGB", (32, 32)).save(tmp_path / "clip" / f"{number}.png")
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "<video> what?", "videos": [{"path": "clip", "fps": 1.0}]}) + "\n")
    assert problems(tmp_path) == []
    (tmp_path / "clip" / "1.png").write_bytes(b"no image")
    assert problems(tmp_path, video_fps=1.0) == ["the image cannot be decoded: it is of another kind"]
    assert problems(tmp_path, video_fps=0.5, video_min_frames=2) == []  # frames 0, 3, 5 and 8
    Image.new("RGB", (64, 32)).save(tmp_path / "clip" / "1.png")
    assert problems(tmp_path, video_fps=1.0) == ["the video's frames have 2 sizes"]


def test_a_video_that_is_none_without_decoding(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "<video> what?", "videos": ["a.mp4"]}) + "\n")
    (tmp_path / "a.mp4").symlink_to("/dev/zero")
    found = find_problems(Checks((str(tmp_path / "d.jsonl"),), DataConfig(cache_dir=str(tmp_path / "cache"))))
    assert "outside the image root" in found.broken[0].reason
