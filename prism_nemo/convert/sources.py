"""Where the parameters of a model are read from: a HuggingFace directory, or a checkpoint of any layout.

A source answers with the bytes of a parameter's rows, under canonical Megatron names. What is written from it (`plans.py`) need
not know what it is, so that every source goes to every target, and upcycling is a source over another one.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from prism_nemo.convert import checkpoint_keys
from prism_nemo.convert.dtypes import BFLOAT16, FLOAT32, DType
from prism_nemo.convert.hf_reader import HFReader
from prism_nemo.convert.pieces import Computed, Files, Piece, read_tensor, select_rows
from prism_nemo.convert.qwen3_vl import MEGATRON_SCORE_HEAD, Config, ParameterMapping, Shape, hub_config, mappings
from prism_nemo.convert.torch_dist import StoredTensor, TorchDistCheckpoint
from prism_nemo.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

FLOATS = {FLOAT32, BFLOAT16}


class Source(Protocol):
    """Parameters by canonical name, all of one type: `dtype`."""

    @property
    def dtype(self) -> DType: ...

    @property
    def files(self) -> list[Path]:
        """What it reads, to tell whether it is still the same."""

    @property
    def io(self) -> Files: ...

    def pieces(self, name: str, first: int, last: int) -> list[Piece]:
        """Rows `first` to `last` (exclusive) of the full parameter."""


def full_tensor(source: Source, name: str, shape: Shape) -> Tensor:
    """One whole parameter in memory."""
    return read_tensor(source.pieces(name, 0, shape[0]), source.io, shape, source.dtype)


class HFSource:
    """A HuggingFace directory. Raises CheckpointError when its weights do not fit the configuration."""

    def __init__(self, reader: HFReader, config: Config, *, score_head: bool = False) -> None:
        self.reader = reader
        layout = reader.check(config, score_head=score_head)
        self._places: dict[str, tuple[ParameterMapping, int]] = {
            name: (mapping, index)
            for mapping in mappings(config, layout=layout, score_head=score_head)
            for index, name in enumerate(mapping.megatron_names)
        }
        used = {hf for mapping, _ in self._places.values() for hf in mapping.hf_names}
        body = {reader.dtype(hf) for hf in used if hf != self._head_name()}
        if len(body) != 1 or not body <= FLOATS:
            found = ", ".join(sorted(str(dtype) for dtype in body))
            raise CheckpointError(
                f"the weights are stored as {found}", where=str(reader.directory), remedy="all in float32, or all in bfloat16"
            )
        self._dtype = body.pop()

    def _head_name(self) -> str | None:
        place = self._places.get(MEGATRON_SCORE_HEAD)
        return None if place is None else place[0].hf_names[0]

    @property
    def dtype(self) -> DType:
        return self._dtype

    @property
    def files(self) -> list[Path]:
        return self.reader.weight_files

    @property
    def io(self) -> Files:
        return self.reader.io

    def pieces(self, name: str, first: int, last: int) -> list[Piece]:
        mapping, index = self._places[name]
        shape = mapping.megatron_shape
        row_bytes = prod(shape[1:]) * self._dtype.itemsize
        stored = {self.reader.dtype(hf) for hf in mapping.hf_names}
        order = None if stored != {self._dtype} else mapping.op.row_order(*(shape[0] for shape in mapping.hf_shapes))
        if order is None:
            return [Computed((last - first) * row_bytes, lambda: self._computed(mapping, index)[first:last])]
        if mapping.fused:
            return self.reader.pieces(mapping.hf_names[0], first, last, expert=index)
        return [
            piece
            for run in select_rows(order, first, last)
            for piece in self.reader.pieces(mapping.hf_names[run.source], run.start, run.start + run.count)
        ]

    def _computed(self, mapping: ParameterMapping, index: int) -> Tensor:
        parts = [self.reader.get_slice(hf, index) if mapping.fused else self.reader.get(hf) for hf in mapping.hf_names]
        return mapping.op.to_megatron(*parts).to(self._dtype.torch)


class CheckpointSource:
    """A `torch_dist` checkpoint: ours, or Megatron-Bridge's of the same model.

    Raises CheckpointError when a parameter is missing or has another shape.
    """

    def __init__(self, checkpoint: TorchDistCheckpoint, config: Config, *, score_head: bool = False) -> None:
        self.checkpoint = checkpoint
        self._files = Files()
        config = hub_config(config)
        wrapper = checkpoint_keys.find_wrapper(checkpoint.tensors)
        if wrapper is None:
            raise CheckpointError(
                "the checkpoint holds no Qwen3-VL", where=str(checkpoint.directory), remedy="the folder of a model's checkpoint"
            )
        self._found: dict[str, list[tuple[StoredTensor, tuple[int, ...]]]] = {}
        missing, wrong = [], []
        for mapping in mappings(config, score_head=score_head):
            shape = mapping.megatron_shape
            for name in mapping.megatron_names:
                found = checkpoint_keys.find(name, checkpoint.tensors, config, wrapper)
                if found is None:
                    missing.append(name)
                    continue
                self._found[name] = [(checkpoint.tensors[key], index) for key, index in found.parts]
                if not _fits(self._found[name], shape):
                    wrong.append(f"{name}: {[list(tensor.shape) for tensor, _ in self._found[name]]}, expected {list(shape)}")
        if missing or wrong:
            raise CheckpointError(
                f"the checkpoint does not fit config.json: {len(missing)} parameters are missing, {len(wrong)} have another"
                f" shape, {(missing + wrong)[0]} among them",
                where=str(checkpoint.directory),
                remedy="the config.json that belongs to these weights",
            )
        dtypes = {tensor.dtype for parts in self._found.values() for tensor, _ in parts}
        self._dtype = self._found["language_model.embedding.word_embeddings.weight"][0][0].dtype
        if not dtypes <= FLOATS:
            raise CheckpointError(f"the weights are stored as {dtypes}", where=str(checkpoint.directory))

    @property
    def dtype(self) -> DType:
        return self._dtype

    @property
    def files(self) -> list[Path]:
        return self.checkpoint.files

    @property
    def io(self) -> Files:
        return self._files

    def pieces(self, name: str, first: int, last: int) -> list[Piece]:
        result: list[Piece] = []
        start = 0  # of the part's rows in the whole
        for tensor, index in self._found[name]:
            rows = tensor.shape[len(index)]
            low, high = max(first, start), min(last, start + rows)
            if low < high:
                result += self._part(tensor, index, low - start, high - start)
            start += rows
        return result

    def _part(self, tensor: StoredTensor, index: tuple[int, ...], first: int, last: int) -> list[Piece]:
        pieces = tensor.pieces(index, first, last, self._files)
        if tensor.dtype == self._dtype:
            return pieces
        shape = (last - first, *tensor.shape[len(index) + 1 :])
        return [
            Computed(
                prod(shape) * self._dtype.itemsize,
                lambda: read_tensor(pieces, self._files, shape, tensor.dtype).to(self._dtype.torch),
            )
        ]


def _fits(parts: Sequence[tuple[StoredTensor, tuple[int, ...]]], shape: Shape) -> bool:
    """Rows may be more than asked for: vocabularies are padded so that ranks share them evenly."""
    rows = sum(tensor.shape[len(index)] for tensor, index in parts)
    rest = {tensor.shape[len(index) + 1 :] for tensor, index in parts}
    padded = any("word_embeddings" in tensor.key or "output_layer" in tensor.key for tensor, _ in parts)
    return rest == {tuple(shape[1:])} and (rows == shape[0] or (padded and rows > shape[0]))
