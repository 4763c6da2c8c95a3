"""A model's shape from its config.json: what it must refuse rather than compute something else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from helpers.tiny import tiny_model

from prism_nemo.convert.qwen3_vl import hub_config
from prism_nemo.errors import ConfigError
from prism_nemo.models.qwen3_vl.config import Qwen3VLShape


def changed(section: str, **values: Any) -> dict[str, Any]:
    config = copy.deepcopy(tiny_model().config)
    config[section] |= values
    return config


@pytest.mark.parametrize(
    ("config", "what"),
    [
        (changed("text_config", hidden_act="gelu"), "the activation 'gelu'"),
        (changed("vision_config", hidden_act="silu"), "the activation 'silu'"),
        (changed("text_config", rope_scaling={"rope_type": "yarn", "factor": 4.0}), "rope type 'yarn'"),
        (changed("text_config", rope_scaling={"type": "yarn", "factor": 4.0}), "rope type 'yarn'"),
    ],
)
def test_what_is_not_computed_is_refused(config: dict[str, Any], what: str) -> None:
    for form in (config, hub_config(config)):
        with pytest.raises(ConfigError, match=what) as caught:
            Qwen3VLShape.from_hf(form)
        assert caught.value.remedy


@pytest.mark.parametrize(
    ("section", "key"),
    [("text_config", "rms_norm_eps"), ("text_config", "num_hidden_layers"), ("vision_config", "out_hidden_size")],
)
def test_a_missing_key_is_named(section: str, key: str) -> None:
    config = copy.deepcopy(tiny_model().config)
    del config[section][key]
    with pytest.raises(ConfigError, match=f"lacks '{key}'"):
        Qwen3VLShape.from_hf(config)


def test_the_older_name_of_the_rope_type() -> None:
    config = changed("text_config", rope_scaling={"type": "mrope", "mrope_section": [4, 2, 2]})
    assert Qwen3VLShape.from_hf(config).mrope_section == (4, 2, 2)
    assert hub_config(config)["text_config"]["rope_scaling"]["rope_type"] == "default"
