"""Checkpoints and model directories."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from helpers.hostile import MARKER, Bomb, case, command, refusal, refused_command
from helpers.rows import one_rank
from helpers.stages import tiny_task
from helpers.tiny import tiny_model
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from prism_nemo.config.enums import DecayStyle, Precision
from prism_nemo.config.schema import DataConfig, ModelConfig, OptimizerConfig, ParallelConfig
from prism_nemo.convert.hf_reader import HFReader
from prism_nemo.convert.manifest import MANIFEST, STEP_MANIFEST, seal
from prism_nemo.data.chat import ChatEncoder
from prism_nemo.engine.checkpoint import CheckpointStore
from prism_nemo.models.policy import PolicyModel
from prism_nemo.models.weights import load_weights

CHECKPOINT, MODEL = "checkpoint", "model directory"
STEP = "checkpoints/step_00000001"
DATA = DataConfig(max_prompt_length=64, max_response_length=32, system_prompt="<caption> <think> <answer>")
NORM = "language_model.decoder.final_layernorm.weight"


@cache
def policy() -> PolicyModel:
    model = PolicyModel(ModelConfig(path=str(tiny_model().directory), precision=Precision.fp32), ParallelConfig(), one_rank())
    model.build_optimizer(OptimizerConfig(lr=0.01, lr_decay_style=DecayStyle.constant), 100)
    return model


@cache
def saved_run() -> tuple[Path, tempfile.TemporaryDirectory[str]]:
    keep = tempfile.TemporaryDirectory(prefix="hostile-")
    CheckpointStore(Path(keep.name), one_rank(), keep_last_k=1).save(1, {"policy": policy()}, {})
    return Path(keep.name), keep


def saved(value: object) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


# A torch_dist checkpoint


def index_bomb(model: Path, bomb: Bomb) -> None:
    (model / ".metadata").write_bytes(pickle.dumps(bomb))


def common_bomb(model: Path, bomb: Bomb) -> None:
    (model / "common.pt").write_bytes(saved(bomb))


def compressed_common(model: Path, bomb: Bomb) -> None:
    with zipfile.ZipFile(model / "common.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50 << 20))


def tensor_bomb(model: Path, bomb: Bomb, file: str = "__0_0.distcp") -> None:
    """The index says that a tensor is an object, which torch unpickles wherever it is asked for."""
    index = pickle.loads((model / ".metadata").read_bytes())
    place = model / file
    offset = place.stat().st_size if place.exists() else 0
    content = saved(bomb)
    with place.open("ab") as opened:
        opened.write(content)
    index.state_dict_metadata[NORM] = BytesStorageMetadata()
    index.storage_data = {key: value for key, value in index.storage_data.items() if key.fqn != NORM}
    index.storage_data[MetadataIndex(NORM)] = _StorageInfo(file, offset, len(content))
    (model / ".metadata").write_bytes(pickle.dumps(index))


def zarr(model: Path, bomb: Bomb) -> None:
    (model / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr", "sharded_backend_version": 1}))


def deep_manifest(model: Path, bomb: Bomb) -> None:
    (model / MANIFEST).write_text("[" * 100_000)


TAMPERED: dict[str, Callable[[Path, Bomb], None]] = {
    "a pickle in the index that runs something": index_bomb,
    "a pickle in `common.pt` that runs something": common_bomb,
    "a compressed `common.pt`": compressed_common,
    "a pickle that runs something in a tensor's place": tensor_bomb,
    "a pickle in a file outside the checkpoint": lambda model, bomb: tensor_bomb(model, bomb, "../outside"),
    "a format whose loaders unpickle more (zarr)": zarr,
}


def of_checkpoint(tamper: Callable[[Path, Bomb], None]) -> Callable[[Path], str]:
    def attempt(folder: Path) -> str:
        copy = folder / "run"
        shutil.copytree(saved_run()[0], copy)
        model = copy / STEP / "policy"
        tamper(model, Bomb(folder))
        seal(model)
        return refusal(lambda: load_weights(policy().chunks, model, policy().hf_config))

    return attempt


for _given, _tamper in TAMPERED.items():
    case(CHECKPOINT, _given)(of_checkpoint(_tamper))


@case(CHECKPOINT, "a pickle that runs something in the generators' state, as a run resumes")
def _(folder: Path) -> str:
    copy = folder / "run"
    shutil.copytree(saved_run()[0], copy)
    torch.save(Bomb(folder), copy / STEP / "rng_0.pt")
    seal(copy / STEP, manifest=STEP_MANIFEST)
    return refusal(lambda: CheckpointStore(copy, one_rank(), keep_last_k=1).load({"policy": policy()}))


@case(CHECKPOINT, "a pickle in the index that runs something, as `convert inspect` looks at it", outcome="reported")
def _(folder: Path) -> str:
    copy = folder / "run"
    shutil.copytree(saved_run()[0] / STEP / "policy", copy)
    index_bomb(copy, Bomb(folder))
    _, shown = command("convert", "inspect", str(copy))
    return next(line for line in shown.splitlines() if "mkdir" in line)


# A HuggingFace directory


def model_copy(folder: Path) -> Path:
    shutil.copytree(tiny_model().directory, folder / "model")
    return folder / "model"


def read_weights(directory: Path) -> str:
    def read() -> None:
        with HFReader(directory) as reader:
            reader.check(json.loads((tiny_model().directory / "config.json").read_text()))

    return refusal(read)


@case(MODEL, "weights as a pickle (`pytorch_model.bin`) that runs something")
def _(folder: Path) -> str:
    model = model_copy(folder)
    (model / "model.safetensors").unlink()
    torch.save(Bomb(folder), model / "pytorch_model.bin")
    return read_weights(model)


@case(MODEL, "a discriminator's scalar head that runs something")
def _(folder: Path) -> str:
    model = model_copy(folder)
    torch.save({"weight": Bomb(folder)}, model / "value_head.bin")
    torch.save({"weight": Bomb(folder)}, model / "score.bin")
    from prism_nemo.convert.hf_reader import _load_head

    return refusal(lambda: _load_head(model / "score.bin"))


@case(MODEL, "an index of shards that names `../../secret`")
def _(folder: Path) -> str:
    model = model_copy(folder)
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    return read_weights(model)


def header(length: int, text: bytes) -> Callable[[Path], str]:
    def attempt(folder: Path) -> str:
        model = model_copy(folder)
        (model / "model.safetensors").write_bytes(length.to_bytes(8, "little") + text)
        return read_weights(model)

    return attempt


case(MODEL, "safetensors with a header of 9 EB")(header(2**63, b"{}"))
case(MODEL, "safetensors with a header nested 100,000 deep")(header(100_000, b"[" * 100_000))
LARGE = json.dumps({"a": {"dtype": "F32", "shape": [10**11], "data_offsets": [0, 4 * 10**11]}}).encode()
case(MODEL, "safetensors whose tensor is larger than its file")(header(len(LARGE), LARGE))


@case(MODEL, "a config.json nested 100,000 deep")
def _(folder: Path) -> str:
    model = model_copy(folder)
    (model / "config.json").write_text('{"a":' * 100_000)
    return refused_command("convert", "import", "--hf", str(model), "--out", str(folder / "out"))


def with_code(folder: Path) -> Path:
    """A tokenizer that asks for a class of a module beside it."""
    model = folder / "model"
    shutil.copytree(tiny_task().model, model)
    (model / "theirs.py").write_text(f"import os\nos.mkdir({str(folder / MARKER)!r})\nclass Theirs: pass\n")
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
        content = json.loads((model / name).read_text())
        content["auto_map"] = {
            kind: ["theirs.Theirs", "theirs.Theirs"] if kind == "AutoTokenizer" else "theirs.Theirs"
            for kind in ("AutoConfig", "AutoTokenizer", "AutoImageProcessor", "AutoProcessor", "AutoModel")
        }
        (model / name).write_text(json.dumps(content))
    return model


@case(MODEL, "code that config, tokenizer and processor ask for (`auto_map`)", outcome="not run")
def _(folder: Path) -> str:
    model = with_code(folder)
    ChatEncoder.from_directory(model, DATA, image_root=folder)
    return "loads as if it were not there"


@case(MODEL, "code that a tokenizer class of their own asks for", outcome="not run")
def _(folder: Path) -> str:
    model = with_code(folder)
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "TheirTokenizer"}))
    ChatEncoder.from_directory(model, DATA, image_root=folder)
    return "loads with the tokenizer of its files"


@case(MODEL, "a chat template that reaches for Python's objects")
def _(folder: Path) -> str:
    model = folder / "model"
    shutil.copytree(tiny_task().model, model)
    reach = (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}{{ cycler.__init__.__globals__.os.mkdir('" + str(folder / MARKER) + "') }}"
    )
    (model / "chat_template.jinja").write_text(reach)
    return refusal(lambda: ChatEncoder.from_directory(model, DATA, image_root=folder))
