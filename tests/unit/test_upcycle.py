"""Sparse upcycling: what is copied, what is drawn, and that a discriminator of equal experts is the dense model."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.rows import one_rank
from helpers.tiny import make_group, tiny_model
from torch import Tensor

from prism_nemo.config.enums import Precision, Routing
from prism_nemo.config.schema import DiscriminatorConfig, ParallelConfig
from prism_nemo.convert.random_init import named_normal
from prism_nemo.convert.upcycling import dense_source, upcycled_config
from prism_nemo.errors import ConfigError
from prism_nemo.models.discriminator import DiscriminatorModel
from prism_nemo.models.weights import canonical_parameters
from prism_nemo.packing.groups import SegmentKind
from prism_nemo.packing.rows import make_row

KINDS = (SegmentKind.PERCEPTION, SegmentKind.REASONING)
CONFIG = DiscriminatorConfig(path=str(tiny_model().directory), precision=Precision.fp32)
ROW = make_row([make_group([(4, 6)], (5, 9, 3, 7), seed=1, kinds=KINDS), make_group((), (6, 2), seed=2, kinds=KINDS)])
EXPERT = re.compile(r"\.mlp\.experts\.linear_fc[12]\.weight\d+$")


def build(*, seed: int = 5, **options: Any) -> DiscriminatorModel:
    return DiscriminatorModel(replace(CONFIG, **options), ParallelConfig(), one_rank(), seed=seed)


def weights(model: DiscriminatorModel) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in canonical_parameters(model.module, model.hf_config).items()}


@pytest.fixture(scope="module")
def dense() -> DiscriminatorModel:
    return build(num_experts=1)


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that are not bit-equal."""
    assert found.keys() == expected.keys()
    return {name for name in expected if not torch.equal(found[name], expected[name])}


@pytest.mark.parametrize("routing", list(Routing))
@pytest.mark.parametrize(("num_experts", "topk"), [(4, 2), (8, 3)])
def test_equal_experts_are_the_dense_model_whatever_the_router(
    dense: DiscriminatorModel, num_experts: int, topk: int, routing: Routing
) -> None:
    """Their weights sum to 1. The router is drawn wide, so that its choices and weights are uneven."""
    options = {"num_experts": num_experts, "moe_router_topk": topk, "routing": routing}
    model = build(**options, expert_noise_std=0.0, router_init_std=3.0)
    (expected,) = dense.infer([ROW])
    model.start_batch([ROW])
    (found,) = model.infer([ROW])
    assert len(expected.unique()) == ROW.num_segments
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    shares = [value for name, value in model.router_metrics().items() if name.startswith("expert_load/")]
    assert max(shares) - min(shares) > 0.05
    (noisy,) = build(**options, expert_noise_std=0.05, router_init_std=3.0).infer([ROW])
    assert float((noisy - expected).abs().max()) > 1e-4


def test_everything_but_experts_router_and_head_is_the_dense_models(dense: DiscriminatorModel) -> None:
    before, after = weights(dense), weights(build())
    drawn = {name for name in after if EXPERT.search(name) or name.endswith(".mlp.router.weight")}
    copied = set(after) - drawn
    assert len(copied) > 50
    assert {name for name in copied if not torch.equal(after[name], before[dense_source(name)])} == set()
    assert {dense_source(name) for name in after if not name.endswith(".mlp.router.weight")} == set(before), "nothing left out"


def test_noise_router_and_head_are_of_the_given_width(dense: DiscriminatorModel) -> None:
    before = weights(dense)
    after = weights(build(expert_noise_std=0.05, router_init_std=0.5, head_init_std=0.7))
    noise = {name: after[name] - before[dense_source(name)] for name in after if EXPERT.search(name)}
    assert len(noise) == 4 * 4 * 2  # layers, experts, matrices
    for tensor in noise.values():
        assert float(tensor.std()) == pytest.approx(0.05, rel=0.05)
        assert abs(float(tensor.mean())) < 4 * 0.05 / tensor.numel() ** 0.5
    pooled = torch.cat([tensor.flatten() for tensor in noise.values()])
    assert float(pooled.std()) == pytest.approx(0.05, rel=0.01)
    assert float(pooled.abs().max()) < 0.05 * 7
    shapes = [list(noise.values())[start::2] for start in (0, 1)]
    for same_shape in shapes:
        stacked = torch.stack([tensor.flatten() for tensor in same_shape])
        correlation = torch.corrcoef(stacked).fill_diagonal_(0)
        assert float(correlation.abs().max()) < 0.1, "every expert's noise is its own"
    router = torch.cat([tensor.flatten() for name, tensor in after.items() if name.endswith(".mlp.router.weight")])
    assert float(router.std()) == pytest.approx(0.5, rel=0.1)
    assert float(after["score_head.weight"].std()) == pytest.approx(0.7, rel=0.3)
    assert after["score_head.weight"].shape == (1, 64)


def test_a_tensor_depends_on_seed_and_name_alone(dense: DiscriminatorModel) -> None:
    first, again = weights(build(seed=5)), weights(build(seed=5, num_experts=4))
    assert equal(again, first) == set()
    other = weights(build(seed=6))
    drawn = {name for name in first if EXPERT.search(name) or name.endswith(".router.weight") or name == "score_head.weight"}
    assert equal(other, first) == drawn
    fewer = weights(build(num_experts=2))
    shared = {name for name in fewer if name in first and fewer[name].shape == first[name].shape}
    assert sum(EXPERT.search(name) is not None for name in shared) == 4 * 2 * 2
    assert all(torch.equal(fewer[name], first[name]) for name in shared)
    assert torch.equal(weights(dense)["score_head.weight"], first["score_head.weight"])
    head = named_normal("score_head.weight", (1, 64), CONFIG.head_init_std, 5)
    assert torch.equal(first["score_head.weight"], head)


def test_noise_in_bfloat16_is_added_in_float32() -> None:
    """Rounded once: added in bf16, noise of 0.01 on weights of order 1 would be rounded away or doubled."""
    exact = weights(build(num_experts=2))
    rounded = weights(build(num_experts=2, precision=Precision.bf16))
    (name,) = [key for key in exact if key.endswith("layers.0.mlp.experts.linear_fc1.weight0")]
    dense_bf16 = weights(build(num_experts=1, precision=Precision.bf16))[dense_source(name)]
    noise = named_normal(name, tuple(exact[name].shape), CONFIG.expert_noise_std, 5)
    assert torch.equal(rounded[name], (dense_bf16.float() + noise).bfloat16())
    assert rounded[name].dtype == torch.bfloat16


def test_the_upcycled_config_is_an_moe_models_with_the_dense_width() -> None:
    source = tiny_model().config
    before = {**source, "text_config": dict(source["text_config"])}
    config = upcycled_config(source, CONFIG)
    assert config["model_type"] == "qwen3_vl_moe"
    text = config["text_config"]
    assert (text["num_experts"], text["num_experts_per_tok"], text["moe_intermediate_size"]) == (4, 2, 96)
    assert text["norm_topk_prob"] is True
    assert source == before, "the dense model's own configuration stays as it was"
    unchanged = upcycled_config(source, replace(CONFIG, num_experts=1))
    assert unchanged["model_type"] == "qwen3_vl"
    assert unchanged["text_config"] == source["text_config"]


def test_a_model_with_experts_is_not_upcycled() -> None:
    with pytest.raises(ConfigError, match="has experts already") as caught:
        build(path=str(tiny_model(experts=True).directory))
    assert caught.value.where == "discriminator.path"


def test_an_untied_model_loses_its_output_matrix_only(dense: DiscriminatorModel) -> None:
    """The tiny model is untied; a discriminator reads the last hidden state and has no use for the output matrix."""
    assert tiny_model().config["tie_word_embeddings"] is False
    assert not any("output_layer" in name for name in weights(dense))
    assert any("word_embeddings" in name for name in weights(dense))
