"""Whether the models of a stage, by their `config.json`, are the right ones and can be cut as the configuration says."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prism_nemo.config.compose import StageConfig
from prism_nemo.config.discriminator import check_warmed_up
from prism_nemo.config.layout import EP, ModelSizes, check_model, read_model_sizes
from prism_nemo.config.schema import AlignConfig, CurateConfig, ParallelConfig, RLVRConfig, WarmupConfig
from prism_nemo.errors import ConfigError, LayoutError

REFERENCE = "algorithm.policy_loss.reference_path"


def check_models(config: StageConfig) -> None:
    """Reads every model's sizes and checks them against the layout."""
    models: list[tuple[ModelSizes, ParallelConfig]] = []
    if isinstance(config, CurateConfig) and not config.model.path:  # all prompts are curated, or pass rates are known
        return
    if not isinstance(config, WarmupConfig):
        models.append((read_model_sizes(Path(config.model.path), key="model.path"), config.parallel))
    if isinstance(config, AlignConfig | RLVRConfig) and config.algorithm.policy_loss.reference_path is not None:
        reference = read_model_sizes(Path(config.algorithm.policy_loss.reference_path), key=REFERENCE)
        policy = models[0][0]
        if reference.vocab_size != policy.vocab_size:
            raise ConfigError(
                f"the reference policy has a vocabulary of {reference.vocab_size} tokens, the policy one of {policy.vocab_size}",
                where=REFERENCE,
                remedy="the divergence is between two models of one tokenizer",
            )
        models.append((reference, config.parallel))
    if isinstance(config, WarmupConfig | AlignConfig):
        discriminator = config.discriminator
        if discriminator.path is None:
            made_from = "the dense model to upcycle" if isinstance(config, WarmupConfig) else "the discriminator after warm-up"
            raise ConfigError(
                "there is no discriminator", where="discriminator.path", remedy=f"give the directory of {made_from}"
            )
        sizes = read_model_sizes(Path(discriminator.path), key="discriminator.path")
        if isinstance(config, AlignConfig):
            check_warmed_up(discriminator)
        if discriminator.num_experts > 1:
            sizes = dataclasses.replace(sizes, num_experts=discriminator.num_experts, moe_ffn_hidden_size=sizes.ffn_hidden_size)
        if isinstance(config, AlignConfig) and not config.discriminator_parallel.as_policy:
            with about_the_discriminator():
                _check_fit([(sizes, config.discriminator_parallel)])
        else:
            models.append((sizes, config.parallel))
    _check_fit(models)


def _check_fit(models: list[tuple[ModelSizes, ParallelConfig]]) -> None:
    """Models that are cut by one layout: each must divide, and experts are only distributed where there are some."""
    for sizes, parallel in models:
        check_model(sizes, parallel)
    sizes, parallel = models[0]
    if parallel.expert_model_parallel_size > 1 and all(sizes.num_experts is None for sizes, _ in models):
        raise LayoutError("the model has no experts to distribute", where=f"{EP}, {sizes.where}", remedy=f"set {EP} to 1")


@contextmanager
def about_the_discriminator() -> Iterator[None]:
    """Layout errors name the discriminator's section of the configuration."""
    try:
        yield
    except LayoutError as error:
        named = [
            None if text is None else text.replace("parallel.", "discriminator_parallel.") for text in (error.where, error.remedy)
        ]
        raise LayoutError(error.what, where=named[0], remedy=named[1]) from error
