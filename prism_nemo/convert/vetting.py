"""Checkpoints of others, looked through before Megatron loads them: nothing in them may run.

A `torch_dist` folder holds pickles that torch and Megatron load with all of pickle's power: the index (`.metadata`), every object
of the `.distcp` files (Transformer Engine's FP8 history, which holds another pickle), and `common.pt` where the environment says
so. Here each is read by an unpickler that knows the few types which have a place there and calls nothing else. What passes means
the same to the loaders behind it, so a pickle that would run something is refused before they see it.

Whoever can change the files between the two readings is not kept out: load what lies where only you can write.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from prism_nemo.convert.dtypes import BY_NAME
from prism_nemo.convert.torch_dist import COMMON, CONFIG, TorchDistCheckpoint
from prism_nemo.errors import CheckpointError

_REMEDY = "load checkpoints that this project or Megatron wrote, from people you trust"
_OF_OBJECTS = "/shard_"  # in the key of every object that Megatron saves; no tensor's key has it
_MAX_OBJECT_BYTES = 64 << 20
_MAX_COMMON_BYTES = 1 << 30
_FOUND = re.compile(r"(?:Trying to load unsupported GLOBAL|Unsupported (?:global|class|operand)|WeightsUnpickler error:)[^\n]*")
_RECIPES = ("transformer_engine", "transformer_engine.common.recipe", "megatron.core.extensions.transformer_engine")
_RECIPE_TYPES = (
    "TEDelayedScaling",
    "DelayedScaling",
    "Float8BlockScaling",
    "Float8CurrentScaling",
    "Format",
    "MMParams",
    "MXFP4QATFloat8BlockScaling",
    "MXFP4QATMXFP8BlockScaling",
    "MXFP8BlockScaling",
    "NVFP4BlockScaling",
    "QParams",
    "_FormatHelper",
    "_OverrideLinearPrecision",
)


def load_plain(source: Path | bytes, *, max_bytes: int = _MAX_COMMON_BYTES) -> Any:
    """What `torch.save` wrote, tensors and plain types alone, on the CPU; FileNotFoundError, or ValueError for anything else.

    Entries of the archive must be stored as they are, as torch stores them: compressed ones may grow a thousandfold.
    """
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    if size > max_bytes:
        raise ValueError(f"it has {size} bytes, the limit is {max_bytes}")
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise ValueError("its archive is compressed")
            if sum(entry.file_size for entry in entries) > size:
                raise ValueError("its archive says that it is larger than it is")
        if isinstance(file, io.BytesIO):
            file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
    except (FileNotFoundError, ValueError):
        raise
    except Exception as error:  # decoders of foreign bytes raise anything
        raise ValueError(_first_sentence(error)) from error


def vet_checkpoint(directory: Path) -> TorchDistCheckpoint:
    """Reads all of a checkpoint that any loading unpickles, but for objects; CheckpointError for what has no place there."""
    _vet_format(directory / CONFIG)
    checkpoint = TorchDistCheckpoint(directory)
    strange = sorted(key for key in checkpoint.objects if _OF_OBJECTS not in key)
    if strange:  # torch would unpickle it where a tensor is asked for
        raise CheckpointError(f"`{strange[0]}` is an object, not a tensor", where=str(directory), remedy=_REMEDY)
    try:
        load_plain(directory / COMMON)
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{COMMON} cannot be read safely: {error}", where=str(directory), remedy=_REMEDY) from error
    return checkpoint


def vet_objects(checkpoint: TorchDistCheckpoint, keys: Iterable[str]) -> None:
    """Looks through objects that are about to be loaded; keys that the checkpoint lacks are the loader's matter."""
    for key in keys:
        for path, offset, length in checkpoint.object_places.get(key, ()):
            try:
                if length > _MAX_OBJECT_BYTES:
                    raise ValueError(f"it has {length} bytes, the limit is {_MAX_OBJECT_BYTES}")
                with path.open("rb") as file:
                    file.seek(offset)
                    _vet_object(load_plain(file.read(length)))
            except (ValueError, OSError) as error:
                raise CheckpointError(f"`{key}` cannot be read safely: {error}", where=str(path), remedy=_REMEDY) from error


def _vet_format(config: Path) -> None:
    """Megatron has loaders for other formats too, which unpickle more."""
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
        backends = content["sharded_backend"], content.get("common_backend", "torch")
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("the checkpoint does not say its format", where=str(config), remedy=_REMEDY) from error
    if backends != ("torch_dist", "torch"):
        raise CheckpointError(
            f"the checkpoint's format is {backends[0]!r:.40} with {backends[1]!r:.40}", where=str(config), remedy="use torch_dist"
        )


def _vet_object(content: Any) -> None:
    """Transformer Engine unpickles the bytes of an extra state."""
    if isinstance(content, list):
        for part in content:
            _vet_object(part)
    elif isinstance(content, torch.Tensor) and content.dtype == torch.uint8 and content.numel():
        try:
            _HistoryUnpickler(io.BytesIO(content.numpy().tobytes())).load()
        except Exception as error:
            raise ValueError(_first_sentence(error)) from error
    elif content is not None and not (isinstance(content, torch.Tensor) and not content.numel()):
        raise ValueError(f"it holds {type(content).__name__}")


class _Stand:
    """For the types of Transformer Engine's recipes: made of anything, and cannot be called."""

    def __new__(cls, *_: Any, **__: Any) -> _Stand:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...


def _member(owner: Any, name: Any) -> _Stand:
    """How some Pythons pickle a member of an enumeration."""
    if not (isinstance(owner, type) and issubclass(owner, _Stand)) or not isinstance(name, str) or not name.isupper():
        raise pickle.UnpicklingError("getattr of what is no enumeration")
    return _Stand()


class _HistoryUnpickler(pickle.Unpickler):
    """FP8 scales and their recipe, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in BY_NAME:
            return BY_NAME[name]
        if module in _RECIPES and name in _RECIPE_TYPES:
            return type(name, (_Stand,), {})
        known: dict[tuple[str, str], Any] = {
            ("torch._utils", "_rebuild_tensor_v2"): lambda *_: None,
            ("torch.storage", "_load_from_bytes"): load_plain,
            ("torch", "device"): lambda *_: None,
            ("collections", "OrderedDict"): OrderedDict,
            ("builtins", "getattr"): _member,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in an FP8 history")
        return known[module, name]


def _first_sentence(error: BaseException) -> str:
    """Of torch's messages the part that says what was found; the rest is advice to switch the check off."""
    text = str(error)
    reason = _FOUND.search(text)
    lines = re.split(r" was not an allowed| whose module| by default", reason[0] if reason else text)[0].splitlines()
    return (lines[0].strip()[:200] if lines else "") or type(error).__name__
