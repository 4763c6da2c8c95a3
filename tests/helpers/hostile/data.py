"""Data files, images and videos."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from helpers.hostile import case, command, refusal, validated
from helpers.stages import tiny_task
from PIL import Image

from prism_nemo.config.schema import DataConfig
from prism_nemo.data.chat import ChatEncoder
from prism_nemo.data.records import ImageSource, Record

DOOR = "data"
ESCAPES = "\x1b[2J\x1b]0;owned\x07\u202e\r"


def record(folder: Path, **fields: Any) -> Path:
    """A data file of one record below `folder`, whose image root it is."""
    root = folder / "data"
    root.mkdir(exist_ok=True)
    content = {"id": "1", "prompt": "<image> What?" if "images" in fields else "What?", "answer": "3", **fields}
    (root / "d.jsonl").write_text(json.dumps(content) + "\n")
    return root / "d.jsonl"


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, data: bytes, *extra: bytes) -> bytes:
    """8-bit grey, of compressed data."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(extra) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def zeros(size: int) -> bytes:
    """So many, compressed a thousandfold."""
    packer, block = zlib.compressobj(9), bytes(1 << 20)
    return b"".join(packer.compress(block) for _ in range(size >> 20)) + packer.flush()


# Paths


PATHS: dict[str, Callable[[Path], str]] = {
    "an image path with `../`": lambda folder: "../secret.png",
    "an image path with `../` behind a folder": lambda folder: "inner/../../secret.png",
    "an absolute image path": lambda folder: str(folder / "secret.png"),
    "an image path that is a link out of the root": lambda folder: "link.png",
    "an image path through a linked folder": lambda folder: "linked/secret.png",
    "a link that leads to itself": lambda folder: "loop.png",
    "a Windows path": lambda folder: "C:\\secret.png",
    "a Windows path with `..\\`": lambda folder: "..\\secret.png",
    "a path with a NUL": lambda folder: "a\0.png",
    "a path with line breaks and escapes": lambda folder: f"a\nprism-nemo: all is well{ESCAPES}.png",
    "a path of a million characters": lambda folder: "a/" * 500_000,
    "a named pipe": lambda folder: "pipe.png",
    "a device": lambda folder: "/dev/zero",
    "a folder": lambda folder: "inner",
    "an https URL": lambda folder: "https://127.0.0.1:9/a.png",
    "a file URL": lambda folder: "file:///etc/passwd",
    "a data URL": lambda folder: "data:image/png;base64,AAAA",
    "an address of cloud metadata": lambda folder: "http://169.254.169.254/latest/meta-data",
}


def of_path(make: Callable[[Path], str]) -> Callable[[Path], str]:
    def attempt(folder: Path) -> str:
        file = record(folder, images=[make(folder)])
        (folder / "secret.png").write_bytes(picture())
        (file.parent / "link.png").symlink_to("../secret.png")
        (file.parent / "linked").symlink_to("..")
        (file.parent / "loop.png").symlink_to("loop.png")
        (file.parent / "inner").mkdir()
        os.mkfifo(file.parent / "pipe.png")
        return validated(folder, file)

    return attempt


for _given, _make in PATHS.items():
    case(DOOR, _given)(of_path(_make))


# Images


IMAGES: dict[str, Callable[[], bytes]] = {
    "a PNG of 30000 x 30000 pixels in 900 kB": lambda: png(30_000, 30_000, zeros(900 << 20)),
    "a PNG that says 2 billion x 2 billion pixels": lambda: png(2**31 - 1, 2**31 - 1, zeros(1 << 20)),
    "a PNG with 200 MB of text in 200 kB": lambda: png(
        8, 8, zlib.compress(bytes(72)), *[chunk(b"zTXt", b"a%d\0\0" % i + zeros(20 << 20)) for i in range(10)]
    ),
    "an image file of 65 MB": lambda: picture() + bytes(65 << 20),
    "a PNG that is cut short": lambda: picture()[:45],
    "a PostScript file named .png, which others give to an interpreter": lambda: (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    ),
    "an SVG that names another file": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
}


def of_image(make: Callable[[], bytes]) -> Callable[[Path], str]:
    def attempt(folder: Path) -> str:
        file = record(folder, images=["a.png"])
        (file.parent / "a.png").write_bytes(make())
        return validated(folder, file)

    return attempt


for _given, _image in IMAGES.items():
    case(DOOR, _given)(of_image(_image))


@case(DOOR, "a record that names an image 100,000 times")
def _(folder: Path) -> str:
    (folder / "a.png").write_bytes(picture())
    prompt, images = "<image>" * 100_000, (ImageSource(path=Path("a.png")),) * 100_000
    data = DataConfig(max_prompt_length=64, system_prompt="<caption> <think> <answer>")
    encoder = ChatEncoder.from_directory(tiny_task().model, data, image_root=folder)
    return refusal(lambda: encoder.encode_prompt(Record(id="1", prompt=prompt, images=images)))


def video() -> bytes:
    """Two frames of Motion JPEG in Matroska."""
    import av

    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuvj420p"
        for _ in range(2):
            container.mux(stream.encode(av.VideoFrame.from_image(Image.new("RGB", (32, 32)))))
        container.mux(stream.encode())
    return file.getvalue()


VIDEOS: dict[str, Callable[[], bytes]] = {
    "a playlist named .mp4, which names another file": lambda: b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
    "a video of an unknown codec": lambda: video().replace(b"V_MJPEG", b"V_EVIL1"),
    "a video that is cut short": lambda: video()[:1200],
}


def of_video(make: Callable[[], bytes]) -> Callable[[Path], str]:
    def attempt(folder: Path) -> str:
        file = record(folder, prompt="<video> What?", videos=["a.mp4"])
        (file.parent / "a.mp4").write_bytes(make())
        return validated(folder, file)

    return attempt


for _given, _video in VIDEOS.items():
    case(DOOR, _given)(of_video(_video))


# Files of records


LINES: dict[str, Callable[[], bytes]] = {
    "a line of JSON of 65 MB": lambda: b'{"prompt": "' + b"x" * (65 << 20) + b'"}',
    "JSON nested 100,000 deep": lambda: b"[" * 100_000 + b"]" * 100_000,
    "objects nested 100,000 deep": lambda: b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a number of 100,000 digits": lambda: b'{"prompt": "a", "answer": ' + b"9" * 100_000 + b"}",
    "NaN": lambda: b'{"prompt": "a", "answer": NaN}',
    "text that is not UTF-8": lambda: b'{"prompt": "\xff\xfe"}',
    "half a character": lambda: b'{"prompt": "\\ud800"}',
}


def of_line(make: Callable[[], bytes]) -> Callable[[Path], str]:
    def attempt(folder: Path) -> str:
        (folder / "d.jsonl").write_bytes(make() + b"\n")
        return validated(folder, folder / "d.jsonl")

    return attempt


for _given, _line in LINES.items():
    case(DOOR, _given)(of_line(_line))


@case(DOOR, "JSON nested deep inside a field")
def _(folder: Path) -> str:
    return validated(folder, record(folder, reward_model='{"a":' * 50_000))


@case(DOOR, "a gzip file named .jsonl")
def _(folder: Path) -> str:
    packer = zlib.compressobj(9, wbits=31)
    (folder / "d.jsonl").write_bytes(packer.compress(bytes(10 << 20)) + packer.flush())
    return validated(folder, folder / "d.jsonl")


@case(DOOR, "a zip file named .tar")
def _(folder: Path) -> str:
    with zipfile.ZipFile(folder / "d.tar", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.json", bytes(10 << 20))
    return validated(folder, folder / "d.tar")


def shard(folder: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(folder / "d.tar", "w") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return folder / "d.tar"


def link(name: str, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = tarfile.SYMTYPE, target
    return member


RECORD = b'{"prompt": "<image> What?", "answer": "3"}'
SHARDS: dict[str, list[tuple[tarfile.TarInfo, bytes]]] = {
    "a shard with a member named `../a.json`": [(tarfile.TarInfo("../a.json"), RECORD)],
    "a shard with an absolute name": [(tarfile.TarInfo("/etc/a.json"), RECORD)],
    "a shard whose image is a link": [(tarfile.TarInfo("a.json"), RECORD), (link("a.png", "/etc/passwd"), b"")],
    "a shard with escapes in a name": [(tarfile.TarInfo(f"a{ESCAPES}.txt2"), b"x")],
}


def of_shard(members: list[tuple[tarfile.TarInfo, bytes]]) -> Callable[[Path], str]:
    return lambda folder: validated(folder, shard(folder, *members))


for _given, _members in SHARDS.items():
    case(DOOR, _given)(of_shard(_members))


def header(kind: bytes, size: bytes) -> bytes:
    """A member's, with a checksum that is right."""
    block = bytearray(tarfile.TarInfo("a.json").tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157], block[148:156] = size, kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


BACKWARDS = b"\xff" + (256**11 - 512).to_bytes(11)  # -512
DIGITS = 200_000
HEADERS: dict[str, bytes] = {
    "a shard with a member of -512 bytes, behind which it would begin anew": header(b"0", BACKWARDS),
    "a shard with 3000 headers before a member": (header(b"L", b"%011o\0" % 2) + b"a".ljust(512, b"\0")) * 3000,
    "a shard with a pax record over which expressions run for minutes": header(b"x", b"%011o\0" % DIGITS)
    + (b"1" * (DIGITS - 1) + b" ").ljust(-(-DIGITS // 512) * 512, b"\0"),
}


def of_headers(content: bytes) -> Callable[[Path], str]:
    def attempt(folder: Path) -> str:
        first = shard(folder, (tarfile.TarInfo("0.json"), b'{"prompt": "What?"}')).read_bytes()[:1024]
        (folder / "d.tar").write_bytes(first + content + bytes(1024))
        return validated(folder, folder / "d.tar")

    return attempt


for _given, _content in HEADERS.items():
    case(DOOR, _given)(of_headers(_content))


@case(DOOR, "a parquet file of 43 kB in which one image stands in 20,000 rows: 18 GB")
def _(folder: Path) -> str:
    image = pa.DictionaryArray.from_arrays(pa.array([0] * 20_000, pa.int32()), pa.array([b"x" * 900_000]))
    table = pa.table({"prompt": ["<image>"] * 20_000, "image": image})
    pq.write_table(table, folder / "d.parquet", dictionary_pagesize_limit=2**30, store_schema=False)
    status, shown = command("data", "inspect", str(folder / "d.parquet"), "--cache-dir", str(folder / "cache"), "--limit", "1")
    assert status == 0
    return shown.strip().splitlines()[-1].partition("]: ")[2]


@case(DOOR, "a parquet file with a damaged footer")
def _(folder: Path) -> str:
    pq.write_table(pa.table({"prompt": ["a"]}), folder / "d.parquet")
    content = (folder / "d.parquet").read_bytes()
    (folder / "d.parquet").write_bytes(content[:-60] + b"\xff" * 52 + content[-8:])
    return validated(folder, folder / "d.parquet")


@case(DOOR, "escapes, markup and line breaks in ids and sources", outcome="shown as text")
def _(folder: Path) -> str:
    file = record(folder, id=f"1{ESCAPES}\nprism-nemo: all is well", images=["none.png"], source=f"[red]{ESCAPES}\n")
    status, shown = command("data", "inspect", str(file), "--cache-dir", str(folder / "cache"))
    assert status == 0 and all(line.isprintable() for line in shown.splitlines())
    assert not any(line.startswith("prism-nemo") for line in shown.splitlines())
    return next(line for line in shown.splitlines() if "all is well" in line).partition(": the image")[0]
