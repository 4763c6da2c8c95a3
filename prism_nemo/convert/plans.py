"""What a conversion writes, file by file, worked out from names and shapes before a value is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

from prism_nemo.convert.checkpoint_keys import check_uniform, chunks, extra_states, place
from prism_nemo.convert.dtypes import DType
from prism_nemo.convert.files import INDEX_FILE, WEIGHTS_FILE, write_json
from prism_nemo.convert.pieces import Computed, Literal, Piece, rows_to_hf
from prism_nemo.convert.qwen3_vl import (
    Config,
    ParameterMapping,
    Shape,
    check_expert_layouts_differ,
    hf_shapes,
    hub_config,
    mappings,
)
from prism_nemo.convert.shards import Slot, TargetFile
from prism_nemo.convert.sources import Source, full_tensor
from prism_nemo.convert.torch_dist import WrittenTensor, empty_object, write_index
from prism_nemo.convert.torch_zip import TensorArchive

_SMALLEST_SHARD, _LARGEST_SHARD, _SHARDS = 1_000_000_000, 5_000_000_000, 16
_PAGE = 4096


def default_shard_bytes(config: Config, dtype: DType) -> int:
    """A file's size: enough files for several processes to share, and no more than the Hub's usual 5 GB in each."""
    total = dtype.itemsize * sum(prod(shape) for shape in hf_shapes(config).values())
    return max(_SMALLEST_SHARD, min(_LARGEST_SHARD, total // _SHARDS))


@dataclass(frozen=True)
class CheckpointPlan:
    """A `torch_dist` checkpoint: its files, and what its index says of them."""

    files: list[TargetFile]
    tensors: list[WrittenTensor]
    objects: list[str]
    object_place: tuple[str, int, int]

    def write_index(self, directory: Path) -> None:
        write_index(directory, self.tensors, self.objects, self.object_place)


def plan_checkpoint(
    source: Source, config: Config, *, score_head: bool = False, max_shard_bytes: int | None = None
) -> CheckpointPlan:
    """The checkpoint that a run writes for the model on one rank, cut into files by size."""
    config = hub_config(config)
    check_uniform(config)
    max_shard_bytes = max_shard_bytes or default_shard_bytes(config, source.dtype)
    rows = mappings(config, score_head=score_head)
    empty = empty_object()
    files: list[TargetFile] = []
    slots = [Slot(0, len(empty), lambda: [Literal(empty)])]
    position, tensors = len(empty), []

    def close_file() -> None:
        nonlocal slots, position
        files.append(TargetFile(f"__0_{len(files)}.distcp", position, tuple(slots)))
        slots, position = [], 0

    for part in _checkpoint_parts(rows, config):
        archive = TensorArchive(part.sizes, source.dtype)
        begun = len(slots) > (0 if files else 1)  # with a tensor of its own
        if begun and position + archive.total_bytes > max_shard_bytes:
            close_file()
        page = _PAGE if archive.data_bytes >= 16 * _PAGE else 64  # where the values begin
        offset = -(-(position + archive.data_offset) // page) * page - archive.data_offset
        slots.append(Slot(offset, archive.data_bytes, partial(source.pieces, part.name, part.first, part.last), archive))
        position = offset + archive.total_bytes
        stored = (f"__0_{len(files)}.distcp", offset, archive.total_bytes)
        tensors.append(WrittenTensor(part.key, part.shape, source.dtype, part.offsets, part.sizes, stored))
    close_file()
    objects = extra_states(rows, config, output_head=not score_head)
    return CheckpointPlan(files, tensors, objects, ("__0_0.distcp", 0, len(empty)))


@dataclass(frozen=True)
class _CheckpointPart:
    name: str
    first: int
    last: int
    key: str
    shape: Shape
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def _checkpoint_parts(rows: list[ParameterMapping], config: Config) -> Iterator[_CheckpointPart]:
    for mapping in rows:
        shape = mapping.megatron_shape
        for name in mapping.megatron_names:
            where = place(name, config)
            for chunk in chunks(mapping.sharding, shape):
                rest = shape[1:]
                yield _CheckpointPart(
                    name,
                    chunk.first,
                    chunk.last,
                    where.key,
                    (*where.counts, *shape),
                    (*where.index, chunk.first, *(0 for _ in rest)),
                    (*(1 for _ in where.index), chunk.last - chunk.first, *rest),
                )


@dataclass(frozen=True)
class HFPlan:
    """A HuggingFace directory's weights in the Hub's layout."""

    files: list[TargetFile]
    weight_map: dict[str, str]
    total_bytes: int

    def write_index(self, directory: Path) -> None:
        if len(self.files) > 1:
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": self.weight_map}
            write_json(directory / INDEX_FILE, index)


def plan_hf(source: Source, config: Config, *, score_head: bool = False, max_shard_bytes: int | None = None) -> HFPlan:
    """Raises CheckpointError for experts that transformers 5 would misread."""
    config = hub_config(config)
    check_expert_layouts_differ(config)
    max_shard_bytes = max_shard_bytes or default_shard_bytes(config, source.dtype)
    shards: list[list[_HFTensor]] = [[]]
    size = total = 0
    for tensor in _hf_tensors(source, mappings(config, score_head=score_head)):
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    count = len(shards)
    names = [WEIGHTS_FILE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    files = [_safetensors(name, tensors, source.dtype) for name, tensors in zip(names, shards, strict=True)]
    return HFPlan(files, {t.name: name for name, tensors in zip(names, shards, strict=True) for t in tensors}, total)


@dataclass(frozen=True)
class _HFTensor:
    """`parts` one after another make the tensor; each is `part_bytes` long."""

    name: str
    shape: Shape
    nbytes: int
    parts: list[Any]  # callables that return pieces

    @property
    def part_bytes(self) -> int:
        return self.nbytes // len(self.parts)


def _hf_tensors(source: Source, rows: list[ParameterMapping]) -> Iterator[_HFTensor]:
    for mapping in rows:
        for number, (name, shape) in enumerate(zip(mapping.hf_names, mapping.hf_shapes, strict=True)):
            parts = [partial(_hf_pieces, source, mapping, megatron, number) for megatron in mapping.megatron_names]
            yield _HFTensor(name, shape, prod(shape) * source.dtype.itemsize, parts)


def _hf_pieces(source: Source, mapping: ParameterMapping, megatron: str, number: int) -> list[Piece]:
    """The `number`-th HuggingFace tensor of a parameter, or one expert's slice of a fused one."""
    if mapping.fused:
        nbytes = prod(mapping.hf_shapes[0][1:]) * source.dtype.itemsize
        shape = mapping.megatron_shape
        return [Computed(nbytes, lambda: mapping.op.to_hf(full_tensor(source, megatron, shape))[0])]
    runs = rows_to_hf(mapping.op, tuple(shape[0] for shape in mapping.hf_shapes))[number]
    return [piece for run in runs for piece in source.pieces(megatron, run.start, run.start + run.count)]


def _safetensors(name: str, tensors: list[_HFTensor], dtype: DType) -> TargetFile:
    """The header is padded with spaces, as the format allows, so that values begin at a page."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file that does not name its format
    position = 0
    for tensor in tensors:
        span = [position, position + tensor.nbytes]
        header[tensor.name] = {"dtype": dtype.code, "shape": list(tensor.shape), "data_offsets": span}
        position = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _PAGE)
    slots, offset = [], 8 + len(text)
    for tensor in tensors:
        for part in tensor.parts:
            slots.append(Slot(offset, tensor.part_bytes, part))
            offset += tensor.part_bytes
    return TargetFile(name, offset, tuple(slots), len(text).to_bytes(8, "little") + text)
