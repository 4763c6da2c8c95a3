"""The discriminator as a model: scores, what they depend on, checkpoints, router metrics, freezing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rows import gradients, one_rank, relative_errors
from helpers.stages import run_stage, stage_config, trained_discriminator, trained_policy
from helpers.tiny import PATCH_WIDTH, make_group, make_prompt, random_tokens, tiny_model
from torch import Tensor

from prism_nemo.algorithms.metrics import MetricSums
from prism_nemo.config.enums import Precision, Routing
from prism_nemo.config.schema import DiscriminatorConfig, OptimizerConfig, ParallelConfig
from prism_nemo.config.validate import validate
from prism_nemo.engine.checkpoint import CheckpointStore
from prism_nemo.errors import CheckpointError, ConfigError
from prism_nemo.experiment import read_metrics
from prism_nemo.models.base import TrainingBatch
from prism_nemo.models.discriminator import DiscriminatorModel
from prism_nemo.packing.groups import Group, Segment, SegmentKind, without_images
from prism_nemo.packing.rows import PackedRow, make_row

PERCEPTION, REASONING = KINDS = (SegmentKind.PERCEPTION, SegmentKind.REASONING)
CONFIG = DiscriminatorConfig(
    path=str(tiny_model().directory), precision=Precision.fp32, expert_noise_std=0.05, router_init_std=0.3, head_init_std=0.5
)
VARIANTS = {
    "learned": {},
    "dedicated": {"routing": Routing.dedicated},
    "dense": {"num_experts": 1},
}
GROUPS = [make_group([(4, 6)], (5, 9, 3, 7), seed=1, kinds=KINDS), make_group((), (6, 2), seed=2, kinds=KINDS)]


def build(**options: Any) -> DiscriminatorModel:
    return DiscriminatorModel(replace(CONFIG, **options), ParallelConfig(), one_rank(), seed=5)


@pytest.fixture(scope="module", params=VARIANTS)
def model(request: pytest.FixtureRequest) -> DiscriminatorModel:
    return build(**VARIANTS[request.param])


# Scores


@pytest.mark.parametrize("kind", KINDS)
def test_identical_texts_get_identical_scores_wherever_they_stand(model: DiscriminatorModel, kind: SegmentKind) -> None:
    """The teacher's at the front, a student's among longer and shorter ones, and one in another copy of the group."""
    text = random_tokens(7, 3)

    def segment(sample: int, tokens: Tensor = text) -> Segment:
        return Segment(tokens, sample, kind)

    def other(sample: int, length: int) -> Segment:
        return Segment(random_tokens(length, 50 + sample), sample, KINDS[sample % 2])

    prompt = make_prompt([(4, 6)], seed=4)
    first = Group(prompt, (segment(-1), other(0, 3), segment(1), other(2, 12), other(3, 1), segment(4)))
    second = Group(prompt, (other(5, 4), segment(6)))
    between = make_group([(2, 4)], (8, 3), seed=9, kinds=KINDS)
    row = make_row([first, between, second], pad_multiple=16)
    (scores,) = model.infer([row])
    same = torch.isin(row.segment_sample, torch.tensor([-1, 1, 4, 6])) & (row.layout.token_group[row.segment_end] != 1)
    assert int(same.sum()) == 4
    assert float(scores[same].max() - scores[same].min()) <= 1e-6
    assert float((scores[~same] - scores[same][0]).abs().min()) > 1e-3
    (alone,) = model.infer([make_row([Group(prompt, (segment(0),))])])
    torch.testing.assert_close(alone.expand(4), scores[same], rtol=0, atol=2e-6)


def test_kind_matters_to_dedicated_experts_alone() -> None:
    """The same tokens as perception and as reasoning: two pools score them differently, free routing and a dense model do not."""
    tokens = random_tokens(7, 3)
    row = make_row([Group(make_prompt((), seed=4), tuple(Segment(tokens, index, kind) for index, kind in enumerate(KINDS)))])
    for name, options in VARIANTS.items():
        (scores,) = build(**options).infer([row])
        difference = float((scores[0] - scores[1]).abs())
        assert difference > 1e-3 if name == "dedicated" else difference <= 1e-6


def test_a_score_is_the_heads_value_at_the_last_token(model: DiscriminatorModel) -> None:
    """Every token before it matters, none behind the segment does, and the head is linear without a bias."""
    prompt = make_prompt([(4, 6)], seed=4)
    tokens = random_tokens(6, 8)

    def scored(*parts: Tensor) -> Tensor:
        return model.infer([make_row([Group(prompt, tuple(Segment(part, i, PERCEPTION) for i, part in enumerate(parts)))])])[0]

    expected = scored(tokens)[0]
    for position in range(6):
        changed = tokens.clone()
        changed[position] = (tokens[position] + 1) % 100
        assert float((scored(changed)[0] - expected).abs()) > 1e-4
    assert float((scored(tokens, random_tokens(9, 1))[0] - expected).abs()) <= 1e-6
    head = model.module.score_head.weight
    with torch.no_grad():
        head.mul_(-3)
        torch.testing.assert_close(scored(tokens)[0], -3 * expected, rtol=1e-5, atol=1e-6)
        head.div_(-3)


def test_text_only_scores_do_not_see_the_image() -> None:
    model = build()
    seen = []
    for seed in (1, 2):
        prompt = replace(
            make_prompt([(4, 6)], seed=1),
            pixel_values=torch.randn(24, PATCH_WIDTH, generator=torch.Generator().manual_seed(seed)),
        )
        segment = Segment(random_tokens(5, 3), 0, PERCEPTION)
        blind = without_images(prompt)
        assert len(blind) == len(prompt) - 6
        rows = [make_row([Group(prompt, (segment,))]), make_row([Group(blind, (segment,))])]
        seen.append([float(scores) for scores in model.infer(rows)])
    (first, first_blind), (second, second_blind) = seen
    assert abs(first - second) > 1e-3
    assert first_blind == second_blind


def test_scoring_drops_nothing_and_training_does_what_the_stage_sets() -> None:
    model = build()
    row = make_row(GROUPS)
    model.module.head_dropout = 0.5
    model.prepare_for_training()
    (first,), (second,) = model.infer([row]), model.infer([row])
    assert torch.equal(first, second)
    assert model.module.training
    with torch.no_grad():
        dropped = torch.stack([model.forward_row(model.module, row) for _ in range(60)])
    assert float((dropped - first).abs().max()) > 0.1
    spread = dropped.std(dim=0) / 60**0.5
    assert bool(((dropped.mean(dim=0) - first).abs() < 5 * spread).all()), "dropout keeps the mean"


def test_an_empty_row_keeps_a_graph_through_everything() -> None:
    """A rank with nothing to score runs one, and its backward pass must meet the others' collectives."""
    model = build()
    scores = model.module(make_row([], patch_size=PATCH_WIDTH), 1.0, None)
    assert scores.shape == (0,) or float(scores.detach().abs().sum()) == 0.0
    assert scores.requires_grad


# Router metrics


def hand_count(model: DiscriminatorModel, row: PackedRow) -> dict[str, Tensor]:
    """How often the tokens of each kind chose each expert, from hooks on the routers."""
    loads = {name: torch.zeros(4) for name in ("prompt", "perception", "reasoning")}
    names = {-1: "prompt", 1: "perception", 2: "reasoning"}
    segment = row.layout.token_segment.tolist()
    kinds = [-1 if index < 0 else int(row.segment_kind[index]) for index in segment]

    def count(_module: Any, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        for kind, choices in zip(kinds, output[1], strict=True):
            loads[names[kind]] += choices

    hooks = [layer.mlp.router.register_forward_hook(count) for layer in model.module.language_model.decoder.layers]
    model.infer([row])
    for hook in hooks:
        hook.remove()
    return loads


@pytest.mark.parametrize("routing", list(Routing))
def test_expert_load_is_counted_per_kind(routing: Routing) -> None:
    model, row = build(routing=routing), make_row(GROUPS)
    expected = hand_count(model, row)
    model.start_batch([row])
    model.infer([row])
    metrics = model.router_metrics()
    for kind, load in expected.items():
        assert float(load.sum()) > 0
        found = torch.tensor([metrics[f"expert_load/{kind}/{expert}"] for expert in range(4)])
        torch.testing.assert_close(found, load / load.sum())
    pools = [
        metrics[f"expert_load/{kind}/{expert}"]
        for kind, expert in (("perception", 2), ("perception", 3), ("reasoning", 0), ("reasoning", 1))
    ]
    assert (max(pools) == 0) == (routing is Routing.dedicated)
    assert 1.9 < metrics["router/balance_loss"] < 4.0
    model.start_batch([row])
    assert model.router_metrics() == {}


def test_a_dense_discriminator_has_no_router_metrics() -> None:
    model = build(num_experts=1)
    model.start_batch([make_row(GROUPS)])
    model.infer([make_row(GROUPS)])
    assert model.router_metrics() == {}


def score_loss(row: PackedRow, scores: Tensor) -> tuple[Tensor, MetricSums]:
    return (scores * (row.segment_sample + 1)).sum(), {}


def gradient_of(model: DiscriminatorModel, coefficient: float) -> dict[str, Tensor]:
    model.module.options = replace(model.module.options, moe_aux_loss_coeff=coefficient)
    rows = [make_row(GROUPS)]
    model.prepare_for_training_step()
    model.start_batch(rows)
    model.get_loss_and_metrics(TrainingBatch(rows, score_loss), forward_only=False)
    model.finish_training_step()
    return gradients(model.module, model.hf_config, score_head=True)


def test_the_balancing_loss_reaches_the_gradient_in_proportion() -> None:
    model = build()
    model.build_optimizer(OptimizerConfig(), 1)
    without, with_one, with_two = (gradient_of(model, coefficient) for coefficient in (0.0, 0.5, 1.0))
    routers = [name for name in without if name.endswith("mlp.gate.weight")]
    assert len(routers) == 4
    for name in routers:
        added = with_one[name] - without[name]
        assert float(added.norm()) > 1e-3 * float(without[name].norm())
        torch.testing.assert_close(with_two[name] - without[name], 2 * added, rtol=1e-3, atol=1e-5)
    assert torch.equal(with_two["value_head.weight"], without["value_head.weight"])


# Freezing


def test_a_frozen_tower_has_no_gradient_and_does_not_move() -> None:
    model = build(freeze_vision_model=True)
    model.build_optimizer(OptimizerConfig(lr=0.1, lr_decay_style="constant", weight_decay=0.1), 1)
    tower = {name: parameter.detach().clone() for name, parameter in model.module.vision_model.named_parameters()}
    language = {name: parameter.detach().clone() for name, parameter in model.module.language_model.named_parameters()}
    found = gradient_of(model, 0.01)
    assert model.optimizer_step(0).applied
    after = dict(model.module.vision_model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in tower.items())
    assert not any(parameter.requires_grad for parameter in after.values())
    moved = [name for name, value in model.module.language_model.named_parameters() if not torch.equal(value, language[name])]
    assert len(moved) == len(language)
    free = build()
    free.build_optimizer(OptimizerConfig(), 1)
    expected = gradient_of(free, 0.01)
    errors = relative_errors(found, expected)
    assert all(value <= 1e-5 for name, value in errors.items() if "visual" not in name)
    assert all(float(expected[name].norm()) > 0 for name in expected if "visual" in name and "pos_embed" not in name)


# Checkpoints


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CheckpointStore]:
    yield CheckpointStore(tmp_path, one_rank(), keep_last_k=1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_saved_discriminator_is_loaded_bit_by_bit(variant: str, store: CheckpointStore, tmp_path: Path) -> None:
    """By the run's folder, with options for another upcycling, which must not be done again."""
    model = build(**VARIANTS[variant])
    store.save(1, {"discriminator": model}, {})
    again = build(path=str(tmp_path), expert_noise_std=9.0, router_init_std=9.0, head_init_std=9.0, **VARIANTS[variant])
    expected = dict(model.module.named_parameters())
    found = dict(again.module.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    row = make_row(GROUPS)
    assert torch.equal(again.infer([row])[0], model.infer([row])[0])


def test_the_warm_ups_discriminator_is_what_align_starts_from() -> None:
    config = stage_config("align", Path("unused"))
    model = DiscriminatorModel(config.discriminator, config.parallel, one_rank(), seed=99)
    policy_config = replace(config.discriminator, path=str(trained_policy()))
    fresh = DiscriminatorModel(policy_config, config.parallel, one_rank(), seed=config.runtime.seed)
    moved = {name: not torch.equal(value, fresh.module.get_parameter(name)) for name, value in model.module.named_parameters()}
    assert sum(moved.values()) > 0.9 * len(moved), "warm-up has trained it"
    assert model.hf_config["model_type"] == "qwen3_vl_moe"
    assert (model.assets / "tokenizer.json").is_file()


def test_a_policys_run_is_upcycled_and_a_discriminators_is_not() -> None:
    """Both lie in a run directory; which it is says the folder below."""
    config = replace(CONFIG, num_experts=2)
    upcycled = DiscriminatorModel(replace(config, path=str(trained_policy())), ParallelConfig(), one_rank(), seed=0)
    assert upcycled.module.shape.moe.num_experts == 2
    loaded = DiscriminatorModel(replace(config, path=str(trained_discriminator())), ParallelConfig(), one_rank(), seed=0)
    assert loaded.module.shape.moe.num_experts == 4


def test_one_expert_a_token_is_refused_before_anything_is_built() -> None:
    """Megatron would, with a traceback."""
    config = stage_config("warmup", Path("unused"), "discriminator.num_experts=2", "discriminator.moe_router_topk=1")
    with pytest.raises(ConfigError, match="the router learns nothing") as caught:
        validate(config)
    assert caught.value.where == "discriminator.moe_router_topk"
    validate(replace(config, discriminator=replace(config.discriminator, num_experts=1)))


def test_no_path_and_no_such_path() -> None:
    with pytest.raises(ConfigError, match="no discriminator is given"):
        build(path=None)
    with pytest.raises(CheckpointError, match="no such directory"):
        build(path="/nowhere/at/all")


# Ablations, as stages


@pytest.mark.parametrize(
    "overrides",
    [
        ("discriminator.view=whole",),
        ("discriminator.use_images=false", "discriminator.routing=dedicated"),
        ("discriminator.num_experts=1", "discriminator.freeze_vision_model=true"),
    ],
    ids=lambda overrides: overrides[0].partition(".")[2],
)
def test_ablations_run_through_warm_up_and_alignment(overrides: tuple[str, ...], tmp_path: Path) -> None:
    short = ("trainer.max_steps=2", *overrides)
    run_stage("warmup", tmp_path / "warmup", *short)
    run_stage("align", tmp_path / "align", f"discriminator.path={tmp_path / 'warmup'}", *short)
    kinds = {"response"} if "discriminator.view=whole" in overrides else {"perception", "reasoning"}
    for name, prefix in (("warmup", ""), ("align", "discriminator/")):
        last = [row for row in read_metrics(tmp_path / name) if row["prefix"] == "train"][-1]
        measured = {key.removeprefix(prefix).split("/")[0] for key in last if key.endswith("/margin")}
        assert measured == kinds
        assert any(key.startswith(f"{prefix}expert_load") for key in last) == ("discriminator.num_experts=1" not in overrides)
    probe = {name.split("/")[-2] for row in read_metrics(tmp_path / "align") for name in row if name.endswith("/content_probe")}
    assert probe == kinds
