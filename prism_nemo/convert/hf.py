"""HuggingFace model directories: lazy reading, streaming writing, and the files that go along with the weights.

Weights are read and written tensor by tensor. Reading checks names, shapes and files before the first tensor; writing happens in
a hidden directory beside the target, which takes the target's name only when all of it is on disk.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from prism_nemo.convert.dtypes import DType
from prism_nemo.convert.files import (
    INDEX_FILE,
    WEIGHTS_FILE,
    read_json,
    save_weights,
    sync,
    write_json,
)
from prism_nemo.convert.hf_reader import HFReader, has_score_head
from prism_nemo.convert.ops import Sharding
from prism_nemo.convert.qwen3_vl import (
    MODEL_TYPES,
    Config,
    ExpertLayout,
    ParameterMapping,
    check_expert_layouts_differ,
    hub_config,
    mappings,
)
from prism_nemo.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "HFReader",
    "HFWriter",
    "copy_assets",
    "export_rows",
    "export_tensors",
    "has_score_head",
    "hf_assets_directory",
    "import_tensors",
    "load_model_config",
]

CONFIG_FILE = "config.json"
ASSET_FILES = (  # what `copy_assets` carries along besides config.json: never weights, never code
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)


class HFWriter:
    """Writes a HuggingFace directory: `add` every tensor, put other files into `staging`, `finish`.

    The target appears only in `finish`, complete; a writer that dies leaves no target, at most a hidden `.<name>.<id>.incomplete`
    beside it. As a context manager it cleans that up too. Memory: one shard. `dtype`: floating-point tensors are cast to it.
    Raises CheckpointError when the target exists and is not an empty directory.
    """

    def __init__(self, directory: Path, *, max_shard_bytes: int = 5_000_000_000, dtype: torch.dtype | None = None) -> None:
        self.directory = directory
        self._max_shard_bytes = max_shard_bytes
        self._dtype = dtype
        self._check_target()
        directory.parent.mkdir(parents=True, exist_ok=True)
        self.staging = directory.parent / f".{directory.name}.{secrets.token_hex(4)}.incomplete"
        self.staging.mkdir()
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []  # names in each shard written
        self._total_bytes = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor. It may be kept until its shard is full: do not change it before `finish`."""
        assert name not in self._pending and not any(name in shard for shard in self._shards), f"{name} is written twice"
        cast = self._dtype is not None and tensor.is_floating_point()
        tensor = tensor.detach().to(device="cpu", dtype=self._dtype if cast else tensor.dtype).contiguous()
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_shard_bytes:
            self._flush()
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write what is pending and the index, then give the directory its name."""
        self._flush()
        count = len(self._shards)
        assert count, "nothing was added"
        names = [WEIGHTS_FILE] if count == 1 else [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        for number, name in enumerate(names):
            _shard_path(self.staging, number).rename(self.staging / name)
        if count > 1:
            weight_map = {tensor: name for name, shard in zip(names, self._shards, strict=True) for tensor in shard}
            write_json(self.staging / INDEX_FILE, {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map})
        sync(self.staging)
        self._check_target()
        self.staging.rename(self.directory)
        sync(self.directory.parent)

    def discard(self) -> None:
        """Remove what was written so far."""
        shutil.rmtree(self.staging, ignore_errors=True)

    def _flush(self) -> None:
        if self._pending:
            save_weights(_shard_path(self.staging, len(self._shards)), self._pending)
            self._shards.append(list(self._pending))
            self._total_bytes += self._pending_bytes
            self._pending, self._pending_bytes = {}, 0

    def _check_target(self) -> None:
        if self.directory.exists() and not (self.directory.is_dir() and not any(self.directory.iterdir())):
            raise CheckpointError(
                "the target exists already", where=str(self.directory), remedy="another path, or remove it first"
            )

    def __enter__(self) -> HFWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.staging.exists():
            self.discard()
            assert kind is not None, "left without finish()"


def import_tensors(
    reader: HFReader,
    config: Config,
    *,
    padded_vocab_size: int | None = None,
    score_head: bool = False,
    wanted: Callable[[str], bool] | None = None,
) -> Iterator[tuple[str, Tensor, Sharding]]:
    """Check the directory, then yield (canonical Megatron name, full tensor, how to cut it), one tensor in memory at a time.

    `wanted` picks canonical names; others are not read. `score_head`: the directory holds a discriminator.
    """
    layout = reader.check(config, score_head=score_head)
    for mapping in mappings(config, layout=layout, padded_vocab_size=padded_vocab_size, score_head=score_head):
        for index, name in enumerate(mapping.megatron_names):
            if wanted is not None and not wanted(name):
                continue
            parts = [reader.get_slice(hf, index) if mapping.fused else reader.get(hf) for hf in mapping.hf_names]
            yield name, mapping.op.to_megatron(*parts), mapping.sharding


def export_tensors(
    config: Config,
    get_full: Callable[[str], Tensor],
    *,
    layout: ExpertLayout = ExpertLayout.hub,
    padded_vocab_size: int | None = None,
    score_head: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """(HuggingFace name, tensor) of all, at most one layer's experts in memory at a time.

    `get_full(name)` returns the full tensor of a canonical Megatron name. It is called once for each, always in the same order,
    so that it may gather over ranks. Raises CheckpointError for experts that transformers 5 would misread.
    """
    check_expert_layouts_differ(config)
    rows = mappings(config, layout=layout, padded_vocab_size=padded_vocab_size, score_head=score_head)
    return export_rows(rows, get_full)


def export_rows(rows: Iterable[ParameterMapping], get_full: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """`export_tensors` of these rows of the mapping."""
    for mapping in rows:
        if mapping.fused:
            yield mapping.hf_names[0], _fuse(mapping, get_full)
        else:
            yield from zip(mapping.hf_names, mapping.op.to_hf(get_full(mapping.megatron_names[0])), strict=True)


def hf_assets_directory(path: Path) -> Path:
    """Where a model's config.json, tokenizer and processor are: `path`, or `path`/hf in checkpoints of this project."""
    for directory in (path, path / "hf"):
        if (directory / CONFIG_FILE).is_file():
            return directory
    remedy = "a HuggingFace model directory, or a checkpoint directory of this project" if path.exists() else "the right path"
    raise CheckpointError("there is no config.json" if path.exists() else "no such directory", where=str(path), remedy=remedy)


def load_model_config(path: Path) -> dict[str, Any]:
    """The model's config.json in the Hub's form (see `hub_config`), of a HuggingFace directory or of our checkpoint."""
    file = hf_assets_directory(path) / CONFIG_FILE
    config = read_json(file)
    if config.get("model_type") not in MODEL_TYPES:
        raise CheckpointError(
            f"a model of type {config.get('model_type')!r} is not supported",
            where=str(file),
            remedy=f"a model of type {' or '.join(MODEL_TYPES)}",
        )
    return hub_config(config)


def copy_assets(source: Path, target: Path, *, config: Config | None = None, dtype: torch.dtype | DType | None = None) -> None:
    """Write config.json into `target` and copy tokenizer, processor, chat template and generation settings beside it.

    config.json takes the Hub's form, which transformers 4.57, 5.x and vLLM read alike. `config` replaces the source's (an
    upcycled model); `dtype` is what it then names as the weights' type. Weights and code are never copied.
    """
    assets = hf_assets_directory(source)
    config = hub_config(load_model_config(source) if config is None else config)
    if dtype is not None:
        for section in (config, config["text_config"], config["vision_config"]):
            section.pop("torch_dtype", None)  # the key's name before transformers 4.56
            section["dtype"] = str(dtype).removeprefix("torch.")
    target.mkdir(parents=True, exist_ok=True)
    write_json(target / CONFIG_FILE, config)
    for name in ASSET_FILES:
        if (assets / name).is_file():
            shutil.copyfile(assets / name, target / name)


def _fuse(mapping: ParameterMapping, get_full: Callable[[str], Tensor]) -> Tensor:
    """All experts in one tensor, filled one by one: a list to stack would hold them twice."""
    fused: Tensor | None = None
    for index, name in enumerate(mapping.megatron_names):
        (part,) = mapping.op.to_hf(get_full(name))
        if fused is None:
            fused = part.new_empty(mapping.hf_shapes[0])
        fused[index] = part
    assert fused is not None, "a layer without experts"
    return fused


def _shard_path(directory: Path, number: int) -> Path:
    return directory / f"shard-{number:05d}.safetensors"
