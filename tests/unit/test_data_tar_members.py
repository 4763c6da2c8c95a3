"""Members of tar archives: those that Python's tarfile finds, and an end with a reason where one is damaged."""

from __future__ import annotations

import io
import random
import tarfile

import pytest

from prism_nemo.data.tar_members import DamagedTar, members


def archive(random: random.Random, format: int) -> bytes:
    """Files, folders and links under names of all lengths."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for number in range(20):
            name = "".join(random.choices("abc/.é", k=random.choice([3, 8, 60, 300]))).strip("/.") or "x"
            member = tarfile.TarInfo(name if format != tarfile.USTAR_FORMAT else f"{number}/{name[:40]}")
            member.mtime = random.choice([0, 1.5, 12345])
            member.type = random.choice([tarfile.REGTYPE] * 6 + [tarfile.DIRTYPE, tarfile.SYMTYPE])
            member.linkname = "elsewhere" * random.choice([1, 30]) if member.issym() else ""
            if format == tarfile.USTAR_FORMAT:
                member.linkname = member.linkname[:90]
            member.size = random.randrange(1500) if member.isreg() else 0
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return file.getvalue()


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_what_tarfile_finds(format: int) -> None:
    for seed in range(20):
        content = archive(random.Random(seed), format)
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            wanted = [(m.name, m.size, str(m.mtime), m.offset, m.offset_data, m.isreg(), m.isdir()) for m in tar]
        found = members(io.BytesIO(content))
        assert [(m.name, m.size, str(m.mtime), m.start, m.content, m.plain, m.folder) for m in found] == wanted


def test_damage_ends_it() -> None:
    """Bytes changed under checksums that are right: every archive is read to an end, or refused."""
    choices = random.Random(0)
    refused = 0
    for _ in range(1000):
        content = bytearray(archive(choices, tarfile.PAX_FORMAT)[: choices.randrange(512, 8192)])
        place = choices.randrange(len(content))
        head = place // 512 * 512
        content[place] = choices.choice([0, 32, 48, 57, 128, 255])
        content[head + 148 : head + 156] = b" " * 8
        content[head + 148 : head + 156] = b"%06o\0 " % sum(content[head : head + 512])
        try:
            assert len(list(members(io.BytesIO(content)))) <= 20
        except DamagedTar:
            refused += 1
    assert 0 < refused < 1000
