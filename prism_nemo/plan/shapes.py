"""The shape of a Qwen3-VL as the planner needs it: numbers from a `config.json`, or one of the official sizes, without torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prism_nemo.config.layout import MODEL_TYPES
from prism_nemo.errors import ConfigError
from prism_nemo.json_files import read_json_object
from prism_nemo.run_directory import resolve_model_directory

# layers, hidden, intermediate, heads, key/value heads, tied, (experts, top-k, expert width), vision
_SMALL_VISION = (24, 1024, 4096, (5, 11, 17))  # depth, hidden, intermediate, deepstack layers
_LARGE_VISION = (27, 1152, 4304, (8, 16, 24))
_OFFICIAL: dict[str, tuple[int, int, int, int, int, bool, tuple[int, int, int] | None, tuple[int, int, int, tuple[int, ...]]]] = {
    "2B": (28, 2048, 6144, 16, 8, True, None, _SMALL_VISION),
    "4B": (36, 2560, 9728, 32, 8, True, None, _SMALL_VISION),
    "8B": (36, 4096, 12288, 32, 8, False, None, _LARGE_VISION),
    "32B": (64, 5120, 25600, 64, 8, False, None, _LARGE_VISION),
    "30B-A3B": (48, 2048, 6144, 32, 4, False, (128, 8, 768), _LARGE_VISION),
    "235B-A22B": (94, 4096, 12288, 64, 4, False, (128, 8, 1536), _LARGE_VISION),
}
OFFICIAL_SIZES = tuple(_OFFICIAL)
EXPERTS_PER_TOKEN = 2  # of a discriminator; `discriminator.moe_router_topk`


@dataclass(frozen=True)
class Vision:
    depth: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    patch_width: int  # values of one flattened patch
    merge: int  # patches of a visual token: merge * merge
    out_hidden_size: int
    num_position_embeddings: int
    num_deepstack: int

    @property
    def patches_per_token(self) -> int:
        return self.merge * self.merge


@dataclass(frozen=True)
class Experts:
    """The experts of every language layer."""

    count: int
    topk: int
    ffn_hidden_size: int


@dataclass(frozen=True)
class Shape:
    """One model. `config` is its `config.json`, for whoever needs more of it."""

    name: str
    config: Mapping[str, Any]
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    vision: Vision
    experts: Experts | None
    is_discriminator: bool = False  # no output weight; a scalar head

    @property
    def query_width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Of the keys; of the values it is the same."""
        return self.num_kv_heads * self.head_dim

    def as_discriminator(self, num_experts: int, topk: int = EXPERTS_PER_TOKEN) -> Shape:
        """The discriminator that sparse upcycling makes of this dense model; one expert leaves it dense."""
        if self.experts is not None:
            raise ConfigError(
                f"only a dense model can be upcycled, {self.name} has experts already",
                where="--discriminator",
                remedy="use a dense Qwen3-VL, such as 2B",
            )
        experts = Experts(num_experts, min(topk, num_experts), self.ffn_hidden_size) if num_experts > 1 else None
        name = f"{self.name} discriminator" + (f" with {num_experts} experts" if experts else "")
        return replace(self, name=name, experts=experts, is_discriminator=True)


def official_config(size: str) -> dict[str, Any]:
    """`config.json` of an official size, as far as shapes go."""
    layers, hidden, intermediate, heads, kv_heads, tied, experts, vision = _OFFICIAL[size]
    text: dict[str, Any] = {
        "vocab_size": 151936,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
    }
    if experts:
        text |= dict(zip(("num_experts", "num_experts_per_tok", "moe_intermediate_size"), experts, strict=True))
    depth, vision_hidden, vision_intermediate, deepstack = vision
    return {
        "model_type": "qwen3_vl_moe" if experts else "qwen3_vl",
        "tie_word_embeddings": tied,
        "text_config": text,
        "vision_config": {
            "depth": depth,
            "hidden_size": vision_hidden,
            "intermediate_size": vision_intermediate,
            "num_heads": 16,
            "in_channels": 3,
            "patch_size": 16,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": hidden,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": list(deepstack),
        },
    }


def read_shape(model: str, *, option: str = "--model") -> Shape:
    """The shape of an official size (`8B`, `Qwen3-VL-8B-Instruct`), or of a model directory or checkpoint of ours.

    Raises ConfigError, naming the sizes there are, when it is neither.
    """
    if Path(model).is_dir():
        return shape_of(_read_config(Path(model), option), Path(model).name)
    size = _official_size(model)
    if size is None:
        close = difflib.get_close_matches(model.upper(), OFFICIAL_SIZES, n=1)
        raise ConfigError(
            f"`{model}` is neither a directory nor an official size",
            where=option,
            remedy=(f"did you mean {close[0]}? " if close else "") + f"One of {', '.join(OFFICIAL_SIZES)}, or a model directory",
        )
    return shape_of(official_config(size), size)


def shape_of(config: Mapping[str, Any], name: str) -> Shape:
    """The shape in a parsed `config.json`. Raises ConfigError for another architecture, or when a number is missing."""
    if config.get("model_type") not in MODEL_TYPES:
        raise ConfigError(
            f"the model is a {config.get('model_type')!r}", where=name, remedy=f"use a Qwen3-VL ({' or '.join(MODEL_TYPES)})"
        )
    try:
        text, vision = config["text_config"], config["vision_config"]
        return Shape(
            name=name,
            config=config,
            num_layers=text["num_hidden_layers"],
            hidden_size=text["hidden_size"],
            ffn_hidden_size=text["intermediate_size"],
            num_heads=text["num_attention_heads"],
            num_kv_heads=text["num_key_value_heads"],
            head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
            vocab_size=text["vocab_size"],
            tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            vision=_vision(vision),
            experts=_experts(text) if config["model_type"] == "qwen3_vl_moe" else None,
        )
    except KeyError as error:
        raise ConfigError(f"the model's configuration lacks {error}", where=name, remedy="copy the model again") from error


def _vision(vision: Mapping[str, Any]) -> Vision:
    return Vision(
        depth=vision["depth"],
        hidden_size=vision["hidden_size"],
        ffn_hidden_size=vision["intermediate_size"],
        num_heads=vision["num_heads"],
        patch_width=vision.get("in_channels", 3) * vision["temporal_patch_size"] * vision["patch_size"] ** 2,
        merge=vision["spatial_merge_size"],
        out_hidden_size=vision["out_hidden_size"],
        num_position_embeddings=vision["num_position_embeddings"],
        num_deepstack=len(vision["deepstack_visual_indexes"]),
    )


def _experts(text: Mapping[str, Any]) -> Experts:
    count = text.get("num_experts") or text["num_local_experts"]  # transformers 5 saves the second name
    return Experts(count, text["num_experts_per_tok"], text["moe_intermediate_size"])


def _official_size(model: str) -> str | None:
    plain = re.sub(r"^(.*/)?QWEN3-VL-|-(INSTRUCT|THINKING)$", "", model.upper())
    return next((size for size in OFFICIAL_SIZES if size.upper() == plain), None)


def _read_config(path: Path, option: str) -> Mapping[str, Any]:
    folders = (resolve_model_directory(path, name) for name in ("policy", "discriminator"))
    found = next((folder for folder in folders if folder.name in ("policy", "discriminator")), path)
    for file in (found / "hf" / "config.json", found / "config.json"):
        if file.is_file():
            return read_json_object(file, remedy="copy the model again", kind=ConfigError)
    raise ConfigError(
        "there is no config.json", where=f"{option}: {path}", remedy="give a HuggingFace directory, a run or a checkpoint"
    )
