"""Streamed checkpoints against Megatron's own: the same keys, shapes and values, read and written without a model."""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.qwen3_vl_configs import OFFICIAL, official_config
from helpers.rows import one_rank
from helpers.saving import save_model
from helpers.tiny import tiny_model
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from prism_nemo.config.enums import Precision
from prism_nemo.config.schema import DiscriminatorConfig, ModelConfig, ParallelConfig
from prism_nemo.convert import manifest
from prism_nemo.convert.commands import export_hf, import_hf, upcycle_hf
from prism_nemo.convert.dtypes import BFLOAT16, BY_NAME, FLOAT32, DType
from prism_nemo.convert.hf_reader import HFReader
from prism_nemo.convert.inspect import describe
from prism_nemo.convert.ops import GateUp, MergeQKV, RowRun, VisionQKV
from prism_nemo.convert.pieces import Files, rows_to_hf, tensor_bytes
from prism_nemo.convert.plans import plan_checkpoint, plan_hf
from prism_nemo.convert.qwen3_vl import hf_shapes
from prism_nemo.convert.sources import CheckpointSource
from prism_nemo.convert.torch_dist import (
    Stored,
    StoredTensor,
    TorchDistCheckpoint,
    WrittenTensor,
    empty_object,
    read_content,
    write_index,
)
from prism_nemo.convert.torch_zip import TensorArchive, locate_tensor
from prism_nemo.errors import CheckpointError
from prism_nemo.models.base import TrainableModel
from prism_nemo.models.discriminator import DiscriminatorModel
from prism_nemo.models.policy import PolicyModel
from prism_nemo.models.weights import canonical_parameters

KINDS = ("dense", "tied", "experts", "discriminator")


def source_of(kind: str) -> Path:
    return tiny_model(experts=kind == "experts", tied=kind == "tied").directory


def build(kind: str, path: Path) -> TrainableModel:
    if kind == "discriminator":
        config = DiscriminatorConfig(path=str(path), precision=Precision.fp32)
        return DiscriminatorModel(config, ParallelConfig(), one_rank(), seed=7)
    return PolicyModel(ModelConfig(path=str(path), precision=Precision.fp32), ParallelConfig(), one_rank())


def stream(kind: str, out: Path) -> Path:
    """The streamed checkpoint's folder."""
    if kind == "discriminator":
        upcycle_hf(source_of(kind), out, DiscriminatorConfig(), seed=7)
        return out / "discriminator"
    import_hf(source_of(kind), out)
    return out


def index_of(directory: Path) -> tuple[dict[str, Any], set[str]]:
    """Shape, type and chunks by key, and the keys of objects, as torch reads them."""
    metadata = FileSystemReader(directory).read_metadata().state_dict_metadata
    objects = {key for key, entry in metadata.items() if isinstance(entry, BytesStorageMetadata)}
    tensors = {
        key: (
            tuple(entry.size),
            entry.properties.dtype,
            sorted((tuple(chunk.offsets), tuple(chunk.sizes)) for chunk in entry.chunks),
        )
        for key, entry in metadata.items()
        if not isinstance(entry, BytesStorageMetadata)
    }
    return tensors, objects


@pytest.mark.parametrize("kind", KINDS)
def test_the_index_is_what_megatron_writes(kind: str, tmp_path: Path) -> None:
    streamed = stream(kind, tmp_path / "streamed")
    save_model(tmp_path / "saved", build(kind, source_of(kind)).chunks, None)
    assert index_of(streamed) == index_of(tmp_path / "saved")
    assert json.loads((streamed / "metadata.json").read_text()) == json.loads((tmp_path / "saved/metadata.json").read_text())
    assert read_content(streamed) == read_content(tmp_path / "saved") == {"optimizer_updates": 0}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_loads_the_stream_as_it_loads_the_source(kind: str, tmp_path: Path) -> None:
    """For the discriminator: upcycling in memory and streamed are the same, noise and all."""
    streamed = stream(kind, tmp_path / "out")
    expected, found = build(kind, source_of(kind)), build(kind, streamed)
    before, after = (canonical_parameters(model.chunks, model.hf_config) for model in (expected, found))
    assert before.keys() == after.keys() and len(before) > 90
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_megatron_saved_is_exported(kind: str, tmp_path: Path) -> None:
    model = build(kind, source_of(kind))
    save_model(tmp_path / "saved", model.chunks, None)
    model.save_assets(tmp_path / "saved" / "hf")
    manifest.seal(tmp_path / "saved")
    export_hf(tmp_path / "saved", tmp_path / "hf")
    written = load_file(tmp_path / "hf" / "model.safetensors")
    if kind != "discriminator":
        with HFReader(source_of(kind)) as reader:
            assert written.keys() == reader.names
            fused = ".mlp.experts."
            for name, tensor in written.items():
                expected = reader.get(name)
                assert torch.equal(tensor, expected.transpose(1, 2) if fused in name else expected), name
    else:
        assert torch.equal(written["value_head.weight"], model.module.score_head.weight)
        import_hf(tmp_path / "hf", tmp_path / "again")
        again = build(kind, tmp_path / "again")
        before, after = (canonical_parameters(each.chunks, each.hf_config) for each in (model, again))
        assert [name for name in before if not torch.equal(before[name], after[name])] == []


class Nothing:
    """A source without values, which a plan does not need."""

    def __init__(self) -> None:
        self.dtype, self.io = BFLOAT16, Files()
        self.files: list[Path] = []

    def pieces(self, name: str, first: int, last: int) -> Any:
        raise AssertionError("values are not needed to plan")


@pytest.mark.parametrize("size", OFFICIAL)
def test_all_official_sizes_are_accounted_for_in_both_directions(size: str) -> None:
    """Names and shapes alone: every element of the checkpoint has one place, every HuggingFace tensor comes back."""
    config = official_config(size)
    shapes = hf_shapes(config)

    plan = plan_checkpoint(Nothing(), config)
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert sum(torch.Size(tensor.sizes).numel() for tensor in plan.tensors) == total
    by_key: dict[str, list[Any]] = {}
    for tensor in plan.tensors:
        by_key.setdefault(tensor.key, []).append(tensor)
    for key, chunks in by_key.items():
        assert sum(torch.Size(chunk.sizes).numel() for chunk in chunks) == torch.Size(chunks[0].shape).numel(), key
        assert len({chunk.offsets for chunk in chunks}) == len(chunks), key
    ends: dict[str, int] = {}
    for tensor in plan.tensors:
        name, offset, length = tensor.place
        assert offset >= ends.get(name, 0), "archives do not overlap"
        ends[name] = offset + length
    assert ends == {file.name: file.size for file in plan.files}

    stored = TorchDistCheckpoint.__new__(TorchDistCheckpoint)
    stored.directory, stored.objects = Path(), set(plan.objects)
    stored.tensors = {
        key: StoredTensor(
            key,
            chunks[0].shape,
            chunks[0].dtype,
            tuple(Stored(Path(c.place[0]), c.place[1], c.place[2], c.offsets, c.sizes, c.dtype) for c in chunks),
        )
        for key, chunks in by_key.items()
    }
    back = plan_hf(CheckpointSource(stored, config), config)
    written: dict[str, tuple[int, ...]] = {}
    for file in back.files:
        header = json.loads(file.header[8:])
        written |= {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    assert written == shapes
    assert back.total_bytes == 2 * total
    assert set(back.weight_map) == set(shapes)


@pytest.mark.parametrize("dtype", [BFLOAT16, FLOAT32])
@pytest.mark.parametrize("shape", [(3, 2), (1, 1, 7, 5), (70000, 1), (4,), (0, 3), ()])
def test_an_archive_is_one_that_torch_writes(shape: tuple[int, ...], dtype: DType) -> None:
    """Without the tensor's checksum, as torch writes it when told so; the rest of the archive has its checksums."""
    tensor = torch.randn(shape).to(dtype.torch)
    archive, content = TensorArchive(shape, dtype), bytes(tensor_bytes(tensor))
    before, after = archive.render()
    raw = before + content + after
    assert len(raw) == archive.total_bytes and len(before) == archive.data_offset
    loaded = torch.load(io.BytesIO(raw), weights_only=True)
    assert loaded.dtype == dtype.torch and loaded.shape == tensor.shape and torch.equal(loaded, tensor)
    theirs, unchecked = io.BytesIO(), io.BytesIO()
    torch.save(tensor, theirs)
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensor, unchecked)
    finally:
        torch.serialization.set_crc32_options(True)
    ours = zipfile.ZipFile(io.BytesIO(raw))
    assert ours.getinfo("archive/data/0").CRC == zipfile.ZipFile(unchecked).getinfo("archive/data/0").CRC == 0
    for name in set(ours.namelist()) - {"archive/data/0"}:
        ours.read(name)  # BadZipFile where a checksum is wrong
    for stream in (io.BytesIO(raw), theirs, unchecked):
        start = locate_tensor(stream, shape, dtype)
        assert stream.getvalue()[start : start + len(content)] == content
    described = (pickletools.optimize(zipfile.ZipFile(each).read("archive/data.pkl")) for each in (io.BytesIO(raw), theirs))
    assert next(described) == next(described)


def test_torch_reads_the_archive_of_an_object() -> None:
    for weights_only in (True, False):
        assert torch.load(io.BytesIO(empty_object()), weights_only=weights_only) == [None]


def test_the_index_is_the_object_that_torch_would_pickle(tmp_path: Path) -> None:
    """Attribute for attribute: what is unpickled equals the same index built of torch's own classes."""
    large = 1 << 40
    tensors = [
        WrittenTensor("a", (2, 300), BFLOAT16, (0, 0), (1, 300), ("f", 70000, 1 << 31)),
        WrittenTensor("a", (2, 300), BFLOAT16, (1, 0), (1, 300), ("g", large, 600)),
        WrittenTensor("b", (), FLOAT32, (), (), ("f", 255, 256)),
    ]
    write_index(tmp_path, tensors, ["c"], ("f", 0, 65535))
    contiguous = torch.contiguous_format
    a, b = (TensorProperties(dtype, torch.strided, False, contiguous, False) for dtype in (torch.bfloat16, torch.float32))
    parts = [ChunkStorageMetadata(torch.Size(t.offsets), torch.Size(t.sizes)) for t in tensors]
    expected = Metadata(
        {
            "a": TensorStorageMetadata(a, torch.Size((2, 300)), parts[:2]),
            "b": TensorStorageMetadata(b, torch.Size(()), parts[2:]),
            "c": BytesStorageMetadata(),
        },
        storage_data={
            MetadataIndex("a", (0, 0), 0): _StorageInfo("f", 70000, 1 << 31),
            MetadataIndex("a", (1, 0), 1): _StorageInfo("g", large, 600),
            MetadataIndex("b", (), 0): _StorageInfo("f", 255, 256),
            MetadataIndex("c"): _StorageInfo("f", 0, 65535),
        },
        storage_meta=StorageMeta(),
        version="1.0.0",
    )
    found = pickle.loads((tmp_path / ".metadata").read_bytes())
    assert found == expected
    assert [vars(key) for key in found.storage_data] == [vars(key) for key in expected.storage_data]
    assert [type(key.offset) for key in found.storage_data] == [torch.Size] * 3 + [type(None)]
    assert vars(found).keys() == vars(pickle.loads(pickle.dumps(expected))).keys()


def test_a_tensor_that_is_not_what_the_index_says_is_refused() -> None:
    stream = io.BytesIO()
    torch.save(torch.ones(2, 3), stream)
    for shape, dtype in (((3, 2), FLOAT32), ((2, 3), BY_NAME["int32"])):
        with pytest.raises(ValueError, match="instead of"):
            locate_tensor(stream, shape, dtype)
    transposed = io.BytesIO()
    torch.save(torch.ones(3, 2).T, transposed)
    with pytest.raises(ValueError, match="stride"):
        locate_tensor(transposed, (2, 3), FLOAT32)


def test_rows_of_ops() -> None:
    """By hand: two groups of two query heads, a key and a value head, of one row each."""
    qkv = MergeQKV(num_heads=4, num_kv_heads=2, head_dim=1)
    assert qkv.row_order(4, 2, 2) == (
        RowRun(0, 0, 2),
        RowRun(1, 0, 1),
        RowRun(2, 0, 1),
        RowRun(0, 2, 2),
        RowRun(1, 1, 1),
        RowRun(2, 1, 1),
    )
    assert rows_to_hf(qkv, (4, 2, 2)) == (
        (RowRun(0, 0, 2), RowRun(0, 4, 2)),
        (RowRun(0, 2, 1), RowRun(0, 6, 1)),
        (RowRun(0, 3, 1), RowRun(0, 7, 1)),
    )
    assert GateUp().row_order(3, 3) == (RowRun(0, 0, 3), RowRun(1, 0, 3))
    vision = VisionQKV(num_heads=2, head_dim=2)
    assert [run.start for run in vision.row_order(12)] == [0, 4, 8, 2, 6, 10]


class Evil:
    def __reduce__(self) -> Any:
        return print, ("executed",)


def test_an_index_with_code_in_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match=r"builtins\.print has no place in a checkpoint's index"):
        TorchDistCheckpoint(tmp_path)
    assert capsys.readouterr().out == ""


def test_a_changed_byte_shows_in_verify_and_a_cut_file_everywhere(tmp_path: Path) -> None:
    from prism_nemo.convert.verify import verify

    streamed = stream("dense", tmp_path / "out")
    assert verify(source_of("dense"), streamed, outputs=False).same
    (file,) = streamed.glob("*.distcp")
    content = bytearray(file.read_bytes())
    place = TorchDistCheckpoint(streamed).tensors["language_model.decoder.final_layernorm.weight"].chunks[0]
    content[place.start] ^= 1
    file.write_bytes(content)
    verdict = verify(source_of("dense"), streamed, outputs=False)
    assert verdict.different == ["language_model.decoder.final_layernorm.weight"]
    assert verdict.damaged == [f"damaged: {file.name} is not what was written"]
    assert describe(streamed).whole  # sizes alone
    assert describe(streamed, hashes=True).problems == verdict.damaged
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="truncated"):
        export_hf(streamed, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_the_manifest_tells_what_is_gone(tmp_path: Path) -> None:
    for name in ("a", "hf/b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    manifest.seal(tmp_path)
    manifest.seal(tmp_path)  # once more: it does not list itself
    assert manifest.problems(tmp_path) == []
    shutil.rmtree(tmp_path / "hf")
    assert manifest.problems(tmp_path) == ["truncated: hf/b is missing, it had 4 bytes"]


def test_verify_sees_a_change_in_what_is_no_tensor(tmp_path: Path) -> None:
    """Of the same size, as a failing disk leaves it: the tensors are equal all the same."""
    from prism_nemo.convert.verify import verify

    streamed = stream("dense", tmp_path / "out")
    file = streamed / "common.pt"
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    verdict = verify(source_of("dense"), streamed, outputs=False)
    assert (verdict.different, verdict.damaged, verdict.same) == ([], ["damaged: common.pt is not what was written"], False)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside"])
@pytest.mark.parametrize("entry", ['{"bytes": 1, "blake2b": ""}', '{"bytes": 1e999, "blake2b": ""}'])
def test_a_manifest_names_no_files_outside(name: str, entry: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(f'{{"{name}": {entry}}}')
    assert manifest.problems(tmp_path) == ["incomplete: its manifest is not JSON that lists its files"]
