"""Impossible combinations: each is named with its key and its remedy, from the configuration and config.json alone."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest

from prism_nemo.config.compose import StageConfig, load_config
from prism_nemo.config.enums import StageKind
from prism_nemo.config.ranges import RANGES, Range
from prism_nemo.config.schema import PipelineConfig
from prism_nemo.config.validate import validate
from prism_nemo.errors import ConfigError, LayoutError

# 12 layers, so that pipelines of 2, 3, 4 and 6 differ in what they break.
TEXT = {
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 1000,
}
VISION = {"num_heads": 8, "intermediate_size": 64, "deepstack_visual_indexes": [1, 2, 3]}
EXPERTS = {"num_experts": 6, "moe_intermediate_size": 48}


def write_model(
    folder: Path, *, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, moe: bool = False
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "qwen3_vl_moe" if moe else "qwen3_vl",
        "text_config": TEXT | (EXPERTS if moe else {}) | (text or {}),
        "vision_config": VISION | (vision or {}),
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write_discriminator(folder: Path, *, text: dict[str, Any] | None = None, **trained: Any) -> Path:
    """What a warm-up leaves, as far as settings go; without `trained`, as it was before that was written down."""
    config = write_model(
        folder / "discriminator" / "hf", moe=True, text={"num_experts": 4, "num_experts_per_tok": 2, **(text or {})}
    )
    if trained:
        file = config / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "prism_nemo_discriminator": trained}), encoding="utf-8")
    return folder


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a dense model, a discriminator and a data file."""
    write_model(tmp_path / "model")
    write_discriminator(tmp_path / "warmup")
    (tmp_path / "data.jsonl").write_text("{}\n", encoding="utf-8")
    return tmp_path


def load(stage: str, place: Path, *overrides: str) -> StageConfig:
    model, data = place / "model", place / "data.jsonl"
    given = {
        "sft": [f"model.path={model}", f"data.train={data}", "trainer.max_steps=10"],
        "pairs": [f"model.path={model}", f"data.train={data}"],
        "warmup": [f"discriminator.path={model}", f"data.train={data}"],
        "align": [f"model.path={model}", f"discriminator.path={place / 'warmup'}", f"data.train={data}"],
        "rlvr": [f"model.path={model}", f"data.train={data}"],
        "eval": [f"model.path={model}", f"data.validation={data}"],
        "generate": [f"model.path={model}", f"data.train={data}"],
    }[stage]
    config = load_config(stage, [*given, f"experiment.dir={place / 'run'}", *overrides])
    assert not isinstance(config, PipelineConfig)
    return config


def error_of(stage: str, place: Path, *overrides: str, world_size: int | None = None) -> ConfigError:
    config = load(stage, place, *overrides)
    with pytest.raises(ConfigError) as caught:
        validate(config, world_size)
    assert caught.value.where and caught.value.remedy
    return caught.value


@pytest.mark.parametrize("stage", ["sft", "pairs", "warmup", "align", "rlvr", "eval", "generate"])
def test_the_shipped_settings_are_possible(stage: str, place: Path) -> None:
    validate(load(stage, place), world_size=1)


# Parallel layouts


@pytest.mark.parametrize(
    ("change", "size", "what"),
    [
        ({"text": {"num_attention_heads": 6, "num_key_value_heads": 4}}, 4, "6 attention heads do not divide"),
        ({"text": {"num_key_value_heads": 2}}, 4, "2 key/value heads do not divide by a tensor-parallel size of 4"),
        ({"text": {"intermediate_size": 90}}, 4, "90 rows of the MLPs do not divide"),
        ({"text": {"vocab_size": 1002}}, 4, "1002 vocabulary entries do not divide"),
        ({"vision": {"num_heads": 6}}, 4, "6 vision attention heads do not divide"),
        ({"vision": {"intermediate_size": 66}}, 4, "66 rows of the vision MLPs do not divide"),
    ],
)
def test_tensor_parallel_size_that_does_not_divide(place: Path, change: dict[str, Any], size: int, what: str) -> None:
    write_model(place / "model", **change)
    error = error_of("sft", place, f"parallel.tensor_model_parallel_size={size}", world_size=4)
    assert isinstance(error, LayoutError)
    assert error.what.startswith(what)
    assert error.where == f"parallel.tensor_model_parallel_size, {place / 'model' / 'config.json'}"


def test_the_remedy_names_a_size_that_works(place: Path) -> None:
    error = error_of("sft", place, "parallel.tensor_model_parallel_size=3", world_size=3)
    assert error.remedy == "use a divisor of 8, such as 2"
    validate(load("sft", place, "parallel.tensor_model_parallel_size=2"), world_size=2)


def test_the_discriminator_is_checked_too(place: Path) -> None:
    heads = {"num_attention_heads": 3, "num_key_value_heads": 3}
    small = {"warmup": write_model(place / "small", text=heads), "align": write_discriminator(place / "other", text=heads)}
    for stage, path in small.items():
        error = error_of(stage, place, f"discriminator.path={path}", "parallel.tensor_model_parallel_size=2")
        assert error.what.startswith("3 attention heads")


@pytest.mark.parametrize(
    ("overrides", "world_size", "key", "what"),
    [
        (["tensor_model_parallel_size=2"], 3, "parallel.tensor_model_parallel_size", "3 ranks cannot hold models of 2 ranks"),
        (["pipeline_model_parallel_size=5"], 5, "parallel.pipeline_model_parallel_size", "12 layers do not divide over 5"),
        (
            ["pipeline_model_parallel_size=2", "virtual_pipeline_model_parallel_size=4"],
            2,
            "parallel.virtual_pipeline_model_parallel_size",
            "6 layers of a pipeline stage do not divide into 4 virtual stages",
        ),
        (
            ["pipeline_model_parallel_size=3", "num_layers_in_first_pipeline_stage=3"],
            3,
            "parallel.num_layers_in_first_pipeline_stage",
            "12 layers, 3 of them set apart, do not divide over 3 pipeline stages",
        ),
        (
            ["pipeline_model_parallel_size=2", "num_layers_in_first_pipeline_stage=12"],
            2,
            "parallel.pipeline_model_parallel_size",
            "0 layers of a pipeline stage",
        ),
        (
            ["num_layers_in_last_pipeline_stage=3"],
            1,
            "parallel.num_layers_in_first_pipeline_stage",
            "layers of pipeline stages need a pipeline",
        ),
        (
            ["virtual_pipeline_model_parallel_size=2"],
            1,
            "parallel.virtual_pipeline_model_parallel_size",
            "virtual pipeline stages",
        ),
        (
            ["sequence_parallel=true"],
            1,
            "parallel.sequence_parallel",
            "sequence parallelism cuts along the tensor-parallel ranks",
        ),
        (["expert_model_parallel_size=2"], 2, "parallel.expert_model_parallel_size", "the model has no experts to distribute"),
        (["expert_tensor_parallel_size=2"], 2, "parallel.expert_tensor_parallel_size", "experts that are not distributed"),
    ],
)
def test_layouts_that_contradict_themselves(place: Path, overrides: list[str], world_size: int, key: str, what: str) -> None:
    error = error_of("rlvr", place, *(f"parallel.{override}" for override in overrides), world_size=world_size)
    assert isinstance(error, LayoutError)
    assert error.what.startswith(what)
    assert error.where is not None and error.where.startswith(key)


OWN = "discriminator_parallel.as_policy=false"


@pytest.mark.parametrize(
    ("overrides", "key", "what"),
    [
        (
            ["discriminator_parallel.tensor_model_parallel_size=2"],
            "discriminator_parallel",
            "the discriminator is cut as the policy is, and a layout of its own is given",
        ),
        (
            [OWN, "discriminator_parallel.tensor_model_parallel_size=3"],
            "discriminator_parallel.tensor_model_parallel_size",
            "8 ranks cannot hold models of 3 ranks",
        ),
        (
            [OWN, "discriminator_parallel.tensor_model_parallel_size=8"],
            "discriminator_parallel.tensor_model_parallel_size",
            "4 key/value heads do not divide by a tensor-parallel size of 8",
        ),
        (
            [OWN, "discriminator_parallel.expert_model_parallel_size=8"],
            "discriminator_parallel.expert_model_parallel_size",
            "4 experts do not divide by an expert-parallel size of 8",
        ),
        (
            [OWN, "parallel.expert_model_parallel_size=2"],  # which the policy, dense, can make nothing of
            "parallel.expert_model_parallel_size",
            "the model has no experts to distribute",
        ),
    ],
)
def test_the_discriminators_own_layout(place: Path, overrides: list[str], key: str, what: str) -> None:
    error = error_of("align", place, "trainer.global_batch_size=8", *overrides, world_size=8)
    assert error.what.startswith(what)
    assert error.where is not None and error.where.startswith(key)


def test_layouts_beside_one_another(place: Path) -> None:
    overrides = ("parallel.tensor_model_parallel_size=4", OWN, "discriminator_parallel.expert_model_parallel_size=4")
    validate(load("align", place, *overrides), world_size=8)


@pytest.mark.parametrize(
    ("key", "size", "world_size", "what"),
    [
        ("expert_model_parallel_size", 4, 4, "6 experts do not divide by an expert-parallel size of 4"),
        ("expert_model_parallel_size", 3, 4, "4 ranks cannot hold experts over 3 ranks"),
        ("tensor_model_parallel_size", 4, 4, "50 rows of an expert do not divide by an expert-tensor-parallel size of 4"),
    ],
)
def test_experts_that_do_not_divide(place: Path, key: str, size: int, world_size: int, what: str) -> None:
    write_model(place / "model", moe=True, text={"moe_intermediate_size": 50})
    assert error_of("rlvr", place, f"parallel.{key}={size}", world_size=world_size).what.startswith(what)


def test_the_discriminators_experts_are_those_of_the_configuration(place: Path) -> None:
    error = error_of("warmup", place, "parallel.expert_model_parallel_size=8", world_size=8)
    assert error.what.startswith("4 experts do not divide")


@pytest.mark.parametrize(
    "overrides",
    [
        ("pipeline_model_parallel_size=2",),
        ("pipeline_model_parallel_size=6", "virtual_pipeline_model_parallel_size=2"),
        ("pipeline_model_parallel_size=3", "num_layers_in_first_pipeline_stage=2"),
        ("pipeline_model_parallel_size=3", "num_layers_in_first_pipeline_stage=3", "num_layers_in_last_pipeline_stage=5"),
        ("context_parallel_size=3",),
        ("expert_model_parallel_size=2",),
    ],
)
def test_layouts_that_work(place: Path, overrides: tuple[str, ...]) -> None:
    """A first stage may hold fewer layers than there are deepstack features."""
    write_model(place / "model", moe=True)
    validate(
        load("rlvr", place, *(f"parallel.{override}" for override in overrides), "trainer.global_batch_size=36"), world_size=6
    )


# The discriminator that an alignment is given


def test_a_discriminator_that_was_never_warmed_up(place: Path) -> None:
    """A HuggingFace directory, and a policy's checkpoint: either would get a random head."""
    policy = place / "sft" / "checkpoints" / "step_00000010" / "policy"
    write_model(policy / "hf")
    (policy.parent.parent / "latest").write_text("step_00000010", encoding="utf-8")
    for path in (place / "model", place / "sft", policy):
        error = error_of("align", place, f"discriminator.path={path}")
        assert error.what.startswith("this is no discriminator that was warmed up")
        assert error.where == f"discriminator.path: {path}"
        validate(load("warmup", place, f"discriminator.path={path}"))


@pytest.mark.parametrize(
    ("override", "stored", "here"),
    [
        ("routing=dedicated", "routing=learned", "dedicated"),
        ("view=whole", "view=segments", "whole"),
        ("use_images=false", "use_images=true", "false"),
        ("num_experts=8", "num_experts=4", "8"),
        ("moe_router_topk=3", "moe_router_topk=2", "3"),
    ],
)
def test_a_discriminator_used_in_another_way_than_it_was_warmed_up(place: Path, override: str, stored: str, here: str) -> None:
    write_discriminator(place / "warmup", routing="learned", view="segments", use_images=True)
    validate(load("align", place))
    error = error_of("align", place, f"discriminator.{override}")
    assert error.what == f"the discriminator was warmed up with {stored} (here {here})"
    assert error.where == f"discriminator.{stored.partition('=')[0]}"
    assert error.remedy == f"set discriminator.{stored}, or warm up anew"


def test_all_that_differs_from_the_warm_up_is_named(place: Path) -> None:
    write_discriminator(place / "warmup", routing="learned", view="whole", use_images=False)
    error = error_of("align", place)
    assert error.remedy == "set discriminator.view=whole discriminator.use_images=false, or warm up anew"
    validate(load("align", place, "discriminator.view=whole", "discriminator.use_images=false"))


def test_a_dense_discriminator_has_no_router_to_compare(place: Path) -> None:
    write_model(place / "dense" / "discriminator" / "hf")
    validate(load("align", place, f"discriminator.path={place / 'dense'}", "discriminator.num_experts=1"))
    assert "num_experts=1 (here 4)" in error_of("align", place, f"discriminator.path={place / 'dense'}").what


def test_a_batch_that_does_not_divide_over_the_data_parallel_ranks(place: Path) -> None:
    error = error_of("align", place, "parallel=tp2", world_size=12)
    assert error.what == "a global batch of 4 does not divide over 6 data-parallel ranks"
    assert error.where == "trainer.global_batch_size"
    assert error.remedy is not None and error.remedy.startswith("use a multiple of 6, such as 6")
    validate(load("align", place, "parallel=tp2"), world_size=8)
    validate(load("align", place, "parallel=tp2"))  # the number of ranks is not known yet


# Models


def test_model_directories_that_are_none(place: Path) -> None:
    (place / "empty").mkdir()
    for path, what in (
        (place / "none", "the model directory does not exist"),
        (place / "empty", "the model directory has no config.json"),
    ):
        error = error_of("sft", place, f"model.path={path}")
        assert (error.what, error.where) == (what, f"model.path: {path}")


def test_a_checkpoint_keeps_its_model_below_hf(place: Path) -> None:
    write_model(place / "checkpoint" / "hf", text={"num_key_value_heads": 1})
    error = error_of("rlvr", place, f"model.path={place / 'checkpoint'}", "parallel=tp2", world_size=2)
    assert error.what.startswith("1 key/value heads")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "this file is not JSON"),
        ('{"model_type": "llava"}', "model.path is a 'llava' model"),
        ("[]", "this file holds no JSON object"),
        ('{"model_type": "qwen3_vl"}', "the model's configuration lacks 'text_config'"),
    ],
)
def test_model_configurations_that_cannot_be_used(place: Path, text: str, what: str) -> None:
    file = place / "model" / "config.json"
    file.write_text(text, encoding="utf-8")
    error = error_of("sft", place)
    assert error.what.startswith(what) and error.where == str(file)


def test_an_moe_model_saved_by_transformers_5_is_read(place: Path) -> None:
    model = write_model(place / "model", moe=True)
    config = json.loads((model / "config.json").read_text())
    config["text_config"]["num_local_experts"] = config["text_config"].pop("num_experts")
    (model / "config.json").write_text(json.dumps(config))
    error = error_of("rlvr", place, "parallel.expert_model_parallel_size=4", world_size=4)
    assert error.what.startswith("6 experts do not divide")


# Data


def test_data_files_that_are_none(place: Path) -> None:
    error = error_of("sft", place, f"data.train={place / 'none.jsonl'}")
    assert (error.what, error.where) == ("the data file does not exist", f"data.train: {place / 'none.jsonl'}")
    error = error_of("sft", place, f"data.validation={place / 'none.json'}")
    assert (error.what, error.where) == ("the data file does not exist", f"data.validation: {place / 'none.json'}")
    error = error_of("sft", place, "data.train=data.csv")
    assert (error.what, error.remedy) == ("`data.csv` is not a data file", "use one that ends in .json, .jsonl, .parquet, .tar")
    error = error_of("eval", place, "data.validation=null")
    assert (error.what, error.where) == ("there is no data file", "data.validation")
    error = error_of("sft", place, f"data.image_root={place / 'images'}")
    assert (error.what, error.where) == ("the image folder does not exist", f"data.image_root: {place / 'images'}")


@pytest.mark.parametrize(
    ("name", "unit"), [("data.image_{}_pixels", "pixels"), ("data.video_{}_pixels", "pixels"), ("data.video_{}_frames", "frames")]
)
def test_bounds_in_the_wrong_order(place: Path, name: str, unit: str) -> None:
    low, high = name.format("min"), name.format("max")
    error = error_of("sft", place, f"{low}=1000", f"{high}=999")
    assert error.what == f"{name[5:10]}s cannot have at least 1000 and at most 999 {unit}"
    assert error.where == f"{low}, {high}"
    validate(load("sft", place, f"{low}=1000", f"{high}=1000"))


def test_a_row_that_does_not_hold_one_sample(place: Path) -> None:
    error = error_of("rlvr", place, "trainer.max_tokens_per_row=10239")
    assert error.what == "a row of 10239 tokens does not hold a prompt of 2048 and a response of 8192"
    assert error.remedy == "set trainer.max_tokens_per_row to 10240 or more, or lower the others"
    for stage in ("warmup", "align"):
        error = error_of(stage, place, "trainer.max_tokens_per_row=14335")
        assert error.what.endswith("does not hold a prompt of 2048 and a teacher's and a student's response of 6144")
        assert error.remedy is not None and error.remedy.startswith("set trainer.max_tokens_per_row to 14336")
        assert error.where == "trainer.max_tokens_per_row, data.max_prompt_length, data.max_response_length"


def test_validation_without_records(place: Path) -> None:
    assert error_of("sft", place, "trainer.val_check_interval=5").where == "trainer.val_check_interval, data.validation"
    assert error_of("align", place, "algorithm.min_content_probe=0.7").where == "algorithm.min_content_probe, data.validation"


# Settings against each other


@pytest.mark.parametrize(
    ("stage", "overrides", "what", "where"),
    [
        (
            "sft",
            ["optimizer.lr_warmup_iters=5"],
            "warm-up is given twice, as 0.1 of the run and as 5 steps",
            "optimizer.lr_warmup_fraction",
        ),
        (
            "align",
            ["optimizer.lr_warmup_iters=500"],
            "a warm-up of 500 steps does not end within the 500",
            "optimizer.lr_warmup_iters",
        ),
        (
            "align",
            ["discriminator_optimizer.lr_warmup_iters=5", "discriminator_optimizer.lr_warmup_fraction=0.5"],
            "warm-up is given twice",
            "discriminator_optimizer.lr_warmup_fraction",
        ),
        ("sft", ["optimizer.min_lr=1e-4"], "the learning rate would decay from 1e-05 up to 0.0001", "optimizer.min_lr"),
        ("warmup", ["discriminator.moe_router_topk=5"], "a token cannot reach 5 of 4 experts", "discriminator.moe_router_topk"),
        (
            "warmup",
            ["discriminator.routing=dedicated", "discriminator.num_experts=3", "discriminator.moe_router_topk=1"],
            "dedicated routing needs two equal pools of at least 1 experts, and there are 3",
            "discriminator.num_experts",
        ),
        (
            "align",
            ["discriminator.routing=dedicated", "discriminator.moe_router_topk=3"],
            "dedicated routing needs two equal pools of at least 3 experts, and there are 4",
            "discriminator.num_experts",
        ),
        (
            "warmup",
            ["discriminator.routing=dedicated", "discriminator.num_experts=1"],
            "dedicated routing needs two equal pools",
            "discriminator.num_experts",
        ),
        (
            "align",
            ["discriminator.routing=dedicated", "discriminator.view=whole"],
            "dedicated routing tells perception from reasoning",
            "discriminator.routing, discriminator.view",
        ),
        (
            "align",
            ["algorithm.policy_loss.reference_path=x"],
            "a reference policy is named",
            "algorithm.policy_loss.reference_path",
        ),
        ("align", ["algorithm.num_mini_batches=3"], "4 prompts do not divide", "algorithm.num_mini_batches"),
        ("rlvr", ["algorithm.num_mini_batches=5"], "32 prompts do not divide", "algorithm.num_mini_batches"),
        ("rlvr", ["algorithm.generation_batch_size=8"], "without dynamic sampling", "algorithm.generation_batch_size"),
        (
            "rlvr",
            ["algorithm=dapo", "algorithm.generation_batch_size=2"],
            "10 generation batches hold 20 prompts",
            "algorithm.generation_batch_size",
        ),
        ("rlvr", ["algorithm=dapo", "data.max_response_length=4000"], "the last 4096 tokens", "algorithm.overlong_buffer_length"),
        ("sft", ["optimizer.cpu_offload=true", "model.precision=fp32"], "the optimizer of an fp32", "optimizer.cpu_offload"),
        (
            "align",
            ["discriminator_optimizer.cpu_offload=true", "discriminator.precision=fp32"],
            "the optimizer of an fp32",
            "discriminator_optimizer.cpu_offload",
        ),
        ("align", ["discriminator.path=null"], "there is no discriminator", "discriminator.path"),
        ("align", ["rollout.num_rollouts_per_prompt=1"], "advantages compare the responses", "rollout.num_rollouts_per_prompt"),
        ("rlvr", ["rollout.num_rollouts_per_prompt=1"], "advantages compare the responses", "rollout.num_rollouts_per_prompt"),
        ("rlvr", ["rollout.temperature=0"], "responses are sampled, which temperature 0 does not do", "rollout.temperature"),
        ("align", ["rollout.temperature=0"], "responses are sampled", "rollout.temperature"),
        ("pairs", ["rollout.temperature=0"], "responses are sampled", "rollout.temperature"),
        (
            "eval",
            ["rollout.temperature=0", "rollout.num_rollouts_per_prompt=4"],
            "greedy decoding gives the same response 4 times",
            "rollout.temperature, rollout.num_rollouts_per_prompt",
        ),
        (
            "sft",
            ["model.freeze_vision_model=true", "model.freeze_language_model=true"],
            "the whole policy is frozen",
            "model.freeze_vision_model, model.freeze_language_model",
        ),
    ],
)
def test_settings_that_contradict_each_other(place: Path, stage: str, overrides: list[str], what: str, where: str) -> None:
    error = error_of(stage, place, *overrides)
    assert error.what.startswith(what)
    assert error.where is not None and error.where.startswith(where)


@pytest.mark.parametrize(
    ("stage", "overrides"),
    [
        ("warmup", ["discriminator.num_experts=1"]),  # the dense ablation is one value away
        ("warmup", ["discriminator.routing=dedicated"]),
        ("eval", ["rollout.temperature=0"]),
        ("sft", ["optimizer.lr_warmup_iters=5", "optimizer.lr_warmup_fraction=0"]),
        ("sft", ["parallel=tp4"]),
        ("sft", ["parallel=tp2_sp"]),
    ],
)
def test_settings_that_are_possible(place: Path, stage: str, overrides: list[str]) -> None:
    validate(load(stage, place, *overrides))


def test_an_engine_over_several_gpus_is_refused_on_servers(place: Path) -> None:
    servers = ("rollout=vllm", "rollout.placement=separate", "rollout.servers.urls=[http://node1:8900]")
    error = error_of("rlvr", place, *servers, "rollout.vllm.tensor_model_parallel_size=2")
    assert (error.where, "servers whose engines have one each" in error.what) == ("rollout.vllm.tensor_model_parallel_size", True)


def test_vllm_is_refused_where_it_is_not_installed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prism_nemo.config.serve_python.importlib.util.find_spec", lambda name: None)
    error = error_of("rlvr", place, "rollout=vllm")
    assert (error.what, error.where) == ("vLLM is not installed", "rollout.engine")
    assert error.remedy is not None and "rollout=megatron" in error.remedy


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        (["rollout.max_staleness=1"], "rollout.max_staleness"),
        (["rollout.max_staleness=1", "rollout.placement=separate"], "rollout.max_staleness, algorithm.policy_loss"),
        (["rollout.servers.urls=[http://node1:8900]"], "rollout.servers.urls"),
        (["rollout.placement=separate", "rollout.servers.urls=[node1:8900]"], "rollout.servers.urls"),
    ],
)
def test_rollout_settings_without_meaning(place: Path, overrides: list[str], where: str) -> None:
    error = error_of("rlvr", place, *overrides)
    assert error.where is not None and error.where.startswith(where)


# Ranges


@pytest.mark.parametrize(
    ("stage", "override", "what", "remedy"),
    [
        ("sft", "trainer.max_steps=0", "trainer.max_steps is 0", "it must be at least 1"),
        ("sft", "trainer.global_batch_size=-4", "trainer.global_batch_size is -4", "it must be at least 1"),
        ("sft", "parallel.tensor_model_parallel_size=0", "parallel.tensor_model_parallel_size is 0", "it must be at least 1"),
        ("sft", "optimizer.lr=0", "optimizer.lr is 0", "it must be above 0"),
        ("sft", "optimizer.adam_beta2=1", "optimizer.adam_beta2 is 1", "it must be at least 0 and below 1"),
        ("rlvr", "rollout.top_p=0", "rollout.top_p is 0", "it must be above 0 and at most 1"),
        ("rlvr", "rollout.temperature=-1", "rollout.temperature is -1", "it must be at least 0"),
        ("rlvr", "algorithm.policy_loss.dual_clip=1", "algorithm.policy_loss.dual_clip is 1", "it must be above 1"),
        ("align", "discriminator_optimizer.lr=-1", "discriminator_optimizer.lr is -1", "it must be above 0"),
        ("eval", "limit_samples=0", "limit_samples is 0", "it must be at least 1"),
    ],
)
def test_numbers_out_of_range(place: Path, stage: str, override: str, what: str, remedy: str) -> None:
    error = error_of(stage, place, override)
    assert (error.what, error.where, error.remedy) == (what, override.partition("=")[0], remedy)


def test_every_number_in_the_schema_has_a_range() -> None:
    from prism_nemo.config import schema

    for name, section in vars(schema).items():
        if dataclasses.is_dataclass(section):
            numbers = {
                field.name for field in dataclasses.fields(section) if str(field.type).partition(" ")[0] in ("int", "float")
            }
            assert numbers == {field for base in section.__mro__ for field in RANGES.get(base, {})}, name


def test_range_bounds() -> None:
    closed, opened = Range(0, 1), Range(0, 1, open="low high")
    assert [value in closed for value in (-0.1, 0, 1, 1.1)] == [False, True, True, False]
    assert [value in opened for value in (0, 0.1, 0.9, 1)] == [False, True, True, False]
    assert float("nan") not in closed and float("inf") not in Range(0)


# Pipelines


def pipeline(*stages: dict[str, Any]) -> PipelineConfig:
    config = load_config("pipeline", ["experiment.dir=run", f"stages={json.dumps(list(stages))}"])
    assert isinstance(config, PipelineConfig)
    return config


def sft(name: str, *overrides: str) -> dict[str, Any]:
    given = ["model.path=m", "data.train=t.jsonl", "trainer.max_steps=5"]
    return {"name": name, "stage": "sft", "overrides": [*given, *overrides]}


@pytest.mark.parametrize(
    ("stages", "what", "where"),
    [
        ([], "the pipeline has no stages", "stages"),
        ([sft("a/b")], "`a/b` cannot name a folder", "stages"),
        ([sft("data")], "the pipeline itself writes a folder of this name", "pipeline stage data"),
        ([sft("model")], "the pipeline itself writes a folder of this name", "pipeline stage model"),
        ([sft("hf")], "the pipeline itself writes a folder of this name", "pipeline stage hf"),
        ([sft("a"), sft("a")], "two stages have this name", "pipeline stage a"),
        ([sft("a", "trainer.max_step=1")], "unknown key trainer.max_step", "pipeline stage a: command line"),
        ([{"name": "a", "stage": "sft"}], "sft needs a value for", "pipeline stage a: "),
        ([sft("a", "trainer.max_steps=0")], "trainer.max_steps is 0", "pipeline stage a: trainer.max_steps"),
        ([sft("a", "parallel.context_parallel_size=2")], "1 ranks cannot hold models of 2 ranks", "pipeline stage a: parallel."),
        ([sft("a"), sft("b", "model.path=${policy:c}")], "${policy:c} is not the output of an earlier stage", "pipeline stage b"),
        ([sft("a", "model.path=${policy:a}")], "${policy:a} is not the output of an earlier stage", "pipeline stage a"),
        ([sft("a"), sft("b", "model.path=${discriminator:a}")], "${discriminator:a} is not the output", "pipeline stage b"),
    ],
)
def test_pipelines_that_cannot_run(stages: list[dict[str, Any]], what: str, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(pipeline(*stages), world_size=1)
    assert caught.value.what.startswith(what)
    assert caught.value.where is not None and caught.value.where.startswith(where)
    assert caught.value.remedy


def test_an_unknown_kind_of_stage_lists_the_kinds() -> None:
    with pytest.raises(ConfigError, match=r"stages: expected list of \{name, stage, overrides\}"):
        pipeline({"name": "a", "stage": "stf"})


def test_references_to_earlier_outputs_are_fine() -> None:
    stages = pipeline(sft("a"), sft("b-2", "model.path=${policy:a}"), sft("c", "model.path=${policy:b-2}"))
    validate(stages, world_size=1)
    assert stages.stages[2].overrides[-1] == "model.path=${policy:b-2}"


def test_the_demo_has_every_arm_and_is_possible_on_one_and_two_ranks() -> None:
    demo = load_config("pipeline", ["demo=digits"])
    assert isinstance(demo, PipelineConfig)
    began = time.process_time()
    validate(demo, world_size=1)
    assert time.process_time() - began < 1
    validate(demo, world_size=2)
    arms = {stage.name: stage.stage for stage in demo.stages if stage.stage is not StageKind.eval}
    assert arms == {
        "sft": "sft",
        "pairs": "pairs",
        "warmup": "warmup",
        "align": "align",
        "rlvr": "rlvr",
        "sft_rlvr": "rlvr",
        "sft_rlvr_long": "rlvr",
        "sft_teacher": "sft",
    }
    evaluated = {override for stage in demo.stages if stage.stage is StageKind.eval for override in stage.overrides}
    assert {f"model.path=${{policy:{arm}}}" for arm in arms if arm not in ("pairs", "warmup")} <= evaluated
