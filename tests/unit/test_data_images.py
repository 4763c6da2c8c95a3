"""Images are really decoded to the right pixels, and every hostile or broken one is one clear error."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from prism_nemo.data import images
from prism_nemo.data.images import load_image
from prism_nemo.data.records import ImageSource
from prism_nemo.errors import DataError

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encode(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(data: bytes) -> np.ndarray:
    image = load_image(ImageSource(data=data), None)
    assert image.mode == "RGB"
    return np.asarray(image)


def two_by_one(left: tuple[int, ...], right: tuple[int, ...], mode: str) -> Image.Image:
    image = Image.new(mode, (2, 1))
    image.putpixel((0, 0), left)
    image.putpixel((1, 0), right)
    return image


def test_path_and_bytes_give_the_same_pixels(tmp_path: Path) -> None:
    data = encode(two_by_one(RED, BLUE, "RGB"))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.png").write_bytes(data)
    expected = [[list(RED), list(BLUE)]]
    assert decode(data).tolist() == expected
    for path in (Path("sub/a.png"), tmp_path / "sub" / "a.png", Path("sub/../sub/a.png")):
        assert np.asarray(load_image(ImageSource(path=path), tmp_path)).tolist() == expected


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "GIF", "BMP", "TIFF", "JPEG"])
def test_formats(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = decode(encode(Image.new("RGB", (16, 8), BLUE), kind, **options)).astype(int)
    assert pixels.shape == (8, 16, 3)
    assert np.abs(pixels - np.array(BLUE)).max() <= (2 if kind == "JPEG" else 0)


def test_transparency_is_laid_on_white() -> None:
    assert decode(encode(two_by_one((255, 0, 0, 0), (0, 0, 255, 255), "RGBA"))).tolist() == [[list(WHITE), list(BLUE)]]
    half = decode(encode(two_by_one((0, 0, 0, 128), (0, 0, 0, 255), "RGBA")))
    assert half[0, 0].tolist() == [127, 127, 127]
    assert decode(encode(two_by_one((0, 0), (100, 255), "LA"))).tolist() == [[list(WHITE), [100, 100, 100]]]


def test_palette_with_and_without_transparency() -> None:
    image = two_by_one(RED, GREEN, "RGB").quantize(2)
    assert decode(encode(image)).tolist() == [[list(RED), list(GREEN)]]
    transparent = encode(image, transparency=image.getpixel((0, 0)))
    assert decode(transparent).tolist() == [[list(WHITE), list(GREEN)]]


def test_greyscale_and_black_and_white() -> None:
    assert decode(encode(two_by_one((7,), (200,), "L"))).tolist() == [[[7] * 3, [200] * 3]]
    assert decode(encode(two_by_one((0,), (1,), "1"))).tolist() == [[[0] * 3, [255] * 3]]


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 32768, 65535]], dtype=np.uint16)
    assert decode(encode(Image.fromarray(values)))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show it upright
    turned = decode(encode(two_by_one(RED, BLUE, "RGB"), exif=exif))
    assert turned.tolist() == [[list(RED)], [list(BLUE)]]


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (2, 2), RED), Image.new("RGB", (2, 2), BLUE)]
    assert decode(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))[0, 0].tolist() == list(RED)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_of_unknown_range(mode: str) -> None:
    values = np.array([[0.5, 2.0]], dtype=np.float32) if mode == "F" else np.array([[1, 70000]], dtype=np.int32)
    with pytest.raises(DataError, match=r"floating-point|32-bit"):
        decode(encode(Image.fromarray(values), "TIFF"))


def refuse(path: Path, root: Path | None) -> str:
    with pytest.raises(DataError) as error:
        load_image(ImageSource(path=path), root)
    return str(error.value)


def test_paths_that_leave_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    outside = tmp_path / "outside.png"
    outside.write_bytes(encode(Image.new("RGB", (2, 2))))
    (root / "link.png").symlink_to(outside)
    (root / "folder").symlink_to(tmp_path)
    for path in (Path("../outside.png"), outside, Path("link.png"), Path("folder/outside.png")):
        assert "lies outside the image root" in refuse(path, root)


def test_a_link_inside_the_root_and_a_linked_root_are_fine(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.png").write_bytes(encode(Image.new("RGB", (2, 1), GREEN)))
    (root / "b.png").symlink_to("a.png")
    (tmp_path / "alias").symlink_to(root)
    for base in (root, tmp_path / "alias"):
        assert load_image(ImageSource(path=Path("b.png")), base).getpixel((0, 0)) == GREEN
        assert load_image(ImageSource(path=base / "b.png"), base).getpixel((0, 0)) == GREEN


def test_files_that_are_no_images(tmp_path: Path) -> None:
    assert "does not exist" in refuse(Path("missing.png"), tmp_path)
    assert "image root does not exist" in refuse(Path("a.png"), tmp_path / "nowhere")
    assert "no image root" in refuse(Path("a.png"), None)
    assert "does not exist" in refuse(Path("http://example.com/a.png"), tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    assert "does not exist" in refuse(Path("loop"), tmp_path)
    assert "does not exist" in refuse(Path("null\0byte.png"), tmp_path)
    (tmp_path / "folder.png").mkdir()
    assert "not a regular file" in refuse(Path("folder.png"), tmp_path)
    os.mkfifo(tmp_path / "pipe.png")
    assert "not a regular file" in refuse(Path("pipe.png"), tmp_path)


def test_damaged_bytes() -> None:
    whole = encode(Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)))
    jpeg = encode(Image.new("RGB", (64, 64), RED), "JPEG")
    wrong_checksum = bytearray(whole)
    wrong_checksum[len(whole) // 2] ^= 0xFF
    for damaged in (b"", b"not an image", whole[: len(whole) // 2], whole[:20], jpeg[: len(jpeg) // 2], bytes(wrong_checksum)):
        with pytest.raises(DataError, match="cannot be decoded"):
            decode(damaged)


@pytest.mark.parametrize("kind", ["EPS", "PPM", "TGA"])
def test_other_formats_are_refused_even_where_pillow_reads_them(kind: str) -> None:
    with pytest.raises(DataError, match="cannot be decoded"):
        decode(encode(Image.new("RGB", (4, 4)), kind))


def png_claiming(width: int, height: int) -> bytes:
    """A tiny file whose header promises a huge picture."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_500, 40_000, 2_000_000], ids=["above the limit", "above twice the limit", "absurd"])
def test_decompression_bombs_are_refused_before_decoding(side: int) -> None:
    with pytest.raises(DataError, match=r"pixels, the limit is|too large"):
        decode(png_claiming(side, side))


def test_size_limits_are_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode(Image.new("RGB", (10, 10), RED))
    (tmp_path / "a.png").write_bytes(data)
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 100)
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", len(data))
    assert decode(data).shape == (10, 10, 3)
    assert load_image(ImageSource(path=Path("a.png")), tmp_path).size == (10, 10)
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 99)
    with pytest.raises(DataError, match="100 pixels, the limit is 99"):
        decode(data)
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", len(data) - 1)
    for source in (ImageSource(data=data), ImageSource(path=Path("a.png"))):
        with pytest.raises(DataError, match=f"{len(data)} bytes, the limit is {len(data) - 1}"):
            load_image(source, tmp_path)


LARGE = """
import re, sys
from pathlib import Path
from prism_nemo.data.images import load_image
from prism_nemo.data.records import ImageSource

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

load_image(ImageSource(data=Path(sys.argv[1]).read_bytes()), None)  # what decoders take once
before = peak()
assert load_image(ImageSource(data=Path(sys.argv[2]).read_bytes()), None).size == (4000, 4000)
print((peak() - before) // 1024)
"""


@pytest.mark.parametrize("mode", ["I;16", "RGBA"])
def test_conversions_take_little_beside_the_image(mode: str, tmp_path: Path) -> None:
    """16 million pixels are 64 MB as Pillow holds them, before and after; in one piece conversions took five times that."""
    for name, side in (("small", 8), ("large", 4000)):
        (tmp_path / name).write_bytes(encode(Image.new(mode, (side, side)), compress_level=1))
    command = [sys.executable, "-c", LARGE, str(tmp_path / "small"), str(tmp_path / "large")]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert int(told.stdout) < 180
