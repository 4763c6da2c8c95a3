"""How a discriminator was trained, kept in its config.json, and whether an alignment uses it in the same way.

Scores of a discriminator that is routed, shown images or asked for segments in another way than it was warmed up with are noise,
and nothing else would tell.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prism_nemo.config.schema import DiscriminatorConfig
from prism_nemo.errors import ConfigError
from prism_nemo.json_files import read_json_object
from prism_nemo.run_directory import resolve_model_directory

FOLDER = "discriminator"  # of a checkpoint
TRAINED_WITH = "prism_nemo_discriminator"  # in config.json; transformers does not look at it


def trained_with(config: DiscriminatorConfig) -> dict[str, Any]:
    """What a checkpoint says of itself beside the sizes in config.json."""
    return {"routing": config.routing.value, "view": config.view.value, "use_images": config.use_images}


def check_warmed_up(config: DiscriminatorConfig) -> None:
    """Raises ConfigError unless `path` is a discriminator's checkpoint, trained with the settings that it is to be used with."""
    assert config.path is not None
    path = resolve_model_directory(Path(config.path), FOLDER)
    file = path / "hf" / "config.json"
    if path.name != FOLDER or not file.is_file():
        raise ConfigError(
            "this is no discriminator that was warmed up; made into one now, it would judge by chance",
            where=f"discriminator.path: {config.path}",
            remedy="give the run directory of a warm-up (prism-nemo warmup), or the checkpoint of one",
        )
    stored = read_json_object(file, remedy="copy the checkpoint again", kind=ConfigError)
    text = stored["text_config"]
    found: dict[str, Any] = {"num_experts": text.get("num_experts") or 1, **stored.get(TRAINED_WITH, {})}
    wanted: dict[str, Any] = {"num_experts": config.num_experts, **trained_with(config)}
    if found["num_experts"] > 1:
        found["moe_router_topk"], wanted["moe_router_topk"] = text["num_experts_per_tok"], config.moe_router_topk
    differences = [name for name, value in found.items() if value != wanted[name]]
    if differences:
        raise ConfigError(
            "the discriminator was warmed up with "
            + ", ".join(f"{name}={_shown(found[name])} (here {_shown(wanted[name])})" for name in differences),
            where=", ".join(f"discriminator.{name}" for name in differences),
            remedy="set " + " ".join(f"discriminator.{name}={_shown(found[name])}" for name in differences) + ", or warm up anew",
        )


def _shown(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
