"""What runs in children (`probe.py`): functions of JSON values that return such, findings as `Finding.to_json` makes them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prism_nemo.doctor.collectives import all_reduce
from prism_nemo.doctor.finding import Finding, failed, ok, warning
from prism_nemo.doctor.gpus import check_nvidia_smi
from prism_nemo.doctor.matmul import torch_and_matmul
from prism_nemo.doctor.probe import say_at

_GIB = 1 << 30
_SLOW_MB_PER_SECOND = 100.0
_LITTLE_SPACE = 20 * _GIB
_CHUNK_BYTES = 4 << 20
_BYTES_OF_STATE_PER_WEIGHT_BYTE = 7  # bf16 weights, and master weights and two moments in fp32
_SEEN_SECONDS = 10.0  # network file systems may show a new file that late
_LATE_SECONDS = 3.0

Findings = list[dict[str, str]]


def _told(*findings: Finding) -> Findings:
    return [finding.to_json() for finding in findings]


def disk(path: str, write_mb: int, weight_bytes: int | None) -> Findings:
    """Free space and speed of writing at `path`, or at the nearest folder above it that exists.

    weight_bytes: of the model whose checkpoints go there, where there is one. write_mb: 0 writes nothing.
    """
    folder = existing(Path(path))
    say_at(f"asking for the space at {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        return _told(failed("disk", f"{folder} cannot be written to", "another folder, or its permissions"))
    usage = os.statvfs(folder)
    if usage.f_flag & os.ST_RDONLY:
        return _told(
            failed("disk", f"{folder} is mounted for reading only", "dmesg: an error may have done it; or another folder")
        )
    if usage.f_files and not usage.f_favail:
        return _told(
            failed("disk", f"no file can be added at {folder}: it has no inodes left", "remove files, or another folder")
        )
    free = usage.f_bavail * usage.f_frsize
    needed = (weight_bytes or 0) * _BYTES_OF_STATE_PER_WEIGHT_BYTE
    text = f"{free / _GIB:.1f} GiB free at {folder}"
    if needed and free < needed:
        space = failed(
            "disk", f"{text}; a checkpoint takes about {needed / _GIB:.1f} GiB", "free some, or another experiment.dir"
        )
    elif free < max(2 * needed, _GIB):
        # The old checkpoint stays until the new one is complete.
        space = warning("disk", f"{text}, which is less than two checkpoints take", "free some, or another experiment.dir")
    elif not needed and free < _LITTLE_SPACE:
        space = warning("disk", text, "a checkpoint is 7 times the size of its model in bf16, and two are on disk at a time")
    else:
        space = ok("disk", text)
    if not write_mb:
        return _told(space)
    return _told(space, _write(folder, write_mb))


def _write(folder: Path, megabytes: int) -> Finding:
    say_at(f"writing {megabytes} MB to {folder}")
    name = folder / f".prism-nemo-doctor-{os.uname().nodename}-{os.getpid()}"
    data = os.urandom(_CHUNK_BYTES)
    written = 0
    began = time.monotonic()
    try:
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            name.unlink()  # goes with the process, however that ends
            while written < megabytes << 20:
                written += os.write(descriptor, data)
            os.fsync(descriptor)
            seconds = time.monotonic() - began
            right = os.pread(descriptor, _CHUNK_BYTES, 0) == data
        finally:
            os.close(descriptor)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = "free space, or raise the quota" if full else "another folder, or the file system's administrator"
        return failed("write", f"after {written >> 20} MB at {folder}: {error.strerror}", remedy)
    if not right:
        return failed("write", f"what was read back at {folder} is not what was written", "do not train on this file system")
    speed = written / 1e6 / seconds
    text = f"{speed:.0f} MB/s at {folder} ({written >> 20} MB, synchronised)"
    if speed < _SLOW_MB_PER_SECOND:
        return warning("write", text, "checkpoints will be slow: use a parallel file system for experiment.dir")
    return ok("write", text)


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def model(path: str, key: str) -> dict[str, Any]:
    """Whether a model's folder can be read. {"findings", "weight_bytes"}: of its weight files, None where there are none."""
    folder = Path(path)
    say_at(f"reading {folder}")
    if not folder.is_dir():
        return {
            "findings": _told(failed(key, f"{folder} is no folder on this node", "mount it, or another path")),
            "weight_bytes": None,
        }
    try:
        files = [file for file in folder.rglob("*") if file.is_file()]
        for file in files:
            with file.open("rb") as stream:
                stream.read(1)
    except OSError as error:
        finding = failed(key, f"{error.filename or folder} cannot be read: {error.strerror}", "its permissions, or another path")
        return {"findings": _told(finding), "weight_bytes": None}
    weights = sum(file.stat().st_size for file in files if file.suffix == ".safetensors")
    if not files:
        return {"findings": _told(failed(key, f"{folder} is empty", "another path")), "weight_bytes": None}
    text = f"{len(files)} files at {folder} can be read, {sum(file.stat().st_size for file in files) / _GIB:.1f} GiB"
    return {"findings": _told(ok(key, text)), "weight_bytes": weights or None}


def images() -> Findings:
    """Whether a PNG and a JPEG come out of the decoder as they went in (the JPEG nearly)."""
    say_at("decoding images")
    from PIL import Image

    from prism_nemo.data.images import load_image
    from prism_nemo.data.records import ImageSource

    places = {(8, 8): (200, 40, 10), (32, 16): (10, 90, 220)}
    picture = Image.new("RGB", (64, 32), places[8, 8])
    picture.paste(places[32, 16], (16, 0, 64, 32))
    for form, allowed in (("PNG", 0), ("JPEG", 10)):
        buffer = io.BytesIO()
        picture.save(buffer, form)
        decoded = load_image(ImageSource(data=buffer.getvalue()), None)
        far = 0
        for (x, y), colour in places.items():
            seen = decoded.crop((x, y, x + 1, y + 1)).tobytes()
            far = max(far, *(abs(one - other) for one, other in zip(seen, colour, strict=True)))
        if decoded.size != picture.size or far > allowed:
            return _told(failed("images", f"a {form} file decodes to something else", "reinstall pillow"))
    return _told(ok("images", "PNG and JPEG are decoded"))


def nvidia_smi(limit: float) -> Findings:
    say_at("asking nvidia-smi")
    return _told(*check_nvidia_smi(limit))


def vllm() -> Findings:
    """Whether vLLM's code can be loaded; only rollout/vllm imports it, and so does this, through that."""
    say_at("importing vLLM")
    import importlib
    import sys

    importlib.import_module("prism_nemo.rollout.vllm.engine")
    return _told(ok("vllm", f"{sys.modules['vllm'].__version__} can be imported"))


# The shared file system: a folder that the first node makes, and all look into.


def share_folder(path: str, name: str) -> str:
    """Makes the folder; its path."""
    folder = existing(Path(path)) / name
    say_at(f"making {folder}")
    folder.mkdir()
    return str(folder)


def share_write(folder: str, node: int) -> float:
    """Writes this node's file, renamed into place. Returns its time of change minus this node's clock, in seconds."""
    target = Path(folder) / str(node)
    say_at(f"writing {target}")
    temporary = target.with_name(f".{node}.new")
    with temporary.open("w") as stream:
        stream.write(_content(folder, node))
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(target)
    return target.stat().st_mtime - time.time()


def share_read(folder: str, nodes: dict[str, str]) -> Findings:
    """Whether every node's file is there. nodes: their names, by number."""
    began = time.monotonic()
    waiting = dict(nodes)
    while waiting and time.monotonic() - began < _SEEN_SECONDS:
        for number in list(waiting):
            say_at(f"reading what {waiting[number]} wrote")
            with contextlib.suppress(OSError):
                list(Path(folder).iterdir())  # makes a network file system look again
                if (Path(folder) / number).read_text() == _content(folder, int(number)):
                    del waiting[number]
        if waiting:
            time.sleep(0.1)
    seconds = time.monotonic() - began
    if waiting:
        return _told(
            failed(
                "shared folder",
                f"what {', '.join(waiting.values())} wrote to {folder} is not seen after {_SEEN_SECONDS:g} s",
                "experiment.dir must be on a file system that all nodes share",
            )
        )
    text = f"what {len(nodes)} node(s) wrote and renamed at {Path(folder).parent} is seen after {seconds:.1f} s"
    if seconds > _LATE_SECONDS:
        return _told(
            warning("shared folder", text, "files appear late: what ranks tell one another through files comes late too")
        )
    return _told(ok("shared folder", text))


def share_lock_hold(folder: str) -> None:
    """Holds the lock as long as this process lives."""
    with (Path(folder) / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        say_at("holding the lock")
        threading.Event().wait()


def share_lock_try(folder: str) -> Findings:
    """Whether a lock that another process holds, on another node where there are several, keeps this one out."""
    say_at("asking for a lock")
    with (Path(folder) / "lock").open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return _told(ok("locks", "a lock of the first node is seen here"))
        except OSError as error:
            problem = f"{folder} is on a file system without locks: {error.strerror}"
        else:
            problem = f"a lock of the first node is not seen here, at {folder}"
    return _told(warning("locks", problem, "nothing keeps two runs out of one directory: mount it with locks (Lustre: -o flock)"))


def share_remove(folder: str) -> None:
    for file in Path(folder).iterdir():
        file.unlink()
    Path(folder).rmdir()


def _content(folder: str, node: int) -> str:
    return f"{Path(folder).name} {node}\n"


PROBES: dict[str, Callable[..., Any]] = {
    "all_reduce": all_reduce,
    "disk": disk,
    "images": images,
    "model": model,
    "nvidia_smi": nvidia_smi,
    "share_folder": share_folder,
    "share_lock_hold": share_lock_hold,
    "share_lock_try": share_lock_try,
    "share_read": share_read,
    "share_remove": share_remove,
    "share_write": share_write,
    "torch": torch_and_matmul,
    "vllm": vllm,
}
