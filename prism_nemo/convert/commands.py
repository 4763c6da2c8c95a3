"""`prism-nemo convert`: checkpoints from and to HuggingFace directories."""

from __future__ import annotations

import shutil
from pathlib import Path

from prism_nemo.config.schema import Device, ParallelConfig, Precision, RuntimeConfig
from prism_nemo.convert.hf import HFReader, HFWriter, copy_assets, hf_assets_directory, load_model_config
from prism_nemo.engine.checkpoint import is_model_checkpoint, save_model, seal
from prism_nemo.engine.runtime import session
from prism_nemo.errors import CheckpointError
from prism_nemo.models.policy import PolicyModel, PolicyModule
from prism_nemo.models.qwen3_vl.config import Qwen3VLShape
from prism_nemo.models.weights import export_hf_tensors, load_weights
from prism_nemo.run_directory import resolve_model_directory

_PRECISIONS = {"F32": Precision.fp32, "BF16": Precision.bf16}


def import_hf(hf: Path, out: Path) -> None:
    """Writes a checkpoint of this project, in the weights' own precision, from a HuggingFace directory.

    Raises CheckpointError when `out` exists, and for whatever is wrong with the directory. Nothing is left behind on failure.
    """
    _refuse_existing(out)
    config = load_model_config(hf)
    precision = _stored_precision(hf)
    parallel = ParallelConfig()
    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        with session(parallel, RuntimeConfig(device=Device.auto)):
            module = PolicyModule(Qwen3VLShape.from_hf(config), parallel, precision)
            load_weights(module, hf, config)
            save_model(staging, module, None)
        copy_assets(hf, staging / "hf", dtype=module.config.params_dtype)
        seal(staging)
        staging.rename(out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def export_hf(checkpoint: Path, out: Path) -> None:
    """Writes a HuggingFace directory (Hub layout, tokenizer and processor included) from a policy's checkpoint.

    `checkpoint` may be a run, its `checkpoints`, a step, or the policy's own folder. Raises CheckpointError when `out` exists and
    when the checkpoint is incomplete.
    """
    directory = resolve_model_directory(checkpoint, PolicyModel.name)
    if not is_model_checkpoint(directory):
        raise CheckpointError("there is no checkpoint", where=str(directory), remedy="give a run, a step or a policy folder")
    config = load_model_config(directory)
    parallel = ParallelConfig()
    precision = Precision.bf16 if config["text_config"].get("dtype") == "bfloat16" else Precision.fp32
    with session(parallel, RuntimeConfig(device=Device.auto)), HFWriter(out) as writer:
        module = PolicyModule(Qwen3VLShape.from_hf(config), parallel, precision)
        load_weights(module, directory, config)
        for name, tensor in export_hf_tensors(module, config):
            writer.add(name, tensor)
        copy_assets(hf_assets_directory(directory), writer.staging, dtype=module.config.params_dtype)
        writer.finish()


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise CheckpointError("the target exists", where=str(out), remedy="choose another --out, or remove it")


def _stored_precision(hf: Path) -> Precision:
    with HFReader(hf) as reader:
        dtypes = {reader.dtype(name) for name in reader.names}
    if len(dtypes) != 1 or not dtypes <= _PRECISIONS.keys():
        found = ", ".join(sorted(dtypes))
        raise CheckpointError(f"the weights are stored as {found}", where=str(hf), remedy="all in float32, or all in bfloat16")
    return _PRECISIONS[dtypes.pop()]
