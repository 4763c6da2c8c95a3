"""Combinations that cannot work, found before any model is built: every check reads the configuration and small files only."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prism_nemo.config.algorithms import check_algorithm
from prism_nemo.config.compose import Config, StageConfig, load_config, stage_overrides
from prism_nemo.config.data_files import check_data_files
from prism_nemo.config.endpoint import check_curation, check_endpoint
from prism_nemo.config.enums import DiscriminatorView, Precision, RolloutPlacement, Routing, StageKind
from prism_nemo.config.evaluation import check_pass_at_k
from prism_nemo.config.fp8 import check_layers
from prism_nemo.config.keys import did_you_mean
from prism_nemo.config.layout import (
    check_model,
    check_parallel,
    data_parallel_size,
    discriminator_layout,
    read_model_sizes,
)
from prism_nemo.config.models import about_the_discriminator, check_models
from prism_nemo.config.ranges import check_ranges
from prism_nemo.config.rollout import check_rollout
from prism_nemo.config.safety import refuse_secrets
from prism_nemo.config.schema import (
    AlignConfig,
    CurateConfig,
    DataConfig,
    DiscriminatorConfig,
    EvalConfig,
    GenerateConfig,
    OptimizerConfig,
    PairsConfig,
    ParallelConfig,
    PipelineConfig,
    PipelineStage,
    RLVRConfig,
    RolloutConfig,
    ServeConfig,
    TrainerConfig,
    WarmupConfig,
)
from prism_nemo.errors import ConfigError, LayoutError

EXP_MANAGER = "experiment.nemo_exp_manager"
EXP_MANAGER_KEYS = (
    "explicit_log_dir",
    "exp_dir",
    "name",
    "version",
    "use_datetime_version",
    "create_tensorboard_logger",
    "summary_writer_kwargs",
    "create_wandb_logger",
    "wandb_logger_kwargs",
    "create_mlflow_logger",
    "mlflow_logger_kwargs",
    "create_dllogger_logger",
    "dllogger_logger_kwargs",
    "create_clearml_logger",
    "clearml_logger_kwargs",
    "files_to_copy",
)
FOLDERS_OF_A_PIPELINE = ("data", "model", "hf")  # the digits task, its untrained model, the exported policy
OUTPUT_MADE_BY = {
    "policy": (StageKind.sft, StageKind.align, StageKind.rlvr),
    "discriminator": (StageKind.warmup, StageKind.align),
    "pairs": (StageKind.pairs,),
}


def validate(config: Config, world_size: int | None = None) -> None:
    """Checks values against each other, against the model's `config.json`, and that data files exist.

    world_size is the number of ranks that will run; with None what depends on it is left out.
    Raises ConfigError or LayoutError, naming key and remedy.
    """
    refuse_secrets(dataclasses.asdict(config))
    if isinstance(config, PipelineConfig):
        _check_pipeline(config, world_size)
        return
    if isinstance(config, ServeConfig):
        _check_server(config, world_size)
        return
    _check_settings(config, world_size)
    check_data_files(config)
    check_models(config)


def _check_server(config: ServeConfig, world_size: int | None) -> None:
    check_ranges(config)
    _check_pixels(config.data)
    check_layers(config.model, config.runtime.device, "model")
    check_rollout(config.rollout, world_size)
    if config.rollout.placement is RolloutPlacement.separate:
        raise ConfigError("a rollout server generates itself", where="rollout.placement", remedy="leave it at colocated")
    if (world_size or 1) > 1:
        raise ConfigError("a rollout server is one process", where="serve", remedy="start it without torchrun")
    check_model(read_model_sizes(Path(config.model.path), key="model.path"), ParallelConfig())


def _check_settings(config: StageConfig, world_size: int | None) -> None:
    """What needs no files."""
    check_ranges(config)
    check_parallel(config.parallel, world_size)
    _check_pixels(config.data)
    if config.experiment.nemo_exp_manager is not None:
        check_exp_manager(config.experiment.nemo_exp_manager)
    if isinstance(config, AlignConfig):
        own = discriminator_layout(config)
        if own is not config.parallel:
            with about_the_discriminator():
                check_parallel(own, world_size)
        _check_optimizer(config.discriminator_optimizer, config.trainer, "discriminator_optimizer")
        _check_offload(config.discriminator_optimizer, config.discriminator.precision, "discriminator_optimizer")
        _check_probe_gate(config)
    if not isinstance(config, WarmupConfig):
        check_layers(config.model, config.runtime.device, "model")
    if isinstance(config, AlignConfig | WarmupConfig):
        check_layers(config.discriminator, config.runtime.device, "discriminator")
        _check_discriminator(config.discriminator)
    if isinstance(config, AlignConfig | RLVRConfig):
        check_algorithm(config)
    if isinstance(config, AlignConfig | RLVRConfig | EvalConfig | CurateConfig | GenerateConfig) and config.reward.judge.enabled:
        check_endpoint(config.reward.judge, "reward.judge")
    if isinstance(config, CurateConfig):
        check_endpoint(config.teacher, "teacher")
        check_curation(config.curate, config.model.path)
    if isinstance(config, AlignConfig | RLVRConfig | PairsConfig | CurateConfig):
        _check_sampling(config.rollout)
    if isinstance(config, AlignConfig | RLVRConfig | PairsConfig | EvalConfig | CurateConfig | GenerateConfig):
        check_rollout(config.rollout, world_size, ahead=isinstance(config, AlignConfig | RLVRConfig))
    if isinstance(config, EvalConfig | GenerateConfig):
        _check_greedy(config.rollout)
    if isinstance(config, EvalConfig):
        check_pass_at_k(config)
    elif not isinstance(config, PairsConfig | CurateConfig | GenerateConfig):
        _check_optimizer(config.optimizer, config.trainer, "optimizer")
        model = config.discriminator if isinstance(config, WarmupConfig) else config.model
        _check_offload(config.optimizer, model.precision, "optimizer")
        _check_trainer(config.trainer, config.data, config.parallel, world_size)
        _check_row_budget(config)
    if not isinstance(config, WarmupConfig) and config.model.freeze_vision_model and config.model.freeze_language_model:
        raise ConfigError(
            "the whole policy is frozen",
            where="model.freeze_vision_model, model.freeze_language_model",
            remedy="set one of them to false",
        )


def _check_offload(optimizer: OptimizerConfig, precision: Precision, section: str) -> None:
    if optimizer.cpu_offload and precision is not Precision.bf16:
        raise ConfigError(
            "the optimizer of an fp32 model works on the model's own weights, which cannot wait elsewhere",
            where=f"{section}.cpu_offload",
            remedy="set it to false, or the model's precision to bf16",
        )


def _check_optimizer(optimizer: OptimizerConfig, trainer: TrainerConfig, section: str) -> None:
    if optimizer.lr_warmup_fraction and optimizer.lr_warmup_iters:
        raise ConfigError(
            f"warm-up is given twice, as {optimizer.lr_warmup_fraction:g} of the run and as {optimizer.lr_warmup_iters} steps",
            where=f"{section}.lr_warmup_fraction, {section}.lr_warmup_iters",
            remedy="set one of them to 0",
        )
    if optimizer.lr_warmup_iters >= trainer.max_steps and optimizer.lr_warmup_iters:
        raise ConfigError(
            f"a warm-up of {optimizer.lr_warmup_iters} steps does not end within the {trainer.max_steps} steps of the run",
            where=f"{section}.lr_warmup_iters",
            remedy="make it smaller than trainer.max_steps",
        )
    if optimizer.min_lr > optimizer.lr:
        raise ConfigError(
            f"the learning rate would decay from {optimizer.lr:g} up to {optimizer.min_lr:g}",
            where=f"{section}.min_lr",
            remedy=f"make it at most {section}.lr",
        )


def _check_trainer(trainer: TrainerConfig, data: DataConfig, parallel: ParallelConfig, world_size: int | None) -> None:
    if trainer.val_check_interval and data.validation is None:
        raise ConfigError(
            f"validation is asked for every {trainer.val_check_interval} steps, and there are no records for it",
            where="trainer.val_check_interval, data.validation",
            remedy="set data.validation=FILE, or trainer.val_check_interval=0",
        )
    if world_size is None:
        return
    copies = data_parallel_size(parallel, world_size)
    if trainer.global_batch_size % copies:
        raise LayoutError(
            f"a global batch of {trainer.global_batch_size} does not divide over {copies} data-parallel ranks",
            where="trainer.global_batch_size",
            remedy=f"use a multiple of {copies}, such as {-(-trainer.global_batch_size // copies) * copies}, "
            "or give more ranks to one model (parallel.tensor_model_parallel_size)",
        )


def _check_row_budget(config: StageConfig) -> None:
    """A row holds at least one prompt with one response, and in front of the discriminator with the teacher's beside it."""
    assert not isinstance(config, EvalConfig | PairsConfig | CurateConfig | GenerateConfig)
    responses = 2 if isinstance(config, WarmupConfig | AlignConfig) else 1
    prompt, response = config.data.max_prompt_length, config.data.max_response_length
    needed = prompt + responses * response
    if needed > config.trainer.max_tokens_per_row:
        shared = "a response" if responses == 1 else "a teacher's and a student's response"
        raise ConfigError(
            f"a row of {config.trainer.max_tokens_per_row} tokens does not hold a prompt of {prompt} and {shared} of {response}",
            where="trainer.max_tokens_per_row, data.max_prompt_length, data.max_response_length",
            remedy=f"set trainer.max_tokens_per_row to {needed} or more, or lower the others",
        )


def _check_pixels(data: DataConfig) -> None:
    for name, low, high in (
        ("image_{}_pixels", data.image_min_pixels, data.image_max_pixels),
        ("video_{}_pixels", data.video_min_pixels, data.video_max_pixels),
        ("video_{}_frames", data.video_min_frames, data.video_max_frames),
    ):
        if low is not None and high is not None and low > high:
            kind, _, unit = name.split("_")
            raise ConfigError(
                f"{kind}s cannot have at least {low} and at most {high} {unit}",
                where=", ".join(f"data.{name.format(end)}" for end in ("min", "max")),
                remedy="make the first at most the second",
            )


def _check_discriminator(discriminator: DiscriminatorConfig) -> None:
    experts, topk = discriminator.num_experts, discriminator.moe_router_topk
    dedicated = discriminator.routing is Routing.dedicated
    if experts > 1 and topk > experts:
        raise ConfigError(
            f"a token cannot reach {topk} of {experts} experts",
            where="discriminator.moe_router_topk",
            remedy=f"make it at most {experts}, or raise discriminator.num_experts",
        )
    if dedicated and discriminator.view is DiscriminatorView.whole:
        raise ConfigError(
            "dedicated routing tells perception from reasoning, and the whole response is scored as one",
            where="discriminator.routing, discriminator.view",
            remedy="use discriminator.routing=learned or discriminator.view=segments",
        )
    if dedicated and (experts % 2 or experts // 2 < topk):
        raise ConfigError(
            f"dedicated routing needs two equal pools of at least {topk} experts, and there are {experts} experts",
            where="discriminator.num_experts",
            remedy=f"use an even number of at least {2 * topk}, a smaller discriminator.moe_router_topk, "
            "or discriminator.routing=learned",
        )
    if experts > 1 and topk == 1:
        raise ConfigError(
            "with one expert a token, the chosen expert's weight is always 1 and the router learns nothing from the scores",
            where="discriminator.moe_router_topk",
            remedy="use at least 2, or discriminator.num_experts=1 for a dense discriminator",
        )


def _check_sampling(rollout: RolloutConfig) -> None:
    if rollout.temperature <= 0:
        raise ConfigError(
            f"responses are sampled, which temperature {rollout.temperature:g} does not do",
            where="rollout.temperature",
            remedy="use a temperature above 0, such as 1.0; greedy decoding is for eval",
        )


def _check_greedy(rollout: RolloutConfig) -> None:
    if rollout.temperature == 0 and rollout.num_rollouts_per_prompt > 1:
        raise ConfigError(
            f"greedy decoding gives the same response {rollout.num_rollouts_per_prompt} times",
            where="rollout.temperature, rollout.num_rollouts_per_prompt",
            remedy="set rollout.num_rollouts_per_prompt=1, or a temperature above 0",
        )


def check_exp_manager(settings: Mapping[str, Any]) -> None:
    """Raises ConfigError for settings of NeMo's exp_manager that have no meaning here, and when nemo-toolkit is not installed."""
    unknown = [name for name in settings if name not in EXP_MANAGER_KEYS]
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)}: unknown, or for a training loop of Lightning's, which is not used",
            where=EXP_MANAGER,
            remedy=did_you_mean(unknown[0], EXP_MANAGER_KEYS)
            or "leave it out: trainer.save_interval and experiment.resume are about checkpoints, the loggers' keys are "
            + ", ".join(EXP_MANAGER_KEYS),
        )
    if importlib.util.find_spec("nemo") is None:
        raise ConfigError("NeMo is not installed", where=EXP_MANAGER, remedy="pip install 'prism-nemo[nemo]', or set it to null")


def _check_probe_gate(config: AlignConfig) -> None:
    if config.algorithm.min_content_probe is not None and config.data.validation is None:
        raise ConfigError(
            "the content probe is measured on held-out records, and there are none",
            where="algorithm.min_content_probe, data.validation",
            remedy="set data.validation=FILE, or algorithm.min_content_probe=null",
        )


def _check_pipeline(config: PipelineConfig, world_size: int | None) -> None:
    """Loads every stage's configuration, so that a typo in the last one is found before the first one runs."""
    check_ranges(config)
    if not config.stages:
        raise ConfigError(
            "the pipeline has no stages", where="stages", remedy="choose one (demo=digits), or give a file with --config"
        )
    if config.experiment.nemo_exp_manager is not None:
        raise ConfigError(
            "a pipeline logs nothing itself",
            where=EXP_MANAGER,
            remedy=f"give it to every stage, as `{EXP_MANAGER}={{…}}` in `overrides`",
        )
    earlier: dict[str, PipelineStage] = {}
    for stage in config.stages:
        where = f"pipeline stage {stage.name}"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", stage.name):
            raise ConfigError(f"`{stage.name}` cannot name a folder", where="stages", remedy="use letters, digits, `_` and `-`")
        if stage.name in FOLDERS_OF_A_PIPELINE:
            raise ConfigError(
                "the pipeline itself writes a folder of this name", where=where, remedy="give the stage another name"
            )
        if stage.name in earlier:
            raise ConfigError("two stages have this name", where=where, remedy="names are unique, each is a folder of the run")
        overrides = stage_overrides(config, stage)
        _check_references(overrides, earlier, where)
        try:
            loaded = load_config(stage.stage, overrides)
            assert not isinstance(loaded, PipelineConfig | ServeConfig)
            _check_settings(loaded, world_size)
        except ConfigError as error:
            raise type(error)(error.what, where=f"{where}: {error.where}", remedy=error.remedy) from error
        earlier[stage.name] = stage


def _check_references(overrides: list[str], earlier: dict[str, PipelineStage], where: str) -> None:
    for kind, name in re.findall(r"\$\{(policy|discriminator|pairs):([^}]*)\}", " ".join(overrides)):
        makers = [stage.name for stage in earlier.values() if stage.stage in OUTPUT_MADE_BY[kind]]
        if name not in makers:
            raise ConfigError(
                f"${{{kind}:{name}}} is not the output of an earlier stage",
                where=where,
                remedy=f"one of {', '.join(f'${{{kind}:{maker}}}' for maker in makers)}"
                if makers
                else f"no earlier stage makes a {kind}",
            )
