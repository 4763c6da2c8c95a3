"""The configuration of a rollout server out of that of the run that it samples for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from prism_nemo.config.compose import load_config
from prism_nemo.config.enums import Device, RolloutPlacement
from prism_nemo.config.rollout import RolloutConfig, RolloutServersConfig, ServeSettings
from prism_nemo.config.schema import (
    AlignConfig,
    CurateConfig,
    DataConfig,
    EvalConfig,
    GenerateConfig,
    ModelConfig,
    PairsConfig,
    RLVRConfig,
    RuntimeConfig,
    ServeConfig,
)
from prism_nemo.errors import ConfigError


def server_of(stage: str, overrides: Sequence[str], *, config_file: Path | None = None) -> ServeConfig:
    """A server for a run of `stage` with these overrides; those of `serve.*` are the server's own.

    It has the run's model, lengths, engine and device. Raises ConfigError when the run has no rollouts.
    """
    own = [text for text in overrides if text.startswith("serve.")]
    run = load_config(stage, [text for text in overrides if text not in own], config_file=config_file)
    if not isinstance(run, PairsConfig | AlignConfig | RLVRConfig | EvalConfig | CurateConfig | GenerateConfig):
        raise ConfigError(f"{stage} has no rollouts", where="--of", remedy="pairs, align, rlvr, eval or generate")
    server = load_config("serve", [*own, f"model.path={run.model.path}"])
    assert isinstance(server, ServeConfig)
    return serving(run.model, run.runtime.device, run.data, run.rollout, server.serve)


def serving(model: ModelConfig, device: Device, data: DataConfig, rollout: RolloutConfig, settings: ServeSettings) -> ServeConfig:
    """Of a server that samples for a run with these `data` and `rollout`; it takes requests as long as two buckets of weights."""
    room = 2 * rollout.servers.weight_bucket_mb
    return ServeConfig(
        model=model,
        runtime=RuntimeConfig(device=device),
        data=DataConfig(max_prompt_length=data.max_prompt_length, max_response_length=data.max_response_length),
        rollout=replace(rollout, placement=RolloutPlacement.colocated, max_staleness=0, servers=RolloutServersConfig()),
        serve=replace(settings, max_request_mb=max(settings.max_request_mb, room)),
    )
