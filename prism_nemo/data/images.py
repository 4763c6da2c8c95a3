"""Images from files or bytes -> RGB, with everything hostile or broken refused as a DataError.

Limits are for safety, not for quality: a picture of more than `MAX_IMAGE_PIXELS` or a file of more than `MAX_IMAGE_BYTES` is
taken for an attack on the machine's memory. How large an image the model sees is the image processor's matter.
"""

from __future__ import annotations

import io
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from prism_nemo.data.records import ImageSource
from prism_nemo.errors import DataError

MAX_IMAGE_PIXELS = 89_478_485  # Pillow's own bound, which by itself is only a warning
MAX_IMAGE_BYTES = 64 * 2**20
_STRIP_PIXELS = 1 << 20
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow knows more, some of which start other programs


def load_image(source: ImageSource, root: Path | None) -> Image.Image:
    """The image as RGB, turned as its EXIF orientation says, laid on white where it is transparent; the first frame of several.

    A path must lie below `root` once symbolic links are followed. Raises DataError for a path outside, a missing, too large,
    unreadable or truncated image, and for pixel types whose range is not known (32-bit integers, floating point).
    """
    if source.data is not None:
        data, where = source.data, "image bytes in the record"
        if len(data) > MAX_IMAGE_BYTES:
            raise too_many_bytes(len(data), where, limit=MAX_IMAGE_BYTES)
    elif source.path is not None:
        file = contained_file(source.path, root, max_bytes=MAX_IMAGE_BYTES)
        data, where = file.read_bytes(), str(file)
    else:
        raise DataError("the record's image has neither a path nor bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _refuse_bomb(image.width * image.height, where)
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image, where)
    except DataError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"the image is too large: {error}", where=where, remedy="scale the image down") from error
    except Exception as error:  # decoders of foreign bytes raise anything: OSError, SyntaxError, struct.error, IndexError, …
        raise DataError(
            f"the image cannot be decoded: {reason(error)}", where=where, remedy=f"a whole image as {', '.join(FORMATS)}"
        ) from error


def reason(error: Exception) -> str:
    """Why a decoder gave up; of what it does not know it only tells which object of Python's it was given."""
    return "it is of another kind" if isinstance(error, UnidentifiedImageError) else str(error)


def contained(path: Path, root: Path | None, *, what: str = "image") -> Path:
    """`path`, a file or folder, with links resolved, if it lies below `root`; otherwise a DataError that calls it `what`."""
    if root is None:
        raise DataError(
            f"the record names {'an' if what[0] in 'aeiou' else 'a'} {what} file, but there is no image root",
            where=str(path),
            remedy="set data.image_root",
        )
    try:
        allowed = root.resolve(strict=True)
    except OSError as error:
        raise DataError(
            "the image root does not exist", where=str(root), remedy="set data.image_root to an existing folder"
        ) from error
    try:
        file = (allowed / path).resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:  # missing; a null byte; a loop of links
        raise DataError(
            f"the {what} does not exist", where=str(root / path), remedy=f"{what} paths are relative to {root}"
        ) from error
    if not file.is_relative_to(allowed):
        raise DataError(
            f"the {what} lies outside the image root",
            where=f"{path} -> {file}",
            remedy=f"put it below {allowed}, or set data.image_root",
        )
    return file


def contained_file(path: Path, root: Path | None, *, max_bytes: int, what: str = "image") -> Path:
    """The same of a regular file of at most `max_bytes`."""
    file = contained(path, root, what=what)
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
        raise DataError(f"the {what} is not a regular file", where=str(file))
    if status.st_size > max_bytes:
        raise too_many_bytes(status.st_size, str(file), limit=max_bytes, what=what)
    return file


def too_many_bytes(size: int, where: str, *, limit: int, what: str = "image") -> DataError:
    remedy = "scale the image down" if what == "image" else "cut it into shorter ones, or give its frames as images"
    return DataError(f"the {what} file has {size} bytes, the limit is {limit}", where=where, remedy=remedy)


def _refuse_bomb(pixels: int, where: str) -> None:
    if pixels > MAX_IMAGE_PIXELS:
        raise DataError(
            f"the image has {pixels} pixels, the limit is {MAX_IMAGE_PIXELS}", where=where, remedy="scale the image down"
        )


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "F":
        raise DataError("the image has floating-point pixels", where=where, remedy="convert it to 8 or 16 bits")
    if image.mode.startswith("I") and not _has_16_bits(image):
        raise DataError("the image has 32-bit pixels", where=where, remedy="convert it to 8 or 16 bits")
    convert = _from_16_bits if image.mode.startswith("I") else _on_white if image.has_transparency_data else _plain
    result = Image.new("RGB", image.size)
    for strip in _strips(image):
        result.paste(convert(image.crop(strip)), strip)
    return result


def _strips(image: Image.Image) -> Iterator[tuple[int, int, int, int]]:
    """The image in parts: what conversions take on their way would be several times a large image."""
    rows = max(1, _STRIP_PIXELS // image.width)
    return ((0, top, image.width, min(top + rows, image.height)) for top in range(0, image.height, rows))


def _has_16_bits(image: Image.Image) -> bool:
    parts = (np.asarray(image.crop(strip)) for strip in _strips(image))
    return all(part.min() >= 0 and part.max() <= 0xFFFF for part in parts)


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Pillow's own conversion clips where it should scale."""
    values = np.asarray(image).astype(np.int64)
    return Image.fromarray(((values * 255 + 0x7FFF) // 0xFFFF).astype(np.uint8)).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    over = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")


def _plain(image: Image.Image) -> Image.Image:
    return image.convert("RGB")
