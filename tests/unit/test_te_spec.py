"""What an FP8 recipe asks of Megatron, of the GPU, of rows and of a model's sizes; and the settings that go together."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.qwen3_vl_configs import OFFICIAL, official_config

import prism_nemo.engine  # noqa: F401  isort: skip  before megatron
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject, ShardedTensor

from prism_nemo.config import fp8 as config_fp8
from prism_nemo.config.compose import load_config
from prism_nemo.config.enums import Device, Fp8Recipe, Precision, StageKind, TransformerImpl
from prism_nemo.config.fp8 import check_layers
from prism_nemo.config.schema import DiscriminatorConfig, ModelConfig, ParallelConfig
from prism_nemo.config.validate import validate
from prism_nemo.engine.model_checkpoint import _without_extra_states
from prism_nemo.engine.runtime import RowLengths
from prism_nemo.errors import ConfigError, LayoutError
from prism_nemo.models.qwen3_vl.config import Qwen3VLShape
from prism_nemo.models.qwen3_vl.fp8 import LOCAL, LayerKind, check_hardware, layer_kind
from prism_nemo.models.qwen3_vl.te_spec import te_language_layer_spec

HAS_TE = importlib.util.find_spec("transformer_engine") is not None
BLACKWELL, HOPPER, ADA, AMPERE, DESKTOP_BLACKWELL = (10, 0), (9, 0), (8, 9), (8, 0), (12, 0)
CPU = torch.device("cpu")
STEPS = ["trainer.max_steps=1"]


def shape(size: str = "2B") -> Qwen3VLShape:
    return Qwen3VLShape.from_hf({**official_config(size), "image_token_id": 151655, "video_token_id": 151656})


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (Fp8Recipe.delayed, {"fp8": "hybrid", "fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}),
        (Fp8Recipe.tensorwise, {"fp8": "hybrid"}),
        (Fp8Recipe.blockwise, {"fp8": "e4m3"}),
        (Fp8Recipe.mxfp8, {"fp8": "e4m3"}),
    ],
)
def test_megatron_is_told_the_recipe(recipe: Fp8Recipe, expected: dict[str, Any]) -> None:
    config = shape().language_config(ParallelConfig(), Precision.bf16, LayerKind(True, recipe))
    assert config.fp8_recipe == recipe.value
    assert {key: getattr(config, key) for key in expected} == expected
    assert not config.fp8_param  # weights stay bf16: checkpoints and exports do not change
    assert not (config.fp8_dot_product_attention or config.fp8_multi_head_attention)


def test_what_stays_in_higher_precision() -> None:
    """The vision tower's configuration knows no FP8, and the router's products are fp32."""
    kind = LayerKind(True, Fp8Recipe.tensorwise)
    moe = shape("30B-A3B")
    assert moe.vision_config(ParallelConfig(), Precision.bf16).fp8 is None
    config = moe.language_config(ParallelConfig(), Precision.bf16, replace(kind, fp8_recipe=None))
    assert config.moe_router_dtype == "fp32"
    assert not config.moe_router_padding_for_quantization  # the experts pad their own inputs: the router's choices stay


@pytest.mark.parametrize("kind", [LOCAL, LayerKind(True)])
def test_without_a_recipe_nothing_is_quantised(kind: LayerKind) -> None:
    assert shape().language_config(ParallelConfig(), Precision.bf16, kind).fp8 is None
    assert kind.tokens_per_rank(ParallelConfig(tensor_model_parallel_size=8)) == 1


@pytest.mark.parametrize(
    ("recipe", "tp", "cp", "multiple"),
    [
        (None, 1, 1, 1),
        (None, 4, 1, 4),
        (None, 2, 2, 8),  # two pieces a context-parallel rank
        (Fp8Recipe.delayed, 1, 1, 16),
        (Fp8Recipe.tensorwise, 2, 1, 32),
        (Fp8Recipe.tensorwise, 8, 4, 512),
        (Fp8Recipe.mxfp8, 1, 1, 32),
        (Fp8Recipe.mxfp8, 4, 2, 256),
        (Fp8Recipe.blockwise, 1, 2, 32),
        (Fp8Recipe.blockwise, 2, 1, 256),  # slices are gathered in blocks of 128
    ],
)
def test_every_ranks_slice_of_a_row_suits_the_recipe(recipe: Fp8Recipe | None, tp: int, cp: int, multiple: int) -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=tp, context_parallel_size=cp)
    lengths = RowLengths.of(parallel)
    lengths.require(LayerKind(recipe is not None, recipe).tokens_per_rank(parallel))
    assert lengths.multiple == multiple


def test_two_models_in_one_layout_both_get_their_way() -> None:
    lengths = RowLengths.of(ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2))
    lengths.require(32)
    lengths.require(16)
    assert lengths.multiple == 128


@pytest.mark.parametrize("size", OFFICIAL)
@pytest.mark.parametrize("recipe", Fp8Recipe)
def test_official_sizes_suit_every_recipe_on_a_node(size: str, recipe: Fp8Recipe) -> None:
    model = shape(size)
    tp = min(8, model.num_kv_heads)
    LayerKind(True, recipe).check_sizes(model, ParallelConfig(tensor_model_parallel_size=tp))


def test_sizes_that_do_not_suit_are_named() -> None:
    narrow = replace(shape(), ffn_hidden_size=2 * 1040)  # 1040 = 65 * 16
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    LayerKind(True, Fp8Recipe.tensorwise).check_sizes(narrow, parallel)
    with pytest.raises(LayoutError, match=r"part of the MLP, 1040, is no multiple of 32"):
        LayerKind(True, Fp8Recipe.mxfp8).check_sizes(narrow, parallel)


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda", "runs"),
    [
        (Fp8Recipe.delayed, ADA, "12.4", True),
        (Fp8Recipe.tensorwise, HOPPER, "12.8", True),
        (Fp8Recipe.tensorwise, AMPERE, "13.0", False),
        (Fp8Recipe.blockwise, HOPPER, "12.9", True),
        (Fp8Recipe.blockwise, HOPPER, "13.0", True),
        (Fp8Recipe.blockwise, HOPPER, "12.8", False),
        (Fp8Recipe.blockwise, ADA, "13.0", False),
        (Fp8Recipe.mxfp8, BLACKWELL, "12.8", True),
        (Fp8Recipe.mxfp8, HOPPER, "13.0", False),
        (Fp8Recipe.mxfp8, DESKTOP_BLACKWELL, "13.0", False),
    ],
)
def test_recipes_ask_for_their_hardware(recipe: Fp8Recipe, capability: tuple[int, int], cuda: str, runs: bool) -> None:
    if runs:
        check_hardware(recipe, capability, cuda, "model")
        return
    with pytest.raises(ConfigError, match=rf"compute capability {capability[0]}\.{capability[1]}") as caught:
        check_hardware(recipe, capability, cuda, "discriminator")
    assert caught.value.where == "discriminator.fp8_recipe"


def test_the_error_names_recipes_that_would_run() -> None:
    with pytest.raises(ConfigError) as caught:
        check_hardware(Fp8Recipe.mxfp8, HOPPER, "12.9", "model")
    assert caught.value.remedy == "use delayed or tensorwise or blockwise or null"


@pytest.mark.parametrize(
    ("changes", "device", "says", "where"),
    [
        ({"fp8_recipe": Fp8Recipe.tensorwise, "precision": Precision.fp32}, Device.auto, "bf16 model", "model.precision"),
        (
            {"fp8_recipe": Fp8Recipe.delayed, "transformer_impl": TransformerImpl.local},
            Device.auto,
            "local ones are asked for",
            "model.transformer_impl",
        ),
        ({"fp8_recipe": Fp8Recipe.delayed}, Device.cpu, "CUDA devices only", "runtime.device"),
        ({"transformer_impl": TransformerImpl.transformer_engine}, Device.cpu, "CUDA devices only", "model.transformer_impl"),
    ],
)
def test_settings_that_cannot_go_together(changes: dict[str, Any], device: Device, says: str, where: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        check_layers(replace(ModelConfig(path="x"), **changes), device, "model")
    assert caught.value.where is not None
    assert where in caught.value.where


@pytest.mark.parametrize("key", ["fp8_recipe", "transformer_impl"])
def test_without_transformer_engine_the_error_says_what_to_install(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_fp8, "has_transformer_engine", lambda: False)
    values = {"fp8_recipe": Fp8Recipe.tensorwise, "transformer_impl": TransformerImpl.transformer_engine}
    config = replace(DiscriminatorConfig(), **{key: values[key]})
    with pytest.raises(ConfigError, match="Transformer Engine is not installed") as caught:
        check_layers(config, Device.cuda, "discriminator")
    assert caught.value.where == f"discriminator.{key}"
    assert "prism-nemo[gpu]" in str(caught.value.remedy)


@pytest.mark.parametrize("section", ["model", "discriminator"])
def test_a_stage_checks_both_models(section: str) -> None:
    config = load_config(
        StageKind.align,
        ["model.path=p", "discriminator.path=d", "data.train=t.json", "experiment.dir=e", "runtime.device=cpu", *STEPS],
    )
    getattr(config, section).fp8_recipe = Fp8Recipe.tensorwise
    with pytest.raises(ConfigError, match="CUDA devices only") as caught:
        validate(config)
    assert f"{section}.fp8_recipe" in str(caught.value.where)


def test_the_command_line_takes_the_recipe_by_megatrons_names() -> None:
    config: Any = load_config(
        StageKind.sft, ["model.path=p", "data.train=t.json", "experiment.dir=e", "model.fp8_recipe=blockwise", *STEPS]
    )
    assert config.model.fp8_recipe is Fp8Recipe.blockwise
    with pytest.raises(ConfigError, match="fp8_recipe"):
        load_config(StageKind.sft, ["model.path=p", "data.train=t.json", "experiment.dir=e", "model.fp8_recipe=fp8", *STEPS])


def test_auto_is_local_on_a_cpu() -> None:
    assert layer_kind(ModelConfig(path="x"), CPU) == LOCAL
    with pytest.raises(ConfigError, match="CUDA devices only"):
        layer_kind(ModelConfig(path="x", transformer_impl=TransformerImpl.transformer_engine), CPU)


@pytest.mark.parametrize(
    ("config", "installed", "expected"),
    [
        (ModelConfig(path="x"), True, LayerKind(True)),
        (ModelConfig(path="x"), False, LOCAL),
        (ModelConfig(path="x", precision=Precision.fp32), True, LOCAL),  # Transformer Engine multiplies fp32 as TF32
        (ModelConfig(path="x", transformer_impl=TransformerImpl.local), True, LOCAL),
        (DiscriminatorConfig(transformer_impl=TransformerImpl.transformer_engine), True, LayerKind(True)),
    ],
)
def test_auto_is_transformer_engine_on_cuda_where_it_is_installed(
    config: ModelConfig | DiscriminatorConfig, installed: bool, expected: LayerKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config_fp8, "has_transformer_engine", lambda: installed)
    monkeypatch.setattr("prism_nemo.models.qwen3_vl.fp8.has_transformer_engine", lambda: installed)
    assert layer_kind(config, torch.device("cuda", 0)) == expected


@pytest.mark.skipif(HAS_TE, reason="Transformer Engine is installed")
def test_layers_cannot_be_made_of_a_package_that_does_not_import() -> None:
    with pytest.raises(ConfigError, match="Megatron cannot use it"):
        te_language_layer_spec(moe=False)


def test_loading_looks_past_extra_states_and_nothing_else() -> None:
    """A state that is asked for as empty is not looked up, so it may be missing; a weight or another object may not."""
    weight = ShardedTensor.from_rank_offsets("decoder.linear_fc1.weight", torch.ones(2, 2))
    extra = ShardedObject("decoder.linear_fc1._extra_state", None, (1,), (0,))
    other = ShardedObject("decoder.counter", 3, (1,), (0,))
    named_alike = ShardedObject("decoder.my_extra_state_count", 3, (1,), (0,))
    state = {"w": weight, "layers": {"e": extra, "o": other}, "n": named_alike}
    found = _without_extra_states(state)
    assert found["w"] is weight
    assert found["layers"]["o"] is other
    assert found["n"] is named_alike
    emptied = found["layers"]["e"]
    assert isinstance(emptied, LocalNonpersistentObject)
    assert emptied.unwrap() is None
    assert state["layers"]["e"] is extra  # the model's own state is left alone
