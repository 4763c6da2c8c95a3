"""The declaration against transformers' own models: every name and shape, none left over, of all official sizes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.qwen3_vl_configs import OFFICIAL, official_config, tiny_config, transformers_model
from torch import Tensor

from prism_nemo.convert.ops import Column, GatedColumn, Replicated, Row
from prism_nemo.convert.qwen3_vl import (
    ExpertLayout,
    canonical_name,
    check_expert_layouts_differ,
    hf_shapes,
    hub_config,
    local_name,
    mappings,
)
from prism_nemo.errors import CheckpointError, LayoutError


@pytest.mark.parametrize("size", OFFICIAL)
def test_names_and_shapes_of_the_official_models_are_those_of_transformers(size: str) -> None:
    config = official_config(size)
    state = {name: tuple(tensor.shape) for name, tensor in transformers_model(config, "meta").state_dict().items()}
    if config["tie_word_embeddings"]:
        del state["lm_head.weight"]  # the same parameter as the embedding; safetensors hold it once
    assert hf_shapes(config, ExpertLayout.transformers5) == state


@pytest.mark.parametrize("size", OFFICIAL)
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_official_models_can_be_cut_over_tensor_parallel_ranks(size: str, tp_size: int) -> None:
    for mapping in mappings(official_config(size)):
        full = torch.empty(mapping.megatron_shape, device="meta")
        shards = [mapping.sharding.shard(full, rank, tp_size) for rank in range(tp_size)]
        assert mapping.sharding.unshard(shards).shape == full.shape, mapping.megatron_names
    with pytest.raises(LayoutError, match="cannot be cut over 16"):  # 4 or 8 key-value heads
        for mapping in mappings(official_config(size)):
            mapping.sharding.shard(torch.empty(mapping.megatron_shape, device="meta"), 0, 16)


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_of_a_real_model_goes_there_and_back_unchanged(moe: bool, tied: bool) -> None:
    config = tiny_config(moe=moe, tied=tied)
    state: dict[str, Tensor] = dict(transformers_model(config, "cpu").state_dict())
    if tied:
        assert torch.equal(state.pop("lm_head.weight"), state["model.language_model.embed_tokens.weight"])
    seen: set[str] = set()
    for mapping in mappings(config, layout=ExpertLayout.transformers5, padded_vocab_size=128):
        assert seen.isdisjoint(mapping.megatron_names)
        seen.update(mapping.megatron_names)
        tensors = [state.pop(name) for name in mapping.hf_names]
        assert tuple(tuple(tensor.shape) for tensor in tensors) == mapping.hf_shapes
        if mapping.fused:
            parts = [mapping.op.to_megatron(tensors[0][index]) for index in range(len(mapping.megatron_names))]
            back = (torch.stack([mapping.op.to_hf(part)[0] for part in parts]),)
        else:
            parts = [mapping.op.to_megatron(*tensors)]
            back = mapping.op.to_hf(parts[0])
        assert all(tuple(part.shape) == mapping.megatron_shape for part in parts)
        assert all(torch.equal(one, other) for one, other in zip(back, tensors, strict=True))
    assert not state


def test_both_expert_layouts_give_the_same_megatron_weights() -> None:
    experts, hidden, width = 2, 3, 4
    config = tiny_config(moe=True)
    config["text_config"] |= {"num_experts": experts, "hidden_size": hidden, "moe_intermediate_size": width}
    gate, up = torch.randn(experts, hidden, width), torch.randn(experts, hidden, width)
    on_the_hub = torch.cat([gate, up], dim=2)  # [E, H, 2I]: x @ gate_up, then the halves of the last axis
    for layout, stored in ((ExpertLayout.hub, on_the_hub), (ExpertLayout.transformers5, on_the_hub.transpose(1, 2))):
        (mapping,) = (row for row in mappings(config, layout=layout) if "layers.0.mlp.experts.gate_up_proj" in row.hf_names[0])
        assert tuple(stored.shape) == mapping.hf_shapes[0]
        for expert in range(experts):
            expected = torch.cat([gate[expert].T, up[expert].T])  # Megatron: rows are outputs, gate first
            assert torch.equal(mapping.op.to_megatron(stored[expert]), expected)


def test_cuts_of_a_layer() -> None:
    shardings = {name: row.sharding for row in mappings(tiny_config(moe=True)) for name in row.megatron_names}
    layer, block = "language_model.decoder.layers.1", "vision_model.decoder.layers.2"
    assert shardings["language_model.embedding.word_embeddings.weight"] == Column()
    assert shardings["language_model.output_layer.weight"] == Column()
    assert shardings[f"{layer}.self_attention.linear_qkv.weight"] == Column(4 * 16)  # two query heads, a key, a value
    assert shardings[f"{layer}.self_attention.linear_proj.weight"] == Row(2 * 16)
    assert shardings[f"{layer}.self_attention.q_layernorm.weight"] == Replicated()
    assert shardings[f"{layer}.pre_mlp_layernorm.weight"] == Replicated()
    assert shardings[f"{layer}.mlp.router.weight"] == Replicated()
    assert shardings[f"{layer}.mlp.experts.linear_fc1.weight3"] == GatedColumn()
    assert shardings[f"{layer}.mlp.experts.linear_fc2.weight3"] == Row()
    assert shardings[f"{block}.self_attention.linear_qkv.bias"] == Column(3 * 16)
    assert shardings[f"{block}.self_attention.linear_proj.bias"] == Replicated()
    assert shardings[f"{block}.mlp.linear_fc1.bias"] == Column()
    assert shardings["vision_model.decoder.deepstack_merger_list.1.linear_fc2.weight"] == Row()
    assert shardings["vision_model.patch_embed.proj.weight"] == Replicated()


def test_the_discriminator_has_one_more_parameter() -> None:
    plain, scored = hf_shapes(tiny_config()), hf_shapes(tiny_config(), score_head=True)
    assert scored == {**plain, "value_head.weight": (1, 32)}
    assert mappings(tiny_config(), score_head=True)[-1].megatron_names == ("score_head.weight",)


@pytest.mark.parametrize("moe", [False, True])
def test_local_and_canonical_names_are_inverse_and_unique(moe: bool) -> None:
    config = tiny_config(moe=moe)
    canonical = [name for mapping in mappings(config, score_head=True) for name in mapping.megatron_names]
    local = [local_name(name) for name in canonical]
    assert [canonical_name(name, config) for name in local] == canonical
    assert len(set(local)) == len(canonical)


LAYER, BLOCK = "language_model.decoder.layers.1", "vision_model.decoder.layers.1"


@pytest.mark.parametrize(
    ("moe", "canonical", "local"),
    [
        (False, f"{LAYER}.self_attention.linear_qkv.layer_norm_weight", f"{LAYER}.input_layernorm.weight"),
        (False, f"{LAYER}.mlp.linear_fc1.layer_norm_weight", f"{LAYER}.pre_mlp_layernorm.weight"),
        (True, f"{LAYER}.pre_mlp_layernorm.weight", f"{LAYER}.pre_mlp_layernorm.weight"),
        (True, f"{LAYER}.mlp.router.weight", f"{LAYER}.mlp.router.weight"),
        (True, f"{LAYER}.mlp.experts.linear_fc1.weight12", f"{LAYER}.mlp.experts.local_experts.12.linear_fc1.weight"),
        (True, f"{BLOCK}.mlp.linear_fc1.layer_norm_bias", f"{BLOCK}.pre_mlp_layernorm.bias"),
        (True, f"{BLOCK}.self_attention.linear_qkv.layer_norm_bias", f"{BLOCK}.input_layernorm.bias"),
    ],
)
def test_names_of_the_local_spec(moe: bool, canonical: str, local: str) -> None:
    assert local_name(canonical) == local
    assert canonical_name(local, tiny_config(moe=moe)) == canonical


def test_layers_without_experts_in_a_moe_model() -> None:
    config = tiny_config(moe=True)
    config["text_config"]["mlp_only_layers"] = [1]
    names = hf_shapes(config)
    assert "model.language_model.layers.0.mlp.experts.down_proj" in names
    assert "model.language_model.layers.1.mlp.down_proj.weight" in names
    state = transformers_model(config, "meta").state_dict()
    assert set(names) == set(state)


def test_a_config_that_transformers_5_saved_becomes_the_hubs() -> None:
    from transformers import Qwen3VLMoeConfig

    config = tiny_config(moe=True)
    saved = Qwen3VLMoeConfig.from_dict(copy.deepcopy(config)).to_dict()
    saved["text_config"]["tie_word_embeddings"] = True  # its default for MoE models, whatever the model does
    assert "num_experts" not in saved["text_config"] and "rope_scaling" not in saved["text_config"]  # else this shows nothing
    hub = hub_config(saved)
    for key, value in config["text_config"].items():
        assert hub["text_config"][key] == value, key
    assert "num_local_experts" not in hub["text_config"] and "rope_parameters" not in hub["text_config"]
    assert hub["tie_word_embeddings"] is False
    assert hub_config(hub) == hub
    again = Qwen3VLMoeConfig.from_dict(copy.deepcopy(hub)).text_config
    assert again.num_experts == 4
    assert again.rope_parameters == saved["text_config"]["rope_parameters"]


def test_an_old_config_ties_in_its_text_part() -> None:
    config = tiny_config(tied=True)
    del config["tie_word_embeddings"]
    assert hub_config(config)["tie_word_embeddings"] is True
    assert "lm_head.weight" not in hf_shapes(config)
    config["tie_word_embeddings"] = False  # transformers 5 looks here
    assert "lm_head.weight" in hf_shapes(config)


@pytest.mark.parametrize("width", [32, 16])  # hidden 32: down is square, gate_up is square
def test_square_experts_are_refused_for_writing(width: int) -> None:
    config = tiny_config(moe=True)
    check_expert_layouts_differ(config)
    config["text_config"]["moe_intermediate_size"] = width
    with pytest.raises(CheckpointError, match="square experts"):
        check_expert_layouts_differ(config)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("text_config", "num_key_value_heads", None, "lacks `num_key_value_heads`"),
        ("vision_config", "deepstack_visual_indexes", None, "lacks `deepstack_visual_indexes`"),
        ("text_config", "hidden_size", "32", "`hidden_size` is '32'"),
        ("text_config", "attention_bias", True, "attention biases"),
    ],
)
def test_a_config_that_does_not_do_is_named(section: str, key: str, value: Any, message: str) -> None:
    config = tiny_config()
    config[section][key] = value
    with pytest.raises(CheckpointError, match=message):
        mappings(config)


def test_a_vocabulary_is_not_cut_short() -> None:
    with pytest.raises(CheckpointError, match="96 does not fit into 64"):
        mappings(tiny_config(), padded_vocab_size=64)
