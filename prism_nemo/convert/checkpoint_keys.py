"""Under which key, and where in it, a `torch_dist` checkpoint keeps each parameter.

Megatron stacks what the layers, and the experts in them, have alike: `…decoder.layers.mlp.linear_fc2.weight` is
[layers, out, in]. Both specs and every layout share these keys. Other writers, Megatron-Bridge among them, may number the layers
instead, and wrap the model; `find` knows their forms.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from dataclasses import dataclass

from prism_nemo.convert.ops import GatedColumn, Sharding
from prism_nemo.convert.qwen3_vl import Config, ParameterMapping, Shape, hub_config, is_moe_layer
from prism_nemo.errors import CheckpointError

_LAYER = re.compile(r"^((?:language|vision)_model)\.decoder\.layers\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"^mlp\.experts\.(linear_fc[12])\.weight(\d+)$")
_LINEAR = re.compile(r"(?:^|\.)(?:linear_qkv|linear_proj|linear_fc1|linear_fc2)\.weight$")
_OUTPUT_LAYER = "language_model.output_layer"
_EMBEDDING = "language_model.embedding.word_embeddings.weight"
WRAPPERS = ("", "module.", "model.", "model.module.", "module.module.")


@dataclass(frozen=True)
class Place:
    """A parameter within a checkpoint's tensor: at `index` of its leading axes, which have `counts` entries."""

    key: str
    index: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def extra_state(self) -> str | None:
        """The object that Megatron's linear layers keep beside their weight."""
        if not _LINEAR.search(self.key):
            return None
        return _object_key(self.key.removesuffix(".weight"), self.index, self.counts)


@dataclass(frozen=True)
class Chunk:
    """Rows `first` to `last` (exclusive) of a parameter, which a checkpoint stores as one piece."""

    first: int
    last: int


def check_uniform(config: Config) -> None:
    """CheckpointError when only some layers have experts: they would not stack, and our model does not have such layers."""
    config = hub_config(config)
    kinds = {is_moe_layer(config, layer) for layer in range(config["text_config"]["num_hidden_layers"])}
    if len(kinds) > 1:
        raise CheckpointError(
            "only some language layers have experts",
            where="config.json: text_config.decoder_sparse_step, mlp_only_layers",
            remedy="a model whose layers are alike, as all official Qwen3-VL are",
        )


def place(name: str, config: Config) -> Place:
    """Where our checkpoints keep the parameter of this canonical name. `config` in the Hub's form."""
    layer = _LAYER.match(name)
    if layer is None:
        return Place(name, (), ())
    model, number, rest = layer[1], int(layer[2]), layer[3]
    section, key = ("text_config", "num_hidden_layers") if model == "language_model" else ("vision_config", "depth")
    index: tuple[int, ...] = (number,)
    counts: tuple[int, ...] = (int(config[section][key]),)
    expert = _EXPERT.match(rest)
    if expert is not None:
        rest = f"mlp.experts.experts.{expert[1]}.weight"
        index, counts = (*index, int(expert[2])), (*counts, int(config["text_config"]["num_experts"]))
    return Place(f"{model}.decoder.layers.{rest}", index, counts)


def extra_states(mappings: list[ParameterMapping], config: Config, *, output_head: bool) -> list[str]:
    """Keys of the objects that go along with the parameters. A tied policy has an output layer without a weight."""
    config = hub_config(config)
    places = (place(name, config) for mapping in mappings for name in mapping.megatron_names)
    keys = [state for state in (where.extra_state for where in places) if state is not None]
    return [*keys, _object_key(_OUTPUT_LAYER, (), ())] if output_head else keys


def chunks(sharding: Sharding, shape: Shape) -> list[Chunk]:
    """The pieces that Megatron stores a whole parameter in: gate and up apart, everything else in one."""
    if isinstance(sharding, GatedColumn):
        return [Chunk(0, shape[0] // 2), Chunk(shape[0] // 2, shape[0])]
    return [Chunk(0, shape[0])]


@dataclass(frozen=True)
class Found:
    """Where a checkpoint of any writer keeps a parameter: several keys hold its rows one after another."""

    parts: tuple[tuple[str, tuple[int, ...]], ...]


def find(name: str, keys: Container[str], config: Config, wrapper: str = "") -> Found | None:
    """The first form of the parameter's key that the checkpoint has; None when it has none."""
    for key, index in _forms(name, config):
        if wrapper + key in keys:
            return Found(((wrapper + key, index),))
        halves = tuple((f"{wrapper}{key}_{half}", index) for half in "wv")  # gate and up under keys of their own
        if all(half in keys for half, _ in halves):
            return Found(halves)
    return None


def find_wrapper(keys: Container[str]) -> str | None:
    """What stands before the model's names; None when there is no Qwen3-VL in the checkpoint."""
    return next((wrapper for wrapper in WRAPPERS if wrapper + _EMBEDDING in keys), None)


def _forms(name: str, config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Keys and indexes under which writers keep a parameter, ours first."""
    ours = place(name, config)
    yield ours.key, ours.index
    layer = _LAYER.match(name)
    if layer is not None:
        prefix, rest = f"{layer[1]}.decoder.layers.{layer[2]}", layer[3]
        expert = _EXPERT.match(rest)
        if expert is None:
            yield f"{prefix}.{rest}", ()
        else:
            linear, number = expert[1], expert[2]
            yield f"{prefix}.mlp.experts.experts.{linear}.weight", (int(number),)
            yield f"{prefix}.mlp.experts.experts.{number}.{linear}.weight", ()
            yield f"{prefix}.mlp.experts.experts.{linear}.weight{number}", ()
            yield f"{prefix}.mlp.experts.{linear}.weight{number}", ()
            yield f"{prefix}.mlp.experts.local_experts.{number}.{linear}.weight", ()
    for canonical, local in (
        (".self_attention.linear_qkv.layer_norm_", ".input_layernorm."),
        (".mlp.linear_fc1.layer_norm_", ".pre_mlp_layernorm."),
    ):
        if canonical in ours.key:  # a local spec that keeps its own names
            yield ours.key.replace(canonical, local), ours.index
            yield name.replace(canonical, local), ()


def _object_key(module: str, index: tuple[int, ...], counts: tuple[int, ...]) -> str:
    at, of = (".".join(map(str, numbers)) for numbers in (index or (0,), counts or (1,)))
    return f"{module}._extra_state/shard_{at}_{of}"
