"""Qwen3-VL's parameters, HuggingFace <-> Megatron: names, shapes, layouts and tensor-parallel cuts, declared once.

Canonical Megatron names are those of Megatron-Bridge (Transformer Engine spec, grouped experts), so that checkpoints can be
exchanged; `local_name` and `canonical_name` go to and from the names of the local spec. Offline conversion, loading, export and
the rollout engine's weight update all read this one declaration. Sources: transformers' modeling_qwen3_vl.py and
modeling_qwen3_vl_moe.py (5.19; 4.57 for the Hub's expert layout), Megatron-Bridge's mapping registry.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from prism_nemo.convert.ops import (
    Column,
    Copy,
    ExpertMatrix,
    GatedColumn,
    GateUp,
    MergeQKV,
    Op,
    PadRows,
    Replicated,
    Row,
    Shape,
    Sharding,
    VisionQKV,
)
from prism_nemo.errors import CheckpointError

MODEL_TYPES = ("qwen3_vl", "qwen3_vl_moe")
HF_SCORE_HEAD = "value_head.weight"
MEGATRON_SCORE_HEAD = "score_head.weight"

Config = Mapping[str, Any]


class ExpertLayout(str, Enum):
    """How the experts of a layer are laid out on disk. E experts, hidden size H, expert width I."""

    hub = "hub"  # gate_up [E, H, 2I], down [E, I, H]: Hub checkpoints, transformers 4.57, vLLM
    transformers5 = "transformers5"  # gate_up [E, 2I, H], down [E, H, I]: what transformers 5 saves
    separate = "separate"  # experts.{e}.gate_proj, up_proj [I, H], down_proj [H, I]: one tensor each


@dataclass(frozen=True)
class ParameterMapping:
    """One row of the declaration: which HuggingFace tensors make which Megatron tensors.

    Mostly several HuggingFace tensors make one Megatron tensor. Fused experts are the other way round (`fused`): one HuggingFace
    tensor holds all experts along its first axis, `op` works on one expert's slice, and `megatron_names[e]` belongs to slice e.
    """

    megatron_names: tuple[str, ...]
    hf_names: tuple[str, ...]
    hf_shapes: tuple[Shape, ...]
    op: Op
    sharding: Sharding
    fused: bool = False

    @property
    def megatron_shape(self) -> Shape:
        """The shape of one full (unsharded) Megatron tensor."""
        return self.op.megatron_shape(*(shape[1:] if self.fused else shape for shape in self.hf_shapes))


def mappings(
    config: Config,
    *,
    layout: ExpertLayout = ExpertLayout.hub,
    padded_vocab_size: int | None = None,
    score_head: bool = False,
) -> list[ParameterMapping]:
    """Every parameter of the model that a parsed config.json describes, in the order of the forward path.

    `padded_vocab_size`: rows of Megatron's vocabulary matrices (None: no padding). `score_head`: the discriminator, which has one
    more parameter, [1, hidden]. Raises CheckpointError when the configuration lacks a key or asks for what is not supported.
    """
    config = hub_config(config)
    text, vision = config["text_config"], config["vision_config"]
    hidden = _int(text, "hidden_size")
    result = [_vocabulary(text, padded_vocab_size, "embedding.word_embeddings", "model.language_model.embed_tokens")]
    for layer in range(_int(text, "num_hidden_layers")):
        result += _attention(text, layer)
        result += _experts(text, layer, layout) if is_moe_layer(config, layer) else _dense_mlp(text, layer)
    result.append(_copy("language_model.decoder.final_layernorm.weight", "model.language_model.norm.weight", (hidden,)))
    if not config["tie_word_embeddings"]:
        result.append(_vocabulary(text, padded_vocab_size, "output_layer", "lm_head"))
    result += _vision_embedding(vision)
    for block in range(_int(vision, "depth")):
        result += _vision_block(vision, block)
    result += _merger(vision, "merger", "merger", norm_after_merge=False)
    for index in range(len(_require(vision, "deepstack_visual_indexes"))):
        name = f"deepstack_merger_list.{index}"
        result += _merger(vision, f"decoder.{name}", name, norm_after_merge=True)
    if score_head:
        result.append(_copy(MEGATRON_SCORE_HEAD, HF_SCORE_HEAD, (1, hidden)))
    return result


def hf_shapes(config: Config, layout: ExpertLayout = ExpertLayout.hub, *, score_head: bool = False) -> dict[str, Shape]:
    """The shape of every HuggingFace tensor of the model, by name."""
    return {
        name: shape
        for mapping in mappings(config, layout=layout, score_head=score_head)
        for name, shape in zip(mapping.hf_names, mapping.hf_shapes, strict=True)
    }


def hub_config(config: Config) -> dict[str, Any]:
    """A config.json in the form of the Hub's checkpoints, which transformers 4.57, 5.x and vLLM all read alike. Idempotent.

    transformers 5 saves other keys (`num_local_experts`, `rope_parameters`), of which 4.57 knows nothing: it would silently build
    60 experts without MRoPE. 4.57 and vLLM look for `tie_word_embeddings` in the text part, 5.x at the top (and its MoE text part
    says true whatever the model does), so the top-level value rules where there is one, and both are written.
    """
    result = copy.deepcopy(dict(config))
    text = _require(result, "text_config")
    _require(result, "vision_config")
    if "num_local_experts" in text:
        text["num_experts"] = text.pop("num_local_experts")
    if "num_experts" in text:
        text.setdefault("norm_topk_prob", True)  # transformers always normalises; vLLM reads the key
    rope = {**(text.get("rope_scaling") or {}), **(text.pop("rope_parameters", None) or {})}
    if "rope_theta" in rope:
        text["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("type", "default")  # the older name of rope_type; "mrope" said what the other keys say
    rope.setdefault("rope_type", "default" if kind == "mrope" else kind)
    rope.setdefault("mrope_interleaved", True)
    text["rope_scaling"] = rope
    tied = bool(result.get("tie_word_embeddings", text.get("tie_word_embeddings", False)))
    result["tie_word_embeddings"] = text["tie_word_embeddings"] = tied
    return result


def is_moe_layer(config: Config, layer: int) -> bool:
    """Whether language layer `layer` (from 0) has experts, by transformers' rule. `config` in the Hub's form."""
    text = config["text_config"]
    if not text.get("num_experts"):
        return False
    step = text.get("decoder_sparse_step", 1)
    return layer not in (text.get("mlp_only_layers") or ()) and (layer + 1) % step == 0


def local_name(canonical: str) -> str:
    """The name that a parameter has in a model built from the local spec (own norms, sequential experts)."""
    name = re.sub(r"\.self_attention\.linear_qkv\.layer_norm_(weight|bias)$", r".input_layernorm.\1", canonical)
    name = re.sub(r"\.mlp\.linear_fc1\.layer_norm_(weight|bias)$", r".pre_mlp_layernorm.\1", name)
    return re.sub(r"\.mlp\.experts\.(linear_fc[12])\.weight(\d+)$", r".mlp.experts.local_experts.\2.\1.weight", name)


def canonical_name(local: str, config: Config) -> str:
    """The inverse of `local_name`. Layer numbers count from the start of the whole model, not of a pipeline stage.

    The configuration tells MoE layers, whose norm before the MLP is a module of its own in both specs, from dense ones.
    """
    name = re.sub(r"\.input_layernorm\.(weight|bias)$", r".self_attention.linear_qkv.layer_norm_\1", local)
    name = re.sub(r"\.mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight$", r".mlp.experts.\2.weight\1", name)
    if ".pre_mlp_layernorm." not in name:
        return name  # the rest takes time, and weights are named anew at every update
    layer = re.match(r"language_model\.decoder\.layers\.(\d+)\.", name)
    if layer and is_moe_layer(hub_config(config), int(layer[1])):
        return name
    return re.sub(r"\.pre_mlp_layernorm\.(weight|bias)$", r".mlp.linear_fc1.layer_norm_\1", name)


def check_expert_layouts_differ(config: Config) -> None:
    """Raise CheckpointError where transformers 5 would misread experts that are written in the Hub's layout.

    It tells the layouts apart by shape, one tensor at a time, and takes a square matrix for its own layout without a word.
    """
    text = hub_config(config)["text_config"]
    if not text.get("num_experts"):
        return
    hidden, width = _int(text, "hidden_size"), _int(text, "moe_intermediate_size")
    if hidden in (width, 2 * width):
        raise CheckpointError(
            f"transformers 5 would misread square experts: hidden_size {hidden} is {hidden // width} x moe_intermediate_size",
            where="config.json: text_config.moe_intermediate_size",
            remedy="an expert width for which neither moe_intermediate_size nor twice it equals hidden_size",
        )


def _copy(megatron: str, hf: str, shape: Shape, sharding: Sharding | None = None) -> ParameterMapping:
    return ParameterMapping((megatron,), (hf,), (shape,), Copy(), sharding or Replicated())


def _vocabulary(text: Config, padded: int | None, megatron: str, hf: str) -> ParameterMapping:
    rows = _int(text, "vocab_size")
    shape = (rows, _int(text, "hidden_size"))
    op = PadRows(rows, rows if padded is None else padded)
    if op.padded_rows < rows:
        raise CheckpointError(
            f"a vocabulary of {rows} does not fit into {padded} rows", where="config.json: text_config.vocab_size"
        )
    return ParameterMapping((f"language_model.{megatron}.weight",), (f"{hf}.weight",), (shape,), op, Column())


def _attention(text: Config, layer: int) -> list[ParameterMapping]:
    """Attention of one language layer, with the norm before it."""
    if text.get("attention_bias"):
        raise CheckpointError("attention biases are not supported", where="config.json: text_config.attention_bias")
    hidden, head_dim = _int(text, "hidden_size"), _int(text, "head_dim")
    heads, kv_heads = _int(text, "num_attention_heads"), _int(text, "num_key_value_heads")
    hf = f"model.language_model.layers.{layer}"
    megatron = f"language_model.decoder.layers.{layer}.self_attention"
    op = MergeQKV(heads, kv_heads, head_dim)
    return [
        _copy(f"{megatron}.linear_qkv.layer_norm_weight", f"{hf}.input_layernorm.weight", (hidden,)),
        ParameterMapping(
            (f"{megatron}.linear_qkv.weight",),
            tuple(f"{hf}.self_attn.{part}_proj.weight" for part in "qkv"),
            ((heads * head_dim, hidden), (kv_heads * head_dim, hidden), (kv_heads * head_dim, hidden)),
            op,
            Column(op.rows_per_group),
        ),
        _copy(f"{megatron}.q_layernorm.weight", f"{hf}.self_attn.q_norm.weight", (head_dim,)),
        _copy(f"{megatron}.k_layernorm.weight", f"{hf}.self_attn.k_norm.weight", (head_dim,)),
        _copy(
            f"{megatron}.linear_proj.weight",
            f"{hf}.self_attn.o_proj.weight",
            (hidden, heads * head_dim),
            Row(heads // kv_heads * head_dim),
        ),
    ]


def _dense_mlp(text: Config, layer: int) -> list[ParameterMapping]:
    """The gated MLP of one language layer, with the norm before it."""
    hidden, width = _int(text, "hidden_size"), _int(text, "intermediate_size")
    hf, megatron = f"model.language_model.layers.{layer}", f"language_model.decoder.layers.{layer}.mlp"
    return [
        _copy(f"{megatron}.linear_fc1.layer_norm_weight", f"{hf}.post_attention_layernorm.weight", (hidden,)),
        ParameterMapping(
            (f"{megatron}.linear_fc1.weight",),
            (f"{hf}.mlp.gate_proj.weight", f"{hf}.mlp.up_proj.weight"),
            ((width, hidden), (width, hidden)),
            GateUp(),
            GatedColumn(),
        ),
        _copy(f"{megatron}.linear_fc2.weight", f"{hf}.mlp.down_proj.weight", (hidden, width), Row()),
    ]


def _experts(text: Config, layer: int, layout: ExpertLayout) -> list[ParameterMapping]:
    """Router and experts of one language layer, with the norm before them."""
    hidden, width, experts = _int(text, "hidden_size"), _int(text, "moe_intermediate_size"), _int(text, "num_experts")
    hf, megatron = f"model.language_model.layers.{layer}", f"language_model.decoder.layers.{layer}"
    op = ExpertMatrix(transposed=layout == ExpertLayout.hub)

    def fused(linear: str, projection: str, outputs: int, inputs: int, sharding: Sharding) -> ParameterMapping:
        return ParameterMapping(
            tuple(f"{megatron}.mlp.experts.{linear}.weight{expert}" for expert in range(experts)),
            (f"{hf}.mlp.experts.{projection}",),
            ((experts, inputs, outputs) if op.transposed else (experts, outputs, inputs),),
            op,
            sharding,
            fused=True,
        )

    common = [
        _copy(f"{megatron}.pre_mlp_layernorm.weight", f"{hf}.post_attention_layernorm.weight", (hidden,)),
        _copy(f"{megatron}.mlp.router.weight", f"{hf}.mlp.gate.weight", (experts, hidden)),
    ]
    if layout == ExpertLayout.separate:
        return [*common, *(row for expert in range(experts) for row in _separate_expert(hf, megatron, expert, hidden, width))]
    return [
        *common,
        fused("linear_fc1", "gate_up_proj", 2 * width, hidden, GatedColumn()),
        fused("linear_fc2", "down_proj", hidden, width, Row()),
    ]


def _separate_expert(hf: str, megatron: str, expert: int, hidden: int, width: int) -> list[ParameterMapping]:
    hf, megatron = f"{hf}.mlp.experts.{expert}", f"{megatron}.mlp.experts"
    return [
        ParameterMapping(
            (f"{megatron}.linear_fc1.weight{expert}",),
            (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight"),
            ((width, hidden), (width, hidden)),
            GateUp(),
            GatedColumn(),
        ),
        _copy(f"{megatron}.linear_fc2.weight{expert}", f"{hf}.down_proj.weight", (hidden, width), Row()),
    ]


def _vision_embedding(vision: Config) -> list[ParameterMapping]:
    """Patch projection (a convolution whose kernel is its stride) and the table of positions."""
    hidden, patch = _int(vision, "hidden_size"), _int(vision, "patch_size")
    kernel = (hidden, _int(vision, "in_channels"), _int(vision, "temporal_patch_size"), patch, patch)
    return [
        _copy("vision_model.patch_embed.proj.weight", "model.visual.patch_embed.proj.weight", kernel),
        _copy("vision_model.patch_embed.proj.bias", "model.visual.patch_embed.proj.bias", (hidden,)),
        _copy(
            "vision_model.pos_embed.weight",
            "model.visual.pos_embed.weight",
            (_int(vision, "num_position_embeddings"), hidden),
        ),
    ]


def _vision_block(vision: Config, block: int) -> list[ParameterMapping]:
    hidden, width, heads = _int(vision, "hidden_size"), _int(vision, "intermediate_size"), _int(vision, "num_heads")
    hf, megatron = f"model.visual.blocks.{block}", f"vision_model.decoder.layers.{block}"
    attention = f"{megatron}.self_attention"
    qkv = VisionQKV(heads, hidden // heads)

    def fused_qkv(kind: str, shape: Shape) -> ParameterMapping:
        names = (f"{attention}.linear_qkv.{kind}",), (f"{hf}.attn.qkv.{kind}",)
        return ParameterMapping(*names, (shape,), qkv, Column(qkv.rows_per_group))

    return [
        *_vision_norm(f"{attention}.linear_qkv.layer_norm_", f"{hf}.norm1", hidden),
        fused_qkv("weight", (3 * hidden, hidden)),
        fused_qkv("bias", (3 * hidden,)),
        _copy(f"{attention}.linear_proj.weight", f"{hf}.attn.proj.weight", (hidden, hidden), Row(hidden // heads)),
        _copy(f"{attention}.linear_proj.bias", f"{hf}.attn.proj.bias", (hidden,)),
        *_vision_norm(f"{megatron}.mlp.linear_fc1.layer_norm_", f"{hf}.norm2", hidden),
        *_vision_mlp(f"{megatron}.mlp", f"{hf}.mlp", hidden, width, hidden),
    ]


def _merger(vision: Config, megatron: str, hf: str, *, norm_after_merge: bool) -> list[ParameterMapping]:
    """From merged patches to language tokens. Deepstack's mergers normalise the merged vector, the last one each patch."""
    hidden = _int(vision, "hidden_size")
    merged = hidden * _int(vision, "spatial_merge_size") ** 2
    megatron, hf = f"vision_model.{megatron}", f"model.visual.{hf}"
    return [
        *_vision_norm(f"{megatron}.patch_norm.", f"{hf}.norm", merged if norm_after_merge else hidden),
        *_vision_mlp(megatron, hf, merged, merged, _int(vision, "out_hidden_size")),
    ]


def _vision_norm(megatron_prefix: str, hf: str, width: int) -> list[ParameterMapping]:
    return [_copy(f"{megatron_prefix}{kind}", f"{hf}.{kind}", (width,)) for kind in ("weight", "bias")]


def _vision_mlp(megatron: str, hf: str, inputs: int, width: int, outputs: int) -> list[ParameterMapping]:
    """Two linears with biases. The second one's bias is whole on every rank: it is added once, after the sum over ranks."""
    return [
        _copy(f"{megatron}.linear_fc1.weight", f"{hf}.linear_fc1.weight", (width, inputs), Column()),
        _copy(f"{megatron}.linear_fc1.bias", f"{hf}.linear_fc1.bias", (width,), Column()),
        _copy(f"{megatron}.linear_fc2.weight", f"{hf}.linear_fc2.weight", (outputs, width), Row()),
        _copy(f"{megatron}.linear_fc2.bias", f"{hf}.linear_fc2.bias", (outputs,)),
    ]


def _require(section: Config, key: str) -> Any:
    if section.get(key) is None:
        raise CheckpointError(f"the model's configuration lacks `{key}`", where="config.json", remedy="a complete config.json")
    return section[key]


def _int(section: Config, key: str) -> int:
    value = _require(section, key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"`{key}` is {value!r}, not a whole number", where="config.json")
    return value
