"""What a teacher is sent of a record, picture by picture, and the demonstration that its answer makes."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prism_nemo.curate.teacher import answer_seed, demonstration, image_url, teacher_messages
from prism_nemo.data.images import load_image
from prism_nemo.data.readers import read_records
from prism_nemo.data.records import ImageSource, Record, VideoSource
from prism_nemo.errors import DataError
from prism_nemo.run_directory import to_json_line

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def stored(form: str, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).convert(mode).save(buffer, form, **options)
    return buffer.getvalue()


def sent(data: bytes, *, max_pixels: int | None = None) -> tuple[str, bytes]:
    url = image_url(ImageSource(data=data), Record(id="1", prompt="<image>"), max_pixels=max_pixels)
    head, _, text = url.partition(",")
    return head, base64.b64decode(text, validate=True)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_what_all_read_alike_is_sent_as_it_is(form: str, mode: str) -> None:
    if (form, mode) != ("WEBP", "L"):
        assert sent(stored(form, mode)) == (f"data:image/{form.lower()};base64", stored(form, mode))


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return stored("JPEG", exif=exif.tobytes())


@pytest.mark.parametrize(
    "data",
    [
        stored("BMP"),
        stored("TIFF"),
        stored("GIF", "P"),
        stored("PNG", "RGBA"),
        stored("PNG", "P"),
        stored("JPEG", "CMYK"),
        rotated(),
    ],
)
def test_everything_else_is_sent_as_the_policy_sees_it(data: bytes) -> None:
    head, png = sent(data)
    assert head == "data:image/png;base64" and png != data
    seen = load_image(ImageSource(data=data), None)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(png))), np.asarray(seen))


def test_large_images_are_scaled_down() -> None:
    for max_pixels, size in ((300, (20, 15)), (1200, (40, 30)), (1, (1, 1))):
        _, data = sent(stored("PNG"), max_pixels=max_pixels)
        assert Image.open(io.BytesIO(data)).size == size


def test_images_stand_where_the_prompt_has_them(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(stored("PNG"))
    images = (ImageSource(path=tmp_path / "a.png"), ImageSource(data=stored("JPEG")))
    record = Record(id="1", prompt="First <image> then\n<image> which?", images=images, image_root=tmp_path)
    system, user = teacher_messages(record, "the format", max_pixels=None)
    assert system == {"role": "system", "content": "the format"}
    kinds = [part.get("text") or part["image_url"]["url"][:16] for part in user["content"]]
    assert kinds == ["First", "data:image/png;b", "then", "data:image/jpeg;", "which?"]


def test_what_cannot_be_sent(tmp_path: Path) -> None:
    outside = Record(id="1", prompt="<image>", images=(ImageSource(path=Path("/etc/hostname")),), image_root=tmp_path)
    broken = Record(id="1", prompt="<image>", images=(ImageSource(data=b"no image"),))
    moving = Record(id="1", prompt="<video>", videos=(VideoSource(path=tmp_path / "v"),))
    for record, what in ((outside, "outside"), (broken, "cannot be decoded"), (moving, "videos")):
        with pytest.raises(DataError, match=what):
            teacher_messages(record, "", max_pixels=None)


def test_seeds_are_a_records_own() -> None:
    seeds = {answer_seed(seed, Record(id=name, prompt=""), number) for seed in (1, 2) for name in "abc" for number in range(4)}
    assert len(seeds) == 24 and all(0 <= seed < 2**31 for seed in seeds)


def test_a_demonstration_is_read_as_the_record_that_it_was(tmp_path: Path) -> None:
    record = Record(
        id="7",
        prompt="<image> ä?",
        answer="4",
        equivalent_answers=("four",),
        answer_kind="number",
        source="set",
        caption="a",
        metadata={"system": "be brief", "level": 3},
    )
    (tmp_path / "a.png").write_bytes(stored("PNG"))
    line = demonstration(record, "<caption>…", {"images": ["a.png"]}, {"pass_rate": 0.0})
    (tmp_path / "d.jsonl").write_text(to_json_line(line) + "\n")
    (found,) = read_records(tmp_path / "d.jsonl", image_root=None).records
    assert found.images == (ImageSource(path=tmp_path / "a.png"),) and found.response == "<caption>…"
    for name in ("id", "prompt", "answer", "equivalent_answers", "answer_kind", "source", "caption"):
        assert getattr(found, name) == getattr(record, name), name
    assert found.metadata == {"system": "be brief", "level": 3, "pass_rate": 0.0}
