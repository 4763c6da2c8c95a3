"""Layers, overrides and their errors."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from prism_nemo.config.compose import SCHEMAS, dump_config, load_config, stage_overrides
from prism_nemo.config.enums import Aggregation, DecayStyle, Precision, RatioKind, StageKind
from prism_nemo.config.schema import AlignConfig, PipelineConfig, PipelineStage, RLVRConfig, SFTConfig
from prism_nemo.errors import ConfigError

RLVR = ["model.path=model", "data.train=train.jsonl", "experiment.dir=run"]


def load_rlvr(*overrides: str, config_file: Path | None = None) -> RLVRConfig:
    config = load_config("rlvr", [*RLVR, *overrides], config_file=config_file)
    assert isinstance(config, RLVRConfig)
    return config


def error_of(stage: str, *overrides: str, config_file: Path | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load_config(stage, overrides, config_file=config_file)
    return caught.value


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# What comes out


def test_the_result_is_the_dataclass_with_enums_and_nested_dataclasses() -> None:
    config = load_rlvr("algorithm=gspo", "model.precision=fp32")
    assert config.model.precision is Precision.fp32
    assert config.algorithm.policy_loss.ratio is RatioKind.sequence
    assert config.algorithm.policy_loss.aggregation is Aggregation.sequence_mean
    assert config.algorithm.policy_loss.dual_clip is None
    assert config.optimizer.lr_decay_style is DecayStyle.constant
    assert isinstance(config.optimizer.lr, float)


def test_an_enum_prints_as_its_value() -> None:
    assert f"prism_nemo.stages.{StageKind.sft}" == "prism_nemo.stages.sft"


def test_an_int_may_stand_for_a_float() -> None:
    lr = load_rlvr("optimizer.lr=1").optimizer.lr
    assert lr == 1.0 and isinstance(lr, float)


def test_scientific_notation_without_a_point_is_a_number() -> None:
    assert load_rlvr("optimizer.lr=1e-5").optimizer.lr == 1e-5


def test_loading_twice_gives_independent_results() -> None:
    first, second = load_rlvr(), load_rlvr("rollout.top_k=5")
    assert (first.rollout.top_k, second.rollout.top_k) == (0, 5)
    assert load_rlvr().rollout.top_k == 0


# Which layer wins


def test_the_command_line_wins_over_the_file_over_the_shipped_settings(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.yaml", "optimizer:\n  lr: 3e-5\n  weight_decay: 0.5\n")
    config = load_rlvr("optimizer.lr=7e-5", config_file=mine)
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (7e-5, 0.5)
    assert config.optimizer.lr_decay_style is DecayStyle.constant  # shipped
    assert config.optimizer.adam_beta1 == 0.9  # schema


def test_the_last_of_two_overrides_wins() -> None:
    assert load_rlvr("trainer.max_steps=3", "trainer.max_steps=5").trainer.max_steps == 5


def test_a_group_on_the_command_line_replaces_the_default_one() -> None:
    config = load_rlvr("algorithm=dapo")
    loss = config.algorithm.policy_loss
    assert (config.algorithm.name, loss.clip_low, loss.clip_high, loss.dual_clip) == ("dapo", 0.2, 0.28, 10.0)
    assert (config.optimizer.lr_warmup_iters, config.optimizer.weight_decay) == (10, 0.1)  # a global option reaches further


def test_a_key_wins_over_a_group_wherever_it_stands() -> None:
    for overrides in (["algorithm=dapo", "optimizer.weight_decay=0.2"], ["optimizer.weight_decay=0.2", "algorithm=dapo"]):
        assert load_rlvr(*overrides).optimizer.weight_decay == 0.2


def test_a_file_chooses_groups_and_the_command_line_chooses_over_it(tmp_path: Path) -> None:
    mine = write(
        tmp_path / "mine.yaml", "defaults:\n  - algorithm: gspo\n  - parallel: tp2\n  - _self_\noptimizer:\n  lr: 2e-6\n"
    )
    config = load_rlvr(config_file=mine)
    assert (config.algorithm.name, config.parallel.tensor_model_parallel_size, config.optimizer.lr) == ("gspo", 2, 2e-6)
    config = load_rlvr("algorithm=grpo", config_file=mine)
    assert (config.algorithm.name, config.algorithm.policy_loss.ratio) == ("grpo", RatioKind.token)
    assert config.optimizer.lr_warmup_fraction == 0.0  # nothing of gspo is left, in the optimizer either
    assert config.parallel.tensor_model_parallel_size == 2


def test_a_group_on_the_command_line_wins_over_a_file(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.yaml", "algorithm:\n  policy_loss:\n    clip_high: 0.5\n")
    assert load_rlvr(config_file=mine).algorithm.policy_loss.clip_high == 0.5
    assert load_rlvr("algorithm=dapo", config_file=mine).algorithm.policy_loss.clip_high == 0.28


def test_a_null_group_leaves_a_default_group_out(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.yaml", "defaults:\n  - algorithm: null\n")
    assert load_rlvr(config_file=mine).algorithm.policy_loss.dual_clip is None  # grpo.yaml would say 3


def test_a_section_with_every_line_commented_out_changes_nothing(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.yaml", "optimizer:\n  # lr: 1\n")
    assert load_rlvr(config_file=mine) == load_rlvr()


# How values are read


@pytest.mark.parametrize("text", ["off", "1e5", "007", "a: b, c", "[x", "true", "{", "ends in =", "# no comment"])
def test_text_for_a_string_is_taken_as_it_is(text: str) -> None:
    assert load_rlvr(f"data.system_prompt={text}").data.system_prompt == text


def test_quotes_around_a_string_are_taken_off_and_null_is_none() -> None:
    assert load_rlvr("data.system_prompt='null'").data.system_prompt == "null"
    assert load_rlvr("data.system_prompt=null").data.system_prompt is None


def test_an_interpolation_reads_another_key_and_an_escaped_one_stays() -> None:
    config = load_rlvr("experiment.dir=runs/${runtime.seed}", "data.system_prompt=costs \\${runtime.seed}")
    assert config.experiment.dir == "runs/1234"
    assert config.data.system_prompt == "costs ${runtime.seed}"


def test_an_interpolation_of_the_environment_is_converted_to_the_keys_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS", "17")
    assert load_rlvr("trainer.max_steps=${oc.env:STEPS}").trainer.max_steps == 17


# Errors: what, where, remedy


@pytest.mark.parametrize(
    ("stage", "override", "remedy"),
    [
        ("sft", "optimizer.lrr=1", "did you mean optimizer.lr?"),
        ("sft", "optimiser.lr=1", "did you mean optimizer.lr?"),
        ("sft", "lr=1", "did you mean optimizer.lr?"),
        ("sft", "parallel.tensor_parallel_size=2", "did you mean parallel.tensor_model_parallel_size or "),
        ("rlvr", "policy_loss.clip_high=0.3", "did you mean algorithm.policy_loss.clip_high?"),
        ("sft", "rollout.temperature=1", "it is a key of pairs, align, rlvr, eval, curate, generate, serve only"),
        ("sft", "nonsense=1", "`prism-nemo sft --help` lists every key"),
        ("pipeline", "stages.0.name=x", "stages takes its value as a whole"),
    ],
)
def test_unknown_key(stage: str, override: str, remedy: str) -> None:
    error = error_of(stage, override)
    key, _, value = override.partition("=")
    assert error.what.startswith(f"unknown key {key} (given ") and value in error.what
    assert error.what.endswith(f"for {stage}")
    assert error.where == "command line"
    assert error.remedy is not None and error.remedy.startswith(remedy)


def test_unknown_key_in_a_file_names_the_file(tmp_path: Path) -> None:
    mine = write(tmp_path / "mine.yaml", "trainer:\n  max_step: 5\n")
    error = error_of("sft", config_file=mine)
    assert (error.what, error.where) == ("unknown key trainer.max_step (given 5 (int)) for sft", str(mine))
    assert error.remedy == "did you mean trainer.max_steps?"


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("optimizer.lr=abc", "optimizer.lr: expected float, got 'abc' (str)"),
        ("optimizer.lr=.nan", "optimizer.lr: expected float, got nan (float)"),
        ("optimizer.lr=true", "optimizer.lr: expected float, got True (bool)"),
        ("trainer.max_steps=1.5", "trainer.max_steps: expected int, got 1.5 (float)"),
        ("trainer.max_steps=true", "trainer.max_steps: expected int, got True (bool)"),
        ("trainer.max_steps=null", "trainer.max_steps: expected int, got null"),
        ("experiment.resume=3", "experiment.resume: expected true | false, got 3 (int)"),
        ("experiment.resume=maybe", "experiment.resume: expected true | false, got 'maybe' (str)"),
        ("model.path=null", "model.path: expected str, got null"),
        ("model.precision=fp16", "model.precision: expected bf16 | fp32, got 'fp16' (str)"),
        ("runtime.num_threads=many", "runtime.num_threads: expected int or null, got 'many' (str)"),
        ("optimizer=3", "optimizer is a section, it cannot be 3"),
    ],
)
def test_wrong_type(override: str, what: str) -> None:
    error = error_of("sft", override)
    assert (error.what, error.where) == (what, "command line")
    assert error.remedy


def test_a_misspelt_choice_gets_the_right_one() -> None:
    assert error_of("rlvr", "rollout.engine=megatorn").remedy == "did you mean megatron?"


def test_a_number_for_a_string_in_a_file_asks_for_quotes(tmp_path: Path) -> None:
    error = error_of("sft", config_file=write(tmp_path / "mine.yaml", "experiment:\n  dir: 2024\n"))
    assert (error.what, error.remedy) == ("experiment.dir: expected str, got 2024 (int)", "put it in quotes")


def test_all_missing_values_are_told_at_once() -> None:
    error = error_of("rlvr", "model.path=x")
    assert error.what.splitlines() == [
        "rlvr needs a value for",
        "    data.train (str or null): a .json, .jsonl, .parquet or .tar file of records, a folder of them, or a pattern",
        "    experiment.dir (str): the run directory: config, metrics, samples, checkpoints",
    ]
    assert error.remedy == "add data.train=VALUE experiment.dir=VALUE, or set it in a file given with --config"


@pytest.mark.parametrize(
    ("override", "what", "remedy"),
    [
        ("lr", "`lr` is not of the form key=value", "as in optimizer.lr=1e-5"),
        ("=3", "`=3` is not of the form key=value", "as in optimizer.lr=1e-5"),
        (
            "trainer.max_steps=",
            "`trainer.max_steps=` has no value",
            "trainer.max_steps=VALUE, or trainer.max_steps=null",
        ),
        ("+optimizer.lr=1", "keys are neither added nor removed", "write optimizer.lr=VALUE"),
        ("~optimizer.lr=1", "keys are neither added nor removed", "write optimizer.lr=VALUE"),
        ("optimizer.lr=[1", "`[1` cannot be read as a YAML value", "quote it, or mend its brackets"),
        ("algorithm=dapoo", "algorithm=dapoo: there is no such option of algorithm", "did you mean dapo?"),
        (
            "model=/models/8b",
            "there is no such option of model",
            "one of frozen_vision, full, ",
        ),
        ("runtime.device=${", "runtime.device: '${' (str) cannot be used", "expected auto | cpu | cuda"),
        ("experiment.dir=${nowhere}", "experiment.dir: its ${...} cannot be resolved", "name a key that exists"),
        ("trainer.max_steps=${experiment.dir}", "trainer.max_steps: its ${...} cannot be resolved", "name a key that exists"),
    ],
)
def test_overrides_that_cannot_be_used(override: str, what: str, remedy: str) -> None:
    error = error_of("rlvr", *RLVR, override)
    assert what in error.what
    assert error.remedy is not None and error.remedy.startswith(remedy)
    assert error.where


def test_an_algorithm_that_does_not_fit_the_stage_names_its_file() -> None:
    error = error_of("align", "algorithm=dapo")
    assert error.what.startswith("unknown key algorithm.name (given 'dapo'")
    assert error.where is not None and error.where.endswith("conf/algorithm/dapo.yaml")


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("optimizer: [", "this file cannot be read as YAML: "),
        ("optimizer:\n  lr: 1\n  lr: 2\n", "found duplicate key lr"),
        ("- optimizer\n", "this file is not a mapping of keys to values"),
        ("defaults: grpo\n", "`defaults` is 'grpo'"),
        ("defaults:\n  - algorthm: grpo\n", "`defaults` has the entry {'algorthm': 'grpo'}"),
        ("defaults:\n  - algorithm: nope\n", "algorithm=nope: there is no such option of algorithm"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, text: str, what: str) -> None:
    mine = write(tmp_path / "mine.yaml", text)
    error = error_of("rlvr", *RLVR, config_file=mine)
    assert what in error.what
    assert error.where == str(mine) and error.remedy


def test_a_missing_file_and_a_missing_stage(tmp_path: Path) -> None:
    error = error_of("sft", config_file=tmp_path / "none.yaml")
    assert (error.what, error.where) == ("there is no such configuration file", str(tmp_path / "none.yaml"))
    assert error_of("allign").remedy == "did you mean align?"


# Round trip


@pytest.mark.parametrize("stage", [stage for stage in SCHEMAS if stage != "pipeline"])
def test_a_dumped_configuration_loads_as_it_was(stage: str, tmp_path: Path) -> None:
    given = {
        "sft": ["model.path=m", "data.train=t.jsonl", "trainer.max_steps=3", "experiment.dir=d"],
        "pairs": ["model.path=m", "data.train=t.jsonl", "experiment.dir=d"],
        "warmup": ["discriminator.path=m", "data.train=t.jsonl", "experiment.dir=d"],
        "align": ["model.path=m", "discriminator.path=p", "data.train=t.jsonl", "experiment.dir=d", "optimizer.lr=1e-7"],
        "rlvr": [*RLVR, "algorithm=gspo"],
        "curate": ["data.train=t.jsonl", "teacher.base_url=http://localhost:1/v1", "teacher.model=m", "experiment.dir=d"],
        "eval": ["model.path=m", "data.validation=t.jsonl", "experiment.dir=1e5"],
        "generate": ["model.path=m", "data.train=t.jsonl", "experiment.dir=d"],
        "serve": ["model.path=m"],
    }[stage]
    config = load_config(stage, [*given, "data.system_prompt=a: ${runtime.seed} \\${b} # 'c'\n\"d\" \\"])
    dumped = write(tmp_path / "config.yaml", dump_config(config))
    assert load_config(stage, config_file=dumped) == config


def test_a_dumped_pipeline_keeps_references_to_outputs(tmp_path: Path) -> None:
    config = load_config("pipeline", ["demo=digits"])
    assert isinstance(config, PipelineConfig)
    by_name = {stage.name: stage for stage in config.stages}
    assert "model.path=${policy:sft}" in by_name["align"].overrides
    assert "data.train=runs/demo/data/teacher.jsonl" in by_name["align"].overrides
    dumped = write(tmp_path / "config.yaml", dump_config(config))
    assert load_config("pipeline", config_file=dumped) == config


def test_a_list_on_the_command_line_replaces_the_one_in_the_file() -> None:
    config = load_config("pipeline", ["demo=digits", "overrides=[trainer.max_steps=2, 'data.system_prompt=a, b']"])
    assert isinstance(config, PipelineConfig)
    assert config.overrides == ["trainer.max_steps=2", "data.system_prompt=a, b"]


def test_a_stage_of_a_pipeline_gets_seed_directory_and_both_lists_of_overrides() -> None:
    pipeline = PipelineConfig(seed=5, overrides=["trainer.max_steps=2", "trainer.log_samples=0"])
    pipeline.experiment.dir = "runs/x"
    stage = PipelineStage("first", StageKind.sft, ["model.path=m", "data.train=t.jsonl", "trainer.max_steps=3"])
    config = load_config("sft", stage_overrides(pipeline, stage))
    assert isinstance(config, SFTConfig)
    assert (config.runtime.seed, config.experiment.dir) == (5, "runs/x/first")
    assert (config.trainer.max_steps, config.trainer.log_samples) == (3, 0)


def test_a_pipelines_rollout_engine_is_that_of_every_stage_that_samples() -> None:
    pipeline = load_config("pipeline", ["demo=digits", "rollout_engine=vllm"])
    assert isinstance(pipeline, PipelineConfig)
    engines = {
        stage.name: load_config(
            str(stage.stage), [text.replace("${", "").replace("}", "") for text in stage_overrides(pipeline, stage)]
        )
        for stage in pipeline.stages
    }
    sampling = {name: config.rollout.engine.value for name, config in engines.items() if hasattr(config, "rollout")}
    assert {"pairs", "align", "rlvr", "eval_sft"} <= sampling.keys() and set(sampling.values()) == {"vllm"}
    assert {"sft", "warmup"} <= engines.keys() - sampling.keys()


# The paper's numbers (ALGORITHM.md) are what a stage starts from


def test_alignment_starts_from_the_papers_settings() -> None:
    config = load_config("align", ["model.path=m", "discriminator.path=p", "data.train=t.jsonl", "experiment.dir=d"])
    assert isinstance(config, AlignConfig)
    assert (config.optimizer.lr, config.discriminator_optimizer.lr, config.discriminator.score_regularization) == (
        1e-6,
        1e-6,
        1e-3,
    )
    assert (config.trainer.global_batch_size, config.rollout.num_rollouts_per_prompt, config.trainer.max_steps) == (4, 16, 500)
    assert (config.data.max_prompt_length, config.data.max_response_length, config.rollout.temperature) == (2048, 6144, 1.0)
    algorithm = config.algorithm
    assert (algorithm.perception_weight, algorithm.reasoning_weight, algorithm.format_penalty) == (0.5, 0.5, 1.5)
    assert (algorithm.score_clip, algorithm.policy_loss.clip_low, algorithm.policy_loss.clip_high) == (10.0, 0.2, 0.2)


@pytest.mark.parametrize(
    ("name", "ratio", "low", "high", "dual", "aggregation", "normalize"),
    [
        ("grpo", "token", 0.2, 0.2, 3.0, "token_mean", True),
        ("dapo", "token", 0.2, 0.28, 10.0, "token_mean", True),
        ("gspo", "sequence", 3e-4, 4e-4, None, "sequence_mean", True),
        ("dr_grpo", "token", 0.2, 0.2, 3.0, "constant_length", False),
    ],
)
def test_algorithms(
    name: str, ratio: str, low: float, high: float, dual: float | None, aggregation: str, normalize: bool
) -> None:
    algorithm = load_rlvr(f"algorithm={name}").algorithm
    loss = algorithm.policy_loss
    assert (loss.ratio, loss.clip_low, loss.clip_high, loss.dual_clip, loss.aggregation) == (ratio, low, high, dual, aggregation)
    assert (algorithm.name, algorithm.normalize_std, loss.kl_coefficient) == (name, normalize, 0.0)


def test_every_key_has_a_comment() -> None:
    from prism_nemo.config.keys import keys, sections

    assert [key.name for schema in SCHEMAS.values() for key in keys(schema).values() if not key.comment] == []
    titles = {section.schema: section.title for schema in SCHEMAS.values() for section in sections(schema) if section.name}
    assert [schema for schema, title in titles.items() if re.match(r"\w+\(", title)] == []  # dataclass's own docstring


def test_a_mixture_stands_in_the_place_of_training_data() -> None:
    given = ["model.path=m", "experiment.dir=d", "data.mixture={a: {path: a.jsonl, weight: 2}, b: {path: b, columns: {id: uid}}}"]
    config = load_config("rlvr", given)
    assert isinstance(config, RLVRConfig)
    assert config.data.train is None
    assert {name: (source.path, source.weight) for name, source in config.data.mixture.items()} == {
        "a": ("a.jsonl", 2.0),
        "b": ("b", 1.0),
    }
    assert config.data.mixture["b"].columns == {"id": "uid"}


@pytest.mark.parametrize(
    ("mixture", "message"),
    [
        ("{a: {weight: 2}}", "data.mixture.a.path"),
        ("{a: {path: x, wait: 2}}", "wait"),
        ("[a]", "expected mapping"),
        ("{a: b}", "a"),
    ],
)
def test_mixtures_that_are_none(mixture: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("rlvr", ["model.path=m", "experiment.dir=d", "data.train=null", f"data.mixture={mixture}"])
