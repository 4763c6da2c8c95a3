"""The planner's parameter counts, exactly: against transformers' models on the meta device, and the ranks' shares of them."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.qwen3_vl_configs import OFFICIAL, official_config, transformers_model

from prism_nemo.config.schema import DiscriminatorConfig, ParallelConfig
from prism_nemo.convert.upcycling import upcycled_config
from prism_nemo.plan import shapes
from prism_nemo.plan.parameters import expert_parameters, model_parameters, rank_parameters
from prism_nemo.plan.shapes import OFFICIAL_SIZES, read_shape, shape_of


def meta_parameters(config: dict[str, Any]) -> int:
    """Of transformers' model; a tied weight counts once."""
    return sum(parameter.numel() for parameter in transformers_model(config, "meta").parameters())


@pytest.mark.parametrize("size", OFFICIAL_SIZES)
def test_official_sizes_have_exactly_transformers_parameters(size: str) -> None:
    assert model_parameters(read_shape(size)).total == meta_parameters(official_config(size))


@pytest.mark.parametrize("size", OFFICIAL)
def test_a_config_is_read_as_it_is(size: str) -> None:
    """The same numbers from a whole `config.json`, the variants that are no official size too."""
    shape = shape_of(official_config(size), size)
    assert model_parameters(shape).total == meta_parameters(official_config(size))
    if size in OFFICIAL_SIZES:
        built_in = shape_of(shapes.official_config(size), size)
        assert {**vars(built_in), "config": None} == {**vars(shape), "config": None}


@pytest.mark.parametrize("size", ["2B", "4B", "8B"])
@pytest.mark.parametrize("experts", [1, 2, 4, 8])
def test_upcycled_discriminators(size: str, experts: int) -> None:
    """As transformers counts the upcycled configuration, which has no output weight; the scalar head comes on top."""
    config = upcycled_config(official_config(size), DiscriminatorConfig(num_experts=experts))
    shape = read_shape(size).as_discriminator(experts)
    assert model_parameters(shape).total == meta_parameters(config) + shape.hidden_size


@pytest.mark.parametrize("size", OFFICIAL_SIZES)
@pytest.mark.parametrize("pp", [1, 2])
def test_pipeline_stages_and_expert_ranks_hold_the_whole_model_between_them(size: str, pp: int) -> None:
    shape = read_shape(size)
    whole = model_parameters(shape)
    ep = 8 if shape.experts else 1
    layout = ParallelConfig(pipeline_model_parallel_size=pp, expert_model_parallel_size=ep)
    stages = [rank_parameters(shape, layout, stage) for stage in range(pp)]
    second_copy = shape.vocab_size * shape.hidden_size if shape.tied and pp > 1 else 0
    assert sum(stage.dense for stage in stages) == whole.dense + second_copy
    assert sum(stage.experts for stage in stages) * ep == whole.experts
    if shape.experts:
        assert whole.experts == shape.num_layers * shape.experts.count * expert_parameters(shape)
