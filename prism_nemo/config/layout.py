"""Whether a model can be cut over the ranks as `parallel` says, from its `config.json` alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_nemo.config.schema import AlignConfig, DiscriminatorParallelConfig, ParallelConfig
from prism_nemo.errors import ConfigError, LayoutError
from prism_nemo.json_files import read_json_object
from prism_nemo.run_directory import resolve_model_directory

MODEL_TYPES = ("qwen3_vl", "qwen3_vl_moe")
TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
VPP = "parallel.virtual_pipeline_model_parallel_size"
FIRST_STAGE = "parallel.num_layers_in_first_pipeline_stage"
LAST_STAGE = "parallel.num_layers_in_last_pipeline_stage"
CP = "parallel.context_parallel_size"
EP = "parallel.expert_model_parallel_size"
ETP = "parallel.expert_tensor_parallel_size"


# Whose folder of a checkpoint a path may mean; a discriminator is upcycled from a policy.
MODEL_FOLDERS = {"model.path": ("policy",), "discriminator.path": ("discriminator", "policy")}


@dataclass(frozen=True)
class ModelSizes:
    """What a layout has to divide; `num_experts` is None without experts."""

    where: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    ffn_hidden_size: int
    vocab_size: int
    num_experts: int | None
    moe_ffn_hidden_size: int | None
    vision_heads: int
    vision_ffn_hidden_size: int


def read_model_sizes(path: Path, *, key: str) -> ModelSizes:
    """Reads `config.json` of a HuggingFace directory, or of one of our runs and checkpoints, where it lies below `hf/`.

    `key` is the configuration key that gave the path. Raises ConfigError when there is no such model.
    """
    if not path.is_dir():
        raise ConfigError(
            "the model directory does not exist",
            where=f"{key}: {path}",
            remedy="give the directory of a HuggingFace model or of a checkpoint",
        )
    path = next((folder for name in MODEL_FOLDERS[key] if (folder := resolve_model_directory(path, name)).name == name), path)
    file = (path / "hf" if (path / "hf").is_dir() else path) / "config.json"
    if not file.is_file():
        raise ConfigError(
            "the model directory has no config.json",
            where=f"{key}: {path}",
            remedy="give the directory that holds config.json, or a checkpoint directory with hf/config.json",
        )
    config = read_json_object(file, remedy="copy the model again", kind=ConfigError)
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ConfigError(
            f"{key} is a {model_type!r} model", where=str(file), remedy=f"use a Qwen3-VL ({' or '.join(MODEL_TYPES)})"
        )
    try:
        return model_sizes(config, str(file))
    except (KeyError, TypeError) as error:
        raise ConfigError(f"the model's configuration lacks {error}", where=str(file), remedy="copy the model again") from error


def check_parallel(parallel: ParallelConfig, world_size: int | None) -> None:
    """Raises LayoutError when the parallel sizes contradict each other or the number of ranks (None: not known yet)."""
    tp, ep = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    etp = parallel.expert_tensor_parallel_size
    if parallel.sequence_parallel and tp == 1:
        raise LayoutError(
            "sequence parallelism cuts along the tensor-parallel ranks, and there is one",
            where="parallel.sequence_parallel",
            remedy=f"set it to false, or {TP} to 2 or more",
        )
    if vpp is not None and pp == 1:
        raise LayoutError("virtual pipeline stages need a pipeline", where=VPP, remedy=f"set it to null, or {PP} to 2 or more")
    set_apart = (parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage)
    if pp == 1 and set_apart != (None, None):
        raise LayoutError(
            "layers of pipeline stages need a pipeline", where=f"{FIRST_STAGE}, {LAST_STAGE}", remedy=f"set {PP} to 2 or more"
        )
    if ep == 1 and etp not in (None, tp):
        raise LayoutError(
            f"experts that are not distributed are cut like everything else, over {tp} ranks, not over {etp}",
            where=ETP,
            remedy=f"set it to null, or {EP} to 2 or more",
        )
    if world_size is None:
        return
    model_ranks = tp * pp * parallel.context_parallel_size
    if world_size % model_ranks:
        raise LayoutError(
            f"{world_size} ranks cannot hold models of {model_ranks} ranks (tensor {tp} x pipeline {pp} x context "
            f"{parallel.context_parallel_size})",
            where=f"{TP}, {PP}, {CP}",
            remedy=f"start a multiple of {model_ranks} ranks, or lower the sizes",
        )
    expert_ranks = ep * (etp or (tp if ep == 1 else 1)) * pp
    if world_size % expert_ranks:
        raise LayoutError(
            f"{world_size} ranks cannot hold experts over {expert_ranks} ranks (expert {ep} x expert tensor "
            f"{expert_ranks // ep // pp} x pipeline {pp})",
            where=f"{EP}, {ETP}",
            remedy=f"start a multiple of {expert_ranks} ranks, or use an expert-parallel size that divides {world_size // pp}",
        )


def discriminator_layout(config: AlignConfig) -> ParallelConfig:
    """How the alignment game's discriminator is cut. Raises ConfigError for a layout that is given and not asked for."""
    own = config.discriminator_parallel
    if not own.as_policy:
        return own
    if own != DiscriminatorParallelConfig():
        raise ConfigError(
            "the discriminator is cut as the policy is, and a layout of its own is given",
            where="discriminator_parallel",
            remedy="set discriminator_parallel.as_policy=false, or leave its other keys out",
        )
    return config.parallel


def data_parallel_size(parallel: ParallelConfig, world_size: int) -> int:
    """How many copies of the model `world_size` ranks hold."""
    model_ranks = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    return world_size // model_ranks


def check_model(sizes: ModelSizes, parallel: ParallelConfig) -> None:
    """Raises LayoutError when the model cannot be cut so."""
    tp = parallel.tensor_model_parallel_size
    for name, size in (
        ("attention heads", sizes.num_heads),
        ("key/value heads", sizes.num_kv_heads),
        ("rows of the MLPs", sizes.ffn_hidden_size),
        ("vocabulary entries", sizes.vocab_size),
        ("vision attention heads", sizes.vision_heads),
        ("rows of the vision MLPs", sizes.vision_ffn_hidden_size),
    ):
        _require_division(size, tp, f"{size} {name} do not divide by a tensor-parallel size of {tp}", TP, sizes.where)
    _check_pipeline(sizes, parallel)
    if sizes.num_experts is not None and sizes.moe_ffn_hidden_size is not None:
        ep, width = parallel.expert_model_parallel_size, sizes.moe_ffn_hidden_size
        etp = parallel.expert_tensor_parallel_size or (tp if ep == 1 else 1)
        _require_division(
            sizes.num_experts,
            ep,
            f"{sizes.num_experts} experts do not divide by an expert-parallel size of {ep}",
            EP,
            sizes.where,
        )
        _require_division(
            width, etp, f"{width} rows of an expert do not divide by an expert-tensor-parallel size of {etp}", ETP, sizes.where
        )


def _check_pipeline(sizes: ModelSizes, parallel: ParallelConfig) -> None:
    """Every chunk of layers must hold as many as Megatron deals out, and at least one."""
    pp, vpp = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    if pp == 1:
        return
    where = f"{PP if vpp == 1 else VPP}, {sizes.where}"
    given = [parallel.num_layers_in_first_pipeline_stage, parallel.num_layers_in_last_pipeline_stage]
    set_apart = [layers for layers in given if layers is not None]
    left, stages = sizes.num_layers - sum(set_apart), pp - len(set_apart)
    if left < 0 or (stages == 0 and left) or (stages and left % stages):
        apart = f", {' and '.join(map(str, set_apart))} of them set apart," if set_apart else ""
        raise LayoutError(
            f"{sizes.num_layers} layers{apart} do not divide over {pp} pipeline stages",
            where=where if not set_apart else f"{FIRST_STAGE}, {LAST_STAGE}, {where}",
            remedy=f"use a size that divides {sizes.num_layers}, or other numbers in {FIRST_STAGE} and {LAST_STAGE}",
        )
    for layers in {*set_apart, *([left // stages] if stages else [])}:
        if layers == 0 or layers % vpp:
            raise LayoutError(
                f"{layers} layers of a pipeline stage do not divide into {vpp} virtual stages",
                where=where,
                remedy=f"use a divisor of {layers} for {VPP}, or fewer stages",
            )


def _require_division(size: int, by: int, what: str, key: str, model: str) -> None:
    if size % by:
        smaller = [divisor for divisor in range(1, by) if size % divisor == 0]
        raise LayoutError(what, where=f"{key}, {model}", remedy=f"use a divisor of {size}, such as {smaller[-1]}")


def model_sizes(config: dict[str, Any], where: str) -> ModelSizes:
    """The sizes of a parsed `config.json`; `where` names it in errors. Raises KeyError for what it lacks."""
    text, vision = config["text_config"], config["vision_config"]
    has_experts = config["model_type"] == "qwen3_vl_moe"
    num_experts = text.get("num_experts") or text.get("num_local_experts")  # transformers 5 saves the second name
    if has_experts and num_experts is None:
        raise KeyError("num_experts")
    return ModelSizes(
        where=where,
        num_layers=text["num_hidden_layers"],
        num_heads=text["num_attention_heads"],
        num_kv_heads=text["num_key_value_heads"],
        ffn_hidden_size=text["intermediate_size"],
        vocab_size=text["vocab_size"],
        num_experts=num_experts if has_experts else None,
        moe_ffn_hidden_size=text["moe_intermediate_size"] if has_experts else None,
        vision_heads=vision["num_heads"],
        vision_ffn_hidden_size=vision["intermediate_size"],
    )
