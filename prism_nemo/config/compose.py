"""From YAML files and command-line overrides to one checked, typed configuration.

Layers, later ones winning: the defaults in `schema.py`; `conf/<stage>.yaml` with the groups of its `defaults:` list; the user's
own file (`--config`); groups chosen on the command line (`algorithm=dapo`); single keys given there (`optimizer.lr=1e-5`).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from prism_nemo.config.keys import accepts, did_you_mean, keys, section_names, unwrap_optional
from prism_nemo.config.layers import (
    COMMAND_LINE,
    Layer,
    conf_root,
    expand,
    first_line,
    option_names,
    parse_yaml_value,
    read_document,
    read_option,
    read_shipped_document,
    split_overrides,
)
from prism_nemo.config.safety import keep_secrets_out
from prism_nemo.config.schema import (
    AlignConfig,
    CurateConfig,
    EvalConfig,
    GenerateConfig,
    PairsConfig,
    PipelineConfig,
    PipelineStage,
    RLVRConfig,
    ServeConfig,
    SFTConfig,
    WarmupConfig,
)
from prism_nemo.errors import ConfigError

StageConfig = SFTConfig | PairsConfig | WarmupConfig | AlignConfig | RLVRConfig | EvalConfig | CurateConfig | GenerateConfig
Config = StageConfig | ServeConfig | PipelineConfig

SCHEMAS: dict[str, type] = {
    "sft": SFTConfig,
    "pairs": PairsConfig,
    "warmup": WarmupConfig,
    "align": AlignConfig,
    "rlvr": RLVRConfig,
    "eval": EvalConfig,
    "curate": CurateConfig,
    "generate": GenerateConfig,
    "serve": ServeConfig,
    "pipeline": PipelineConfig,
}

# What a pipeline puts in for `${policy:NAME}` only once stage NAME has run; until then the text stands for itself.
OUTPUT_REFERENCES = ("policy", "discriminator", "pairs")


def load_config(stage: str, overrides: Sequence[str] = (), *, config_file: Path | None = None) -> Config:
    """The configuration of a stage as an instance of its dataclass, interpolations resolved.

    overrides   `key=value`, or `group=option`, as on the command line
    config_file a YAML file of the user's own, between the shipped one and the overrides
    Raises ConfigError for an unknown key, a wrong type, a missing value, or a file that cannot be read.
    """
    config = compose(stage, overrides, config_file=config_file)
    if stage != "pipeline" and config.data.mixture and OmegaConf.is_missing(config.data, "train"):
        config.data.train = None  # a mixture stands in its place
    _require_values(stage, config)
    try:
        loaded = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise _resolution_error(error) from error
    assert isinstance(loaded, Config)
    return loaded


def compose(stage: str, overrides: Sequence[str] = (), *, config_file: Path | None = None) -> DictConfig:
    """As `load_config`, but before interpolations are resolved and with `???` where a value is still missing."""
    if stage not in SCHEMAS:
        raise ConfigError(f"there is no stage `{stage}`", remedy=did_you_mean(stage, SCHEMAS) or f"one of {', '.join(SCHEMAS)}")
    for name in OUTPUT_REFERENCES:
        OmegaConf.register_new_resolver(name, lambda of, name=name: f"${{{name}:{of}}}", replace=True)
    keep_secrets_out()
    schema = SCHEMAS[stage]
    config = copy.deepcopy(_defaults(schema))
    for layer in _layers(stage, overrides, config_file):
        for key, value in _flatten(schema, layer.values, layer.source):
            _assign(config, schema, key, value, layer.source)
    return config


@cache
def _defaults(schema: type) -> DictConfig:
    """The schema's own defaults; to be copied, which is far quicker than building them again."""
    config = OmegaConf.structured(schema)
    assert isinstance(config, DictConfig)
    return config


def options_for(stage: str, group: str) -> list[str]:
    """The options of a group that set only keys which the stage has."""

    def fits(option: str) -> bool:
        try:
            return bool(list(_flatten(SCHEMAS[stage], read_option(group, option, where=group).values, group)))
        except ConfigError:
            return False

    return [option for option in option_names(group) if fits(option)]


def dump_config(config: Config) -> str:
    """YAML of a resolved configuration. `load_config` of the same stage with it as `config_file` gives an equal configuration."""
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(dataclasses.asdict(config))))


def stage_overrides(pipeline: PipelineConfig, stage: PipelineStage) -> list[str]:
    """All overrides of one stage of a pipeline: what the pipeline gives every stage, then the stage's own."""
    samples = pipeline.rollout_engine is not None and "rollout.engine" in keys(SCHEMAS[str(stage.stage)])
    return [
        f"runtime.seed={pipeline.seed}",
        f"runtime.device={pipeline.device}",
        f"experiment.dir={Path(pipeline.experiment.dir) / stage.name}",
        *([f"rollout.engine={pipeline.rollout_engine}"] if samples else []),
        *pipeline.overrides,
        *stage.overrides,
    ]


def _layers(stage: str, overrides: Sequence[str], config_file: Path | None) -> Iterator[Layer]:
    groups, values = split_overrides(overrides)
    own = read_document(config_file) if config_file else None
    yield from expand(
        read_shipped_document(conf_root() / f"{stage}.yaml"), without=groups.keys() | (own.groups if own else set())
    )
    if own:
        yield from expand(own, without=groups.keys())
    for group, option in groups.items():
        yield read_option(group, option, where=COMMAND_LINE)
    for key, text in values:
        yield Layer(COMMAND_LINE, {key: _parse_override(SCHEMAS[stage], key, text)})


def _parse_override(schema: type, key: str, text: str) -> Any:
    """The value of `key=text`. Text is taken as it is for a string or a choice (`off`, `1e5`, `a: b`), as YAML for the rest."""
    known = keys(schema).get(key)
    base = unwrap_optional(known.annotation)[0] if known else None
    takes_text = isinstance(base, type) and issubclass(base, str | Enum)
    if not takes_text or text == "null":
        return parse_yaml_value(text, where=key)
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


def _flatten(schema: type, values: Mapping[str, Any], source: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every value in a nested layer; raises ConfigError for what the schema does not have."""
    for name, value in values.items():
        key = f"{prefix}{name}"
        if key in keys(schema):
            yield key, value
        elif key not in section_names(schema):
            raise _unknown_key(schema, key, value, source)
        elif isinstance(value, Mapping):
            yield from _flatten(schema, value, source, prefix=f"{key}.")
        elif value is not None:  # a section of which every line is commented out is null, and changes nothing
            below = [known.rpartition(".")[2] for known in keys(schema) if known.rpartition(".")[0] == key]
            remedy = f"set one of its keys: {', '.join(below)}"
            raise ConfigError(f"{key} is a section, it cannot be {value!r}", where=source, remedy=remedy)


def _assign(config: DictConfig, schema: type, key: str, value: Any, source: str) -> None:
    known = keys(schema)[key]
    if not accepts(known.annotation, value):
        raise ConfigError(
            f"{key}: expected {known.type_text}, got {_shown(value)}",
            where=source,
            remedy=_type_remedy(known.annotation, value) or f"{key}: {known.comment}",
        )
    try:
        if isinstance(value, list):
            OmegaConf.update(config, key, [], merge=False)  # a later list replaces an earlier one
        elif isinstance(value, dict) and OmegaConf.select(config, key) is None:
            OmegaConf.update(config, key, {}, merge=False)  # OmegaConf merges into a mapping, not into null
        OmegaConf.update(config, key, value, merge=True)
    except OmegaConfBaseException as error:
        what = f"{key}: {_shown(value)} cannot be used: {first_line(error)}"
        raise ConfigError(what, where=source, remedy=f"expected {known.type_text}") from error


def _shown(value: Any) -> str:
    return "null" if value is None else f"{value!r} ({type(value).__name__})"


def _type_remedy(annotation: Any, value: Any) -> str | None:
    base, _ = unwrap_optional(annotation)
    if isinstance(base, type) and issubclass(base, Enum):
        return did_you_mean(str(value), base.__members__)
    if base is str and value is not None and not isinstance(value, list | dict):
        return "put it in quotes"
    return None


def _unknown_key(schema: type, key: str, value: Any, source: str) -> ConfigError:
    stages_with_it = [stage for stage, other in SCHEMAS.items() if key in keys(other) or key in section_names(other)]
    if stages_with_it:
        remedy = f"it is a key of {', '.join(stages_with_it)} only"
    elif key.partition(".")[0] in keys(schema):
        remedy = f"{key.partition('.')[0]} takes its value as a whole"
    else:
        remedy = did_you_mean(key, keys(schema)) or f"`prism-nemo {_stage_of(schema)} --help` lists every key"
    return ConfigError(f"unknown key {key} (given {_shown(value)}) for {_stage_of(schema)}", where=source, remedy=remedy)


def _stage_of(schema: type) -> str:
    return next(stage for stage, other in SCHEMAS.items() if other is schema)


def _require_values(stage: str, config: DictConfig) -> None:
    try:
        missing = sorted(OmegaConf.missing_keys(config))
    except OmegaConfBaseException as error:
        raise _resolution_error(error) from error
    if missing:
        known = keys(SCHEMAS[stage])
        described = [f"{key} ({known[key].type_text}): {known[key].comment}" if key in known else key for key in missing]
        raise ConfigError(
            "\n    ".join([f"{stage} needs a value for", *described]),
            where=f"{stage}.yaml and {COMMAND_LINE}",
            remedy=f"add {' '.join(f'{key}=VALUE' for key in missing)}, or set it in a file given with --config",
        )


def _resolution_error(error: OmegaConfBaseException) -> ConfigError:
    key = str(error.full_key)
    remedy = "name a key that exists and whose value fits, or write \\${ for a literal ${"
    return ConfigError(f"{key}: its ${{...}} cannot be resolved: {first_line(error)}", where=key, remedy=remedy)


def _escaped(value: Any) -> Any:
    """Plain YAML data with `${` marked as literal, so that loading it again resolves nothing."""
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {key: _escaped(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_escaped(entry) for entry in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value
