"""What ranks really hold and keep under a layout, against what the planner says: modules built and run on two ranks."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
from helpers.ranks import run_ranks
from helpers.tiny import make_group, tiny_model

from prism_nemo.config.enums import Device, Precision
from prism_nemo.config.schema import DiscriminatorConfig, ParallelConfig, RuntimeConfig
from prism_nemo.plan.activations import Attention, Cost, Row, saved_bytes
from prism_nemo.plan.parameters import rank_parameters
from prism_nemo.plan.shapes import shape_of

# (name, layout, experts, tied, discriminator)
LAYOUTS: dict[str, tuple[dict[str, Any], bool, bool, bool]] = {
    "tp2": ({"tensor_model_parallel_size": 2}, False, False, False),
    "tp2, sp": ({"tensor_model_parallel_size": 2, "sequence_parallel": True}, False, True, False),
    "tp2, experts": ({"tensor_model_parallel_size": 2}, True, False, False),
    "ep2": ({"expert_model_parallel_size": 2}, True, False, False),
    "tp2, ep2": ({"tensor_model_parallel_size": 2, "expert_model_parallel_size": 2}, True, False, False),
    "tp2, discriminator": ({"tensor_model_parallel_size": 2}, True, True, True),
    "dp2": ({}, False, True, False),
    "cp2": ({"context_parallel_size": 2}, False, False, False),
    "cp2, experts": ({"context_parallel_size": 2, "expert_model_parallel_size": 2}, True, False, False),
    "cp2, discriminator": ({"context_parallel_size": 2}, True, True, True),
}
COUNTED: dict[str, tuple[dict[str, Any], bool, bool, bool]] = {
    "pp2": ({"pipeline_model_parallel_size": 2}, False, False, False),
    "pp2, tied": ({"pipeline_model_parallel_size": 2}, False, True, False),
    "pp2, experts": ({"pipeline_model_parallel_size": 2}, True, False, False),
    "pp2, first stage smaller": (
        {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1},
        False,
        False,
        False,
    ),
    "pp2, last stage smaller": ({"pipeline_model_parallel_size": 2, "num_layers_in_last_pipeline_stage": 1}, True, True, False),
    "pp2, discriminator": ({"pipeline_model_parallel_size": 2}, True, True, True),
}


def build(layout: ParallelConfig, config: dict[str, Any], *, discriminator: bool) -> Any:
    from prism_nemo.models.discriminator import DiscriminatorModule
    from prism_nemo.models.policy import PolicyModule
    from prism_nemo.models.qwen3_vl.config import Qwen3VLShape

    shape = Qwen3VLShape.from_hf(config)
    if discriminator:
        return DiscriminatorModule(shape, layout, DiscriminatorConfig(precision=Precision.fp32))
    return PolicyModule(shape, layout, Precision.fp32)


def config_of(experts: bool, tied: bool) -> dict[str, Any]:
    """The tiny model's configuration, wider: what the planner leaves out (a router's few numbers) should weigh little."""
    config = copy.deepcopy(tiny_model(experts=experts, tied=tied).config)
    config["text_config"] |= {"hidden_size": 192, "intermediate_size": 448, "head_dim": 32}
    config["text_config"]["rope_scaling"] = {"rope_type": "default", "mrope_section": [6, 5, 5]}
    config["vision_config"] |= {"hidden_size": 96, "intermediate_size": 160, "out_hidden_size": 192}
    if experts:
        config["text_config"]["moe_intermediate_size"] = 224
    return config


def held_and_kept(configs: dict[tuple[bool, bool], dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of this rank: parameters by kind and, where it has a whole model, the bytes that one row keeps for its backward pass."""
    import torch
    import torch.distributed as dist

    from prism_nemo.engine.runtime import session

    found = {}
    with session(ParallelConfig(), RuntimeConfig(device=Device.cpu)):
        for name, (sizes, experts, tied, discriminator) in {**LAYOUTS, **COUNTED}.items():
            layout = ParallelConfig(**sizes)
            with session(layout, RuntimeConfig(device=Device.cpu)):
                module = build(layout, configs[experts, tied], discriminator=discriminator)
                counts = {"vision": 0, "language": 0, "experts": 0}
                for parameter_name, parameter in module.named_parameters():
                    is_vision = parameter_name.startswith("vision_model.")
                    kind = "experts" if ".experts." in parameter_name else "vision" if is_vision else "language"
                    counts[kind] += parameter.numel()
                    torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(dist.get_rank()))
                found[name] = {**counts, "kept": kept_by(module, discriminator) if name in LAYOUTS else 0.0}
    return found


def kept_by(module: Any, discriminator: bool) -> float:
    """Bytes of distinct storages, other than weights and the row's own indices, that the forward pass saves."""
    import torch

    from prism_nemo.models.policy import OutputDistribution
    from prism_nemo.packing.rows import make_row

    row = make_row([group()], pad_multiple=4)
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.is_floating_point():
            storages[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if discriminator:
            module(row, 1.0, None)
        else:
            module(row, OutputDistribution(), False)
    return float(sum(storages.values()))


def group() -> Any:
    """Two images, for context-parallel ranks to share."""
    return make_group([(16, 16), (16, 16)], [96], seed=1)


def row_of(discriminator: bool) -> Row:
    tokens = group().num_tokens
    return Row(tokens + -tokens % 4, visual_tokens=128, labels=0 if discriminator else 96, images=2)


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, dict[str, float]]]:
    configs = {(experts, tied): config_of(experts, tied) for experts in (False, True) for tied in (False, True)}
    return run_ranks(held_and_kept, 2, configs)


@pytest.mark.parametrize("name", [*LAYOUTS, *COUNTED])
def test_ranks_hold_exactly_as_many_parameters(name: str, ranks: list[dict[str, dict[str, float]]]) -> None:
    sizes, experts, tied, discriminator = {**LAYOUTS, **COUNTED}[name]
    layout = ParallelConfig(**sizes)
    shape = replace(shape_of(config_of(experts, tied), name), is_discriminator=discriminator)
    for rank, found in enumerate(ranks):
        stage = rank if layout.pipeline_model_parallel_size == 2 else 0
        assert vars(rank_parameters(shape, layout, stage)) == {
            kind: found[name][kind] for kind in ("vision", "language", "experts")
        }


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_keep_as_much_for_the_backward_pass(name: str, ranks: list[dict[str, dict[str, float]]]) -> None:
    """Within 3%: the model leaves out small tensors, such as the router's, which weigh more in a tiny model."""
    sizes, experts, tied, discriminator = LAYOUTS[name]
    layout = ParallelConfig(**sizes)
    shape = replace(shape_of(config_of(experts, tied), name), is_discriminator=discriminator)
    saved = saved_bytes(shape, row_of(discriminator), layout, Cost(value_bytes=4, attention=Attention.cpu))
    expected = saved.per_layer * shape.num_layers + saved.vision + saved.entry + saved.head
    kept = [found[name]["kept"] for found in ranks]
    # with expert parallelism ranks get more or fewer tokens; between them they get all
    assert sum(kept) / len(kept) == pytest.approx(expected, rel=0.03)
