"""Pickles in checkpoints of others: what would run something is refused, and what checkpoints hold is let through."""

from __future__ import annotations

import importlib
import io
import os
import pickle
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from prism_nemo.convert.torch_dist import WrittenTensor, write_index
from prism_nemo.convert.vetting import load_plain, vet_checkpoint, vet_objects
from prism_nemo.errors import CheckpointError

KEY = "decoder.layers.mlp.linear_fc1._extra_state/shard_0_1"


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


class Calls:
    """Its pickle calls a function by its name."""

    def __init__(self, module: str, name: str, *arguments: Any) -> None:
        self.call = getattr(importlib.import_module(module), name), arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture
def bomb(tmp_path: Path) -> Any:
    marker = tmp_path / "it ran"
    pickle.loads(pickle.dumps(Bomb(marker)))
    assert marker.exists(), "it works"
    marker.rmdir()
    yield Bomb(marker)
    assert not marker.exists()


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def as_bytes(value: object) -> torch.Tensor:
    """How Transformer Engine keeps what it has seen."""
    return torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)


def with_object(directory: Path, content: bytes, *, key: str = KEY, file: str = "__0_0.distcp") -> Path:
    """A checkpoint without tensors and with one object."""
    directory.mkdir(exist_ok=True)
    (directory / "__0_0.distcp").write_bytes(b"before it" + content)
    no_tensors: list[WrittenTensor] = []
    write_index(directory, no_tensors, [key], (file, 9, len(content)))
    return directory


@pytest.mark.parametrize("legacy", [False, True])
def test_load_plain(legacy: bool, tmp_path: Path, bomb: Bomb) -> None:
    for value, usable in (({"weight": torch.ones(2)}, True), (bomb, False), ({"a": [bomb]}, False)):
        file = tmp_path / "file.pt"
        torch.save(value, file, _use_new_zipfile_serialization=not legacy)
        if usable:
            assert torch.equal(load_plain(file)["weight"], torch.ones(2))
            assert torch.equal(load_plain(file.read_bytes())["weight"], torch.ones(2))
        else:
            with pytest.raises(ValueError, match=r"GLOBAL posix\.mkdir"):
                load_plain(file)


def test_the_environment_cannot_switch_it_off(bomb: Bomb, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(ValueError, match="mkdir"):
        load_plain(saved(bomb))


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    """100 MB of zeros in 100 kB."""
    small = tmp_path / "small.pt"
    with zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps("text"))
        archive.writestr("archive/data/0", bytes(100_000_000))
    assert small.stat().st_size < 200_000
    with pytest.raises(ValueError, match="compressed"):
        load_plain(small)
    with pytest.raises(ValueError, match="the limit is 100"):
        load_plain(small, max_bytes=100)


@pytest.mark.parametrize("protocol", range(3, 6))
def test_a_history_of_scales_passes(protocol: int, tmp_path: Path) -> None:
    state = {"scale_fwd": torch.ones(3), "amax_history_fwd": torch.zeros(16, 3), "extra_fp8_variables": {"num_gemms": 1}}
    content = torch.frombuffer(bytearray(pickle.dumps(state, protocol)), dtype=torch.uint8)
    checkpoint = vet_checkpoint(with_object(tmp_path / "ok", saved([content])))
    vet_objects(checkpoint, [KEY, "not there/shard_0_1"])


# As Transformer Engine 2's: dataclasses of pydantic's, with enumerations of named tuples and parameters of their own.
RECIPES = """
from enum import Enum
from typing import NamedTuple
from pydantic.dataclasses import dataclass

class _FormatHelper(NamedTuple):
    max_fwd: float
    max_bwd: float

class Format(Enum):
    E4M3 = _FormatHelper(448, 448)
    HYBRID = _FormatHelper(448, 57344)

@dataclass(frozen=True)
class MMParams:
    use_split_accumulator: bool = True
    def __post_init__(self):
        object.__setattr__(self, "_cached_repr", "MMParams")

@dataclass(frozen=True)
class QParams:
    amax_epsilon: float = 0.0

class Recipe:
    pass

@dataclass(repr=False)
class DelayedScaling(Recipe):
    fp8_format: Format = Format.HYBRID
    amax_compute_algo: str = "max"

@dataclass(repr=False)
class Float8CurrentScaling(Recipe):
    fp8_format: Format = Format.HYBRID
    fp8_gemm_fprop: MMParams = MMParams(False)

@dataclass(repr=False)
class NVFP4BlockScaling(Recipe):
    fp4_format: Format = Format.E4M3
    def __post_init__(self):
        self.fp4_quant_fwd_inp = QParams(1.0)
"""


@pytest.mark.parametrize("name", ["DelayedScaling", "Float8CurrentScaling", "NVFP4BlockScaling"])
def test_a_recipe_passes(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Transformer Engine is not installed, too: nothing of it is imported or called."""
    pytest.importorskip("pydantic.dataclasses")
    names = ["transformer_engine", "transformer_engine.common", "transformer_engine.common.recipe"]
    for package in names:
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    module = sys.modules[names[-1]]
    exec(RECIPES, vars(module))
    content = as_bytes({"recipe": getattr(module, name)(), "extra_fp8_variables": {"fp8_checkpoint": True, "num_gemms": 1}})
    for package in names:
        monkeypatch.delitem(sys.modules, package)
    assert name.encode() in content.numpy().tobytes()
    vet_objects(vet_checkpoint(with_object(tmp_path / "ok", saved(content))), [KEY])


def test_objects_that_would_run(tmp_path: Path, bomb: Bomb) -> None:
    """The object itself, and the pickle in the bytes of the tensor in it, and the one in the bytes of a tensor in that."""
    nested = pickle.dumps(torch.zeros(1))
    storage = io.BytesIO()
    torch.save(bomb, storage, _use_new_zipfile_serialization=False)
    deepest = Calls("torch.storage", "_load_from_bytes", storage.getvalue())
    assert b"_load_from_bytes" in nested, "what a tensor's pickle calls"
    reach = Calls("builtins", "getattr", Calls("builtins", "str", "no enumeration"), "upper")
    for content in (bomb, [bomb], [as_bytes(bomb)], as_bytes({"recipe": bomb}), as_bytes(deepest), as_bytes(reach)):
        checkpoint = vet_checkpoint(with_object(tmp_path / "bad", saved(content)))
        with pytest.raises(CheckpointError, match="cannot be read safely") as caught:
            vet_objects(checkpoint, [KEY])
        assert len(str(caught.value)) < 600


def test_objects_that_nobody_asks_for_are_left_alone(tmp_path: Path, bomb: Bomb) -> None:
    vet_objects(vet_checkpoint(with_object(tmp_path / "bad", saved(bomb))), [])


def test_an_object_in_a_tensors_place(tmp_path: Path, bomb: Bomb) -> None:
    """torch unpickles what the index calls an object, whatever the model asks for."""
    with pytest.raises(CheckpointError, match="is an object, not a tensor"):
        vet_checkpoint(with_object(tmp_path / "bad", saved(bomb), key="decoder.final_layernorm.weight"))


def test_an_object_outside_the_checkpoint(tmp_path: Path, bomb: Bomb) -> None:
    (tmp_path / "outside").write_bytes(saved(bomb))
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        vet_checkpoint(with_object(tmp_path / "bad", b"", file="../outside"))


INDEXES = {
    "a call": lambda bomb: pickle.dumps(bomb),
    "a name within a name": lambda _: b"\x80\x04\x8c.torch.distributed.checkpoint.metadata\x8c\x11Metadata.__init__\x93.",
    "a list": lambda _: pickle.dumps([1, 2]),
    "no pickle": lambda _: b"not a pickle",
    "nothing": lambda _: b"",
    "deep": lambda _: b"(" * 1_000_000,
    "text that is none": lambda _: b"\x80\x04\x8c\x02\xff\xfe.",
    "a huge count": lambda _: b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fx.",
}


@pytest.mark.parametrize("case", INDEXES)
def test_indexes(case: str, tmp_path: Path, bomb: Bomb) -> None:
    directory = with_object(tmp_path / "bad", saved([None]))
    (directory / ".metadata").write_bytes(INDEXES[case](bomb))
    with pytest.raises(CheckpointError, match="index"):
        vet_checkpoint(directory)


@pytest.mark.parametrize(
    "text", ['{"sharded_backend": "zarr"}', '{"sharded_backend": "torch_dist", "common_backend": "x"}', "[]", "["]
)
def test_other_formats_have_loaders_that_are_not_vetted(text: str, tmp_path: Path) -> None:
    directory = with_object(tmp_path / "bad", saved([None]))
    (directory / "metadata.json").write_text(text)
    with pytest.raises(CheckpointError, match="format"):
        vet_checkpoint(directory)


def test_common_state_that_would_run(tmp_path: Path, bomb: Bomb) -> None:
    directory = with_object(tmp_path / "bad", saved([None]))
    torch.save(bomb, directory / "common.pt")
    with pytest.raises(CheckpointError, match=r"common.pt cannot be read safely: .* posix\.mkdir"):
        vet_checkpoint(directory)
