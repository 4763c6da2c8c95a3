"""What a stage's settings say about what to check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prism_nemo.config.enums import Device, RolloutEngineKind, RolloutPlacement
from prism_nemo.config.schema import PipelineConfig, ServeConfig


@dataclass(frozen=True)
class Subject:
    """The run, or the machine, that is to be checked."""

    folders: tuple[str, ...] = ()  # that are written to
    models: tuple[tuple[str, str], ...] = ()  # what they are called, and their folders
    device: str = "auto"
    vllm: bool = False  # this process would import it


def subject_of(
    stage: str | None, overrides: Sequence[str], config_file: Path | None, paths: Sequence[str], vllm: bool
) -> Subject:
    """Raises ConfigError as the stage itself would. Without a stage: paths and vLLM as given."""
    if stage is None:
        return Subject(folders=tuple(paths) or (".",), vllm=vllm)
    from omegaconf import OmegaConf

    from prism_nemo.config.compose import load_config

    config = load_config(stage, overrides, config_file=config_file)
    if isinstance(config, PipelineConfig):
        return Subject(
            folders=(config.experiment.dir, *paths),
            device=config.device.value,
            vllm=vllm or (config.rollout_engine is RolloutEngineKind.vllm),
        )
    values = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(values, dict)
    models = [
        (f"{section}.path", path)
        for section in ("model", "discriminator")
        if (path := (values.get(section) or {}).get("path")) not in (None, "???")  # as MISSING looks
    ]
    rollout = values.get("rollout")
    here = isinstance(config, ServeConfig) or (rollout is not None and rollout["placement"] == RolloutPlacement.colocated)
    wanted = here and rollout is not None and rollout["engine"] == RolloutEngineKind.vllm
    folders = () if isinstance(config, ServeConfig) else (config.experiment.dir,)
    return Subject(
        folders=(*folders, *paths),
        models=tuple(models),
        device=Device(config.runtime.device).value,
        vllm=vllm or bool(wanted),
    )
