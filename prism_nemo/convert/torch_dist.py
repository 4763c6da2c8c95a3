"""Megatron's `torch_dist` checkpoints without Megatron: torch.distributed.checkpoint's files, `common.pt` and `metadata.json`.

Reading goes through the checkpoint's own index, so that any layout it was saved at will do, and unpickles nothing but that
index's plain types. Tensors are never loaded here: they are bytes of `.distcp` files.
"""

from __future__ import annotations

import io
import itertools
import json
import pickle
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_nemo.convert import pickles
from prism_nemo.convert.dtypes import BY_NAME, DType
from prism_nemo.convert.files import sync, write_json
from prism_nemo.convert.pieces import Computed, Files, Piece, Run, Runs, memory_of
from prism_nemo.convert.torch_zip import TensorArchive, locate_tensor, object_archive
from prism_nemo.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

METADATA = ".metadata"  # the index, written last by torch
COMMON = "common.pt"
CONFIG = "metadata.json"
CONTENT = "content_metadata"
OPTIMIZER_UPDATES = "optimizer_updates"  # in the content metadata, which engine/model_checkpoint.py writes too; 0: weights alone
_FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}
_PLAIN = {  # the types of an index; their attributes are all that is wanted of them
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorStorageMetadata",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "TensorWriteData", "BytesIOWriteData"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
}
_ENUMS = {
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.planner", "WriteItemType"),
}
_OTHERS: dict[tuple[str, str], Any] = {
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): lambda name: name,
    ("collections", "OrderedDict"): OrderedDict,
    ("pathlib", "PosixPath"): lambda *parts: "/".join(parts),
    ("pathlib", "Path"): lambda *parts: "/".join(parts),
}


class _Plain:
    """Stands for any of an index's types."""

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state[1] if isinstance(state, tuple) else state)


class _Properties:
    """torch's TensorProperties."""

    dtype: DType

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = state[0]


class _IndexUnpickler(pickle.Unpickler):
    """Reads a checkpoint's index: stand-ins for its own types, and no code of anybody's."""

    def __init__(self, file: io.BufferedReader) -> None:
        super().__init__(file)
        self._types: dict[tuple[str, str], type[_Plain]] = {}

    def find_class(self, module: str, name: str) -> Any:
        if name in _PLAIN.get(module, ()):
            return self._types.setdefault((module, name), type(name, (_Plain,), {}))
        if (module, name) == ("torch.distributed.checkpoint.metadata", "TensorProperties"):
            return _Properties
        if (module, name) in _ENUMS:
            return int
        if (module, name) in _OTHERS:
            return _OTHERS[module, name]
        if module == "torch" and name in BY_NAME:
            return BY_NAME[name]
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's index")


@dataclass(frozen=True)
class Stored:
    """One saved chunk of a tensor: where it lies in the whole, and where in which file its archive is."""

    path: Path
    archive_offset: int
    archive_length: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: DType

    @cached_property
    def start(self) -> int:
        """The byte of the file at which the chunk's values begin; CheckpointError when it is not such an archive."""
        try:
            archive = TensorArchive(self.sizes, self.dtype)
            if self.dtype.storage is not None and self.archive_length == archive.total_bytes:
                before, _ = archive.render()  # as this project writes it; anybody else's is read in full
                with self.path.open("rb", buffering=0) as ours:
                    ours.seek(self.archive_offset)
                    if ours.read(len(before)) == before:
                        return self.archive_offset + len(before)
            with self.path.open("rb") as file, _Slice(file, self.archive_offset, self.archive_length) as part:
                return self.archive_offset + locate_tensor(part, self.sizes, self.dtype)
        except (ValueError, OSError) as error:
            raise CheckpointError(
                f"a tensor cannot be read ({error})",
                where=f"{self.path}, byte {self.archive_offset}",
                remedy="copy the checkpoint again, or use an earlier one",
            ) from error


class _Slice(io.RawIOBase):
    """A part of an open file as a file of its own."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0) -> int:
        self._position = max(0, (0, self._position, self._length)[whence] + offset)
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self._length - self._position))
        self._file.seek(self._start + self._position)
        content = self._file.read(count)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor of the checkpoint. `shape` may begin with axes for layers and experts."""

    key: str
    shape: tuple[int, ...]
    dtype: DType
    chunks: tuple[Stored, ...]

    @cached_property
    def _by_index(self) -> dict[int, dict[tuple[int, ...], list[Stored]]]:
        """For each number of leading axes, the chunks that hold each index along them."""
        return {}

    def _holding(self, index: tuple[int, ...]) -> list[Stored]:
        depth = len(index)
        if depth not in self._by_index:
            table: dict[tuple[int, ...], list[Stored]] = defaultdict(list)
            for chunk in self.chunks:
                leading = zip(chunk.offsets[:depth], chunk.sizes[:depth], strict=True)
                for held in itertools.product(*(range(offset, offset + size) for offset, size in leading)):
                    table[held].append(chunk)
            self._by_index[depth] = table
        return self._by_index[depth].get(index, [])

    def pieces(self, index: tuple[int, ...], first: int, last: int, files: Files) -> list[Piece]:
        """Rows `first` to `last` (exclusive) of the tensor at `index` of the leading axes.

        CheckpointError when the chunks do not cover them.
        """
        depth = len(index)
        row_shape = self.shape[depth + 1 :]
        row_bytes = prod(row_shape) * self.dtype.itemsize
        chunks = sorted(self._holding(index), key=lambda chunk: chunk.offsets)
        chunks = [chunk for chunk in chunks if chunk.offsets[depth] < last and chunk.offsets[depth] + chunk.sizes[depth] > first]
        if any(chunk.sizes[depth + 1 :] != row_shape for chunk in chunks):
            shape = (last - first, *row_shape)
            return [Computed((last - first) * row_bytes, lambda: self._assembled(index, first, chunks, shape, files))]
        runs, row = [], first
        for chunk in chunks:
            start, end = chunk.offsets[depth], chunk.offsets[depth] + chunk.sizes[depth]
            if start > row:
                break
            if end > row:
                skipped = _before(chunk, index) * chunk.sizes[depth] + row - start
                runs.append(Run(chunk, skipped * row_bytes, (min(end, last) - row) * row_bytes))
                row = min(end, last)
        if row < last:
            raise self._incomplete()
        return [Runs(tuple(runs))]

    def _assembled(
        self, index: tuple[int, ...], first: int, chunks: Sequence[Stored], shape: tuple[int, ...], files: Files
    ) -> Tensor:
        """Rows that are cut across, as tensor-parallel ranks save them."""
        import torch

        depth, result = len(index), torch.empty(shape, dtype=self.dtype.torch)
        filled = 0
        for chunk in chunks:
            part = torch.empty(chunk.sizes[depth:], dtype=self.dtype.torch)
            position = chunk.start + _before(chunk, index) * part.nbytes
            files.read_into(chunk.path, memory_of(part), position)
            target, source = [], []
            for axis, (offset, size) in enumerate(zip(chunk.offsets[depth:], chunk.sizes[depth:], strict=True)):
                base = first if axis == 0 else 0
                low, high = max(offset, base), min(offset + size, base + shape[axis])
                target.append(slice(low - base, high - base))
                source.append(slice(low - offset, high - offset))
            cut = part[tuple(source)]
            result[tuple(target)] = cut
            filled += cut.numel()
        if filled != result.numel():
            raise self._incomplete()
        return result

    def _incomplete(self) -> CheckpointError:
        return CheckpointError(f"the checkpoint holds only parts of `{self.key}`", remedy="a complete copy of the checkpoint")


def _before(chunk: Stored, index: tuple[int, ...]) -> int:
    """How many tensors of the leading axes lie in the chunk before the one at `index`."""
    position = 0
    for at, offset, size in zip(index, chunk.offsets[: len(index)], chunk.sizes[: len(index)], strict=True):
        position = position * size + at - offset
    return position


class TorchDistCheckpoint:
    """The tensors of a `torch_dist` checkpoint by key. Raises CheckpointError for what is not one, or not whole."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.tensors: dict[str, StoredTensor] = {}
        self.objects: set[str] = set()
        self.object_places: dict[str, list[tuple[Path, int, int]]] = {}  # file, offset and length
        metadata = self._read_index()
        try:
            self._take(metadata)
        except (AttributeError, TypeError, ValueError, KeyError) as error:
            raise CheckpointError(f"the checkpoint's index makes no sense ({error})", where=str(directory / METADATA)) from error

    def _take(self, metadata: Any) -> None:
        places: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        for index, info in (metadata.storage_data or {}).items():
            places[index.fqn].append((index, info))
        for key, entry in metadata.state_dict_metadata.items():
            if type(entry).__name__ != "TensorStorageMetadata":
                self.objects.add(key)
                self.object_places[key] = [(self._file(info), info.offset, info.length) for _, info in places[key]]
                continue
            sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in entry.chunks}
            dtype = entry.properties.dtype
            chunks = tuple(
                Stored(self._file(info), info.offset, info.length, offsets, sizes[offsets], dtype)
                for offsets, info in ((tuple(index.offset or ()), info) for index, info in places[key])
                if offsets in sizes
            )
            self.tensors[key] = StoredTensor(key, tuple(entry.size), dtype, chunks)

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors."""
        return sorted({chunk.path for tensor in self.tensors.values() for chunk in tensor.chunks})

    def _read_index(self) -> Any:
        path = self.directory / METADATA
        try:
            with path.open("rb") as file:
                metadata = _IndexUnpickler(file).load()
        except FileNotFoundError as error:
            raise CheckpointError("there is no checkpoint", where=str(self.directory), remedy="a torch_dist folder") from error
        except Exception as error:  # foreign bytes raise anything
            raise CheckpointError(f"the checkpoint's index cannot be read ({error})", where=str(path)) from error
        if type(metadata).__name__ not in ("Metadata", "MCoreMetadata"):
            raise CheckpointError("the checkpoint's index is of another kind", where=str(path))
        return metadata

    def _file(self, info: Any) -> Path:
        if Path(info.relative_path).name != info.relative_path:
            raise CheckpointError(f"a file lies outside of the checkpoint: {info.relative_path}", where=str(self.directory))
        if getattr(info, "transform_descriptors", None):
            raise CheckpointError("the checkpoint's files are compressed or encrypted", where=str(self.directory))
        return self.directory / str(info.relative_path)


@dataclass(frozen=True)
class WrittenTensor:
    """One chunk for the index of a checkpoint that is being written. `place`: file, offset and length of its archive."""

    key: str
    shape: tuple[int, ...]
    dtype: DType
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: tuple[str, int, int]


def write_index(
    directory: Path, tensors: Iterable[WrittenTensor], objects: Iterable[str], object_place: tuple[str, int, int]
) -> None:
    """Writes `.metadata`, `common.pt` and `metadata.json`, and has them on disk.

    `objects` are keys that hold nothing (Megatron's extra states); one place serves them all.
    """
    entries: dict[str, pickles.Instance] = {}
    storage: list[tuple[pickles.Instance, pickles.Instance]] = []
    for tensor in tensors:
        if tensor.key not in entries:
            state = {"properties": _properties(tensor.dtype), "size": _size(tensor.shape), "chunks": []}
            entries[tensor.key] = _described("TensorStorageMetadata", state)
        chunks = entries[tensor.key].state["chunks"]
        index = {"fqn": tensor.key, "index": len(chunks), "offset": _size(tensor.offsets)}
        storage.append((_described("MetadataIndex", index), _stored_at(tensor.place)))
        chunks.append(_described("ChunkStorageMetadata", {"offsets": _size(tensor.offsets), "sizes": _size(tensor.sizes)}))
    for key in objects:
        entries[key] = _described("BytesStorageMetadata", {})
        storage.append((_described("MetadataIndex", {"fqn": key, "index": None}), _stored_at(object_place)))
    meta = _described("StorageMeta", {"checkpoint_id": None, "save_id": None, "load_id": None, "modules": []})
    index = {"state_dict_metadata": entries, "planner_data": None, "storage_data": pickles.Pairs(storage)}
    content = pickles.dumps(_described("Metadata", {**index, "storage_meta": meta, "version": "1.0.0"}))
    (directory / METADATA).write_bytes(content)
    (directory / COMMON).write_bytes(object_archive({CONTENT: {OPTIMIZER_UPDATES: 0}}))
    for name in (METADATA, COMMON):
        sync(directory / name)
    write_json(directory / CONFIG, _FORMAT)


_MODULE = "torch.distributed.checkpoint"


def _described(name: str, state: Any) -> pickles.Instance:
    """One of the index's own objects."""
    return pickles.Instance(pickles.Global(f"{_MODULE}.metadata", name), state)


def _stored_at(place: tuple[str, int, int]) -> pickles.Instance:
    state = dict(zip(("relative_path", "offset", "length"), place, strict=True))
    return pickles.Instance(pickles.Global(f"{_MODULE}.filesystem", "_StorageInfo"), state)


def _size(numbers: tuple[int, ...]) -> pickles.Call:
    return pickles.Call(pickles.Global("torch", "Size"), (numbers,))


def _properties(dtype: DType) -> pickles.Instance:
    """A plain tensor on the CPU: type, layout, requires_grad, memory format (contiguous), pinned."""
    layout = pickles.Call(pickles.Global("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = pickles.Call(pickles.Global(f"{_MODULE}.metadata", "_MEM_FORMAT_ENCODING"), (0,))
    state = (pickles.Global("torch", dtype.name), layout, False, contiguous, False)
    return _described("TensorProperties", state)


def empty_object() -> bytes:
    """What Megatron stores for an extra state that holds nothing."""
    return object_archive([None])


def read_content(directory: Path) -> dict[str, Any]:
    """What the writer noted about the checkpoint's content; empty when it noted nothing, or nothing plain."""
    from prism_nemo.convert.vetting import load_plain

    try:
        common = load_plain(directory / COMMON)
    except (OSError, ValueError):
        return {}
    content = common.get(CONTENT) if isinstance(common, dict) else None
    return content if isinstance(content, dict) else {}


def is_torch_dist(directory: Path) -> bool:
    """Whether Megatron would take the directory for a `torch_dist` checkpoint."""
    try:
        config = json.loads((directory / CONFIG).read_text())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and config.get("sharded_backend") == "torch_dist"
