"""Random weights: whole, of the usual distribution, the same for the same seed and name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.qwen3_vl_configs import tiny_config
from safetensors.torch import load_file
from torch import Tensor

from prism_nemo.convert.hf import HFReader, load_model_config
from prism_nemo.convert.qwen3_vl import ExpertLayout
from prism_nemo.convert.random_init import write_random_weights
from prism_nemo.errors import CheckpointError


def random_weights(directory: Path, config: dict[str, Any], seed: int, **options: Any) -> dict[str, Tensor]:
    config["text_config"]["initializer_range"] = 0.02
    config["vision_config"]["initializer_range"] = 0.05
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    write_random_weights(directory, seed=seed, **options)
    assert sorted(path.name for path in directory.iterdir()) == ["config.json", "model.safetensors"]
    return load_file(directory / "model.safetensors")


def test_the_weights_are_whole_and_of_the_usual_distribution(tmp_path: Path) -> None:
    weights = random_weights(tmp_path / "model", tiny_config(moe=True), seed=0)
    with HFReader(tmp_path / "model") as reader:
        assert reader.check(load_model_config(tmp_path / "model")) == ExpertLayout.hub
    for name, tensor in weights.items():
        if name.endswith(".bias"):
            assert tensor.eq(0).all(), name
        elif "norm" in name:
            assert tensor.eq(1).all(), name
        else:
            std = 0.05 if ".visual." in name else 0.02
            error = 5 / (2 * tensor.numel()) ** 0.5  # five standard errors of a standard deviation
            assert tensor.std() == pytest.approx(std, rel=error), name
            assert tensor.mean().abs() < 5 * std / tensor.numel() ** 0.5, name


def test_a_tensor_depends_on_seed_and_name_alone(tmp_path: Path) -> None:
    one = random_weights(tmp_path / "one", tiny_config(), seed=7)
    deeper = tiny_config()
    deeper["text_config"]["num_hidden_layers"] = 3
    deeper["vision_config"]["depth"] = 1
    other = random_weights(tmp_path / "deeper", deeper, seed=7)
    shared = one.keys() & other.keys()
    assert len(shared) > 40 and shared != one.keys()
    assert all(torch.equal(one[name], other[name]) for name in shared)
    halved = random_weights(tmp_path / "bf16", tiny_config(), seed=7, dtype=torch.bfloat16)
    assert all(torch.equal(one[name].bfloat16(), halved[name]) for name in one)
    embedding = "model.language_model.embed_tokens.weight"
    assert not torch.equal(one[embedding], random_weights(tmp_path / "other seed", tiny_config(), seed=8)[embedding])
    assert not torch.equal(*(one[f"model.language_model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 1)))


def test_weights_are_never_overwritten(tmp_path: Path) -> None:
    random_weights(tmp_path / "model", tiny_config(), seed=0)
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    with pytest.raises(CheckpointError, match="weights already"):
        write_random_weights(tmp_path / "model", seed=1)
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_the_standard_deviation_is_not_guessed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    with pytest.raises(CheckpointError, match="initializer_range"):
        write_random_weights(tmp_path, seed=0)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_transformers_loads_them(tmp_path: Path) -> None:
    from transformers import Qwen3VLForConditionalGeneration

    weights = random_weights(tmp_path / "model", tiny_config(), seed=3)
    state = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "model", dtype=torch.float32).state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name]) for name in weights)
