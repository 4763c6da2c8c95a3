"""Checks of the settings of alignment and RLVR against each other."""

from __future__ import annotations

from prism_nemo.config.enums import RolloutCorrection
from prism_nemo.config.schema import AlignConfig, RLVRConfig
from prism_nemo.errors import ConfigError


def check_algorithm(config: AlignConfig | RLVRConfig) -> None:
    """Raises ConfigError for groups, mini-batches, sampling and penalties that cannot work."""
    if config.rollout.num_rollouts_per_prompt < 2:
        raise ConfigError(
            "advantages compare the responses to one prompt, and there is one response",
            where="rollout.num_rollouts_per_prompt",
            remedy="use at least 2; the paper uses 16",
        )
    parts, prompts = config.algorithm.num_mini_batches, config.trainer.global_batch_size
    if prompts % parts:
        raise ConfigError(
            f"{prompts} prompts do not divide into {parts} mini-batches",
            where="algorithm.num_mini_batches, trainer.global_batch_size",
            remedy=f"use a global batch of {-(-prompts // parts) * parts} prompts, or another number of mini-batches",
        )
    loss = config.algorithm.policy_loss
    if loss.reference_path is not None and loss.kl_coefficient == 0:
        raise ConfigError(
            "a reference policy is named, and the divergence from it does not count",
            where="algorithm.policy_loss.reference_path, algorithm.policy_loss.kl_coefficient",
            remedy="set kl_coefficient (1e-3 is usual), or reference_path=null",
        )
    if config.rollout.max_staleness > 0 and loss.rollout_correction is RolloutCorrection.none:
        raise ConfigError(
            "rollouts of the weights before are trained on as if they were of the weights of now",
            where="rollout.max_staleness, algorithm.policy_loss.rollout_correction",
            remedy="set algorithm.policy_loss.rollout_correction=token (or sequence), or rollout.max_staleness=0",
        )
    if isinstance(config, RLVRConfig):
        _check_overlong(config)
        _check_dynamic_sampling(config)


def _check_overlong(config: RLVRConfig) -> None:
    buffer, limit = config.algorithm.overlong_buffer_length, config.data.max_response_length
    if buffer > limit:
        raise ConfigError(
            f"the last {buffer} tokens of a response are penalised, and a response has at most {limit}",
            where="algorithm.overlong_buffer_length, data.max_response_length",
            remedy=f"make it at most {limit}, such as half of it; 0: no penalty",
        )


def _check_dynamic_sampling(config: RLVRConfig) -> None:
    algorithm, needed = config.algorithm, config.trainer.global_batch_size
    if not algorithm.dynamic_sampling:
        if algorithm.generation_batch_size is not None:
            raise ConfigError(
                "without dynamic sampling a batch is drawn as a whole",
                where="algorithm.generation_batch_size",
                remedy="set it to null, or algorithm.dynamic_sampling=true",
            )
        return
    drawn = (algorithm.generation_batch_size or needed) * algorithm.max_generation_batches
    if drawn < needed:
        raise ConfigError(
            f"{algorithm.max_generation_batches} generation batches hold {drawn} prompts, a batch needs {needed}",
            where="algorithm.generation_batch_size, algorithm.max_generation_batches",
            remedy="raise one of them",
        )
