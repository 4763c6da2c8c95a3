"""AdamW as Megatron runs it, held to torch's; the learning rate by hand; and what a gradient that is not finite does: nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rows import build_model, one_rank
from helpers.stages import trainer_of, written
from helpers.tiny import tiny_model
from torch import Tensor

from prism_nemo.config.enums import DecayStyle, Precision
from prism_nemo.config.schema import DiscriminatorConfig, ModelConfig, OptimizerConfig, ParallelConfig
from prism_nemo.engine.optimizer import ModelOptimizer, StepResult, learning_rate, wrap_data_parallel
from prism_nemo.errors import PrismError
from prism_nemo.models.base import TrainableModel
from prism_nemo.models.discriminator import DiscriminatorModel
from prism_nemo.models.policy import PolicyModel
from prism_nemo.run_directory import read_json_lines

CONSTANT = DecayStyle.constant


# The schedule


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        # warm-up over 2 of 10 steps to 4, then 8 steps down towards 2
        (DecayStyle.constant, [2, 4, 4, 4, 4, 4, 4, 4, 4, 4]),
        (DecayStyle.linear, [2, 4, 4, 3.75, 3.5, 3.25, 3, 2.75, 2.5, 2.25]),
        (DecayStyle.cosine, [2, 4, 4, 3.923880, 3.707107, 3.382683, 3, 2.617317, 2.292893, 2.076120]),
    ],
)
@pytest.mark.parametrize("warmup", [{"lr_warmup_iters": 2}, {"lr_warmup_fraction": 0.2}])
def test_rates_by_hand(style: DecayStyle, expected: list[float], warmup: dict[str, Any]) -> None:
    config = OptimizerConfig(lr=4, min_lr=2, lr_decay_style=style, **warmup)
    assert [learning_rate(step, config, 10) for step in range(10)] == pytest.approx(expected, abs=1e-6)


def test_rates_at_the_edges() -> None:
    assert [learning_rate(step, OptimizerConfig(lr=3), 1) for step in (0, 1, 50)] == pytest.approx([3, 0, 0])
    config = OptimizerConfig(lr=4, min_lr=1, lr_decay_style=DecayStyle.linear, lr_warmup_iters=3)
    assert [learning_rate(step, config, 3) for step in range(4)] == pytest.approx([4 / 3, 8 / 3, 4, 4])
    assert learning_rate(1000, config, 5) == 1


# AdamW


def policy(**options: Any) -> PolicyModel:
    model = PolicyModel(
        ModelConfig(
            path=str(tiny_model(experts=options.pop("experts", False)).directory),
            precision=options.pop("precision", Precision.fp32),
        ),
        ParallelConfig(),
        one_rank(),
    )
    model.build_optimizer(
        OptimizerConfig(lr=0.01, lr_decay_style=options.pop("style", CONSTANT), weight_decay=0.3, **options), 10
    )
    return model


def put_gradients(model: TrainableModel, seed: int, scale: float) -> dict[str, Tensor]:
    """The same random gradients for the same seed, where Megatron collects them."""
    generator = torch.Generator().manual_seed(seed)
    model.prepare_for_training_step()
    for parameter in model.module.parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return {name: parameter.main_grad.clone() for name, parameter in model.module.named_parameters()}


def is_decayed(name: str, parameter: Tensor) -> bool:
    return parameter.dim() > 1 and not name.endswith(".bias")


def reference(model: TrainableModel, config: OptimizerConfig) -> tuple[dict[str, torch.nn.Parameter], torch.optim.AdamW]:
    own = {name: torch.nn.Parameter(value.detach().float().clone()) for name, value in model.module.named_parameters()}
    groups = [
        {
            "params": [value for name, value in own.items() if is_decayed(name, value) == decayed],
            "weight_decay": config.weight_decay * decayed,
        }
        for decayed in (True, False)
    ]
    return own, torch.optim.AdamW(groups, lr=config.lr, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_eps)


@pytest.mark.parametrize("clip_grad", [1.0, 0.0])
@pytest.mark.parametrize("experts", [False, True])
def test_steps_are_torchs_with_gradients_clipped_by_their_global_norm(experts: bool, clip_grad: float) -> None:
    """Four steps with a cosine schedule, one of them within the clip."""
    model = policy(experts=experts, style=DecayStyle.cosine, clip_grad=clip_grad, adam_beta2=0.9, adam_eps=1e-3)
    assert model.optimizer is not None
    config = model.optimizer.config
    own, adamw = reference(model, config)
    for step, scale in enumerate((1.0, 1e-4, 30.0, 1.0)):
        grads = put_gradients(model, step, scale)
        norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads.values()))
        assert (norm < 1) == (scale < 1)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(step, config, 10)
        for name, parameter in own.items():
            parameter.grad = grads[name] * (min(1.0, clip_grad / norm) if clip_grad else 1.0)
        adamw.step()
        model.finish_training_step()
        result = model.optimizer_step(step)
        assert result.applied
        assert result.grad_norm == pytest.approx(norm, rel=1e-5)
        assert result.learning_rate == learning_rate(step, config, 10)
    for name, parameter in model.module.named_parameters():
        torch.testing.assert_close(
            parameter.detach(), own[name].detach(), rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_matrices_decay_and_biases_and_norms_do_not() -> None:
    """As the step that was taken had it: embeddings, routers, the patch convolution and the score head decay too."""
    config = DiscriminatorConfig(path=str(tiny_model().directory), precision=Precision.fp32)
    model = DiscriminatorModel(config, ParallelConfig(), one_rank(), seed=0)
    model.build_optimizer(OptimizerConfig(weight_decay=0.3), 1)
    assert model.optimizer is not None
    put_gradients(model, 0, 1.0)
    model.optimizer_step(0)
    names = {id(parameter): name for name, parameter in model.module.named_parameters()}
    decay: dict[str, float] = {}
    for part in model.optimizer.optimizer.chained_optimizers:
        for group in part.param_groups:
            decay |= {names[id(parameter)]: group["weight_decay"] for parameter in group["params"]}
    assert decay.keys() == dict(model.module.named_parameters()).keys()
    for name, parameter in model.module.named_parameters():
        assert decay[name] == (0.3 if is_decayed(name, parameter) else 0.0), name
    for part in ("word_embeddings.weight", "router.weight", "score_head.weight", "experts", "patch_embed", "pos_embed"):
        assert {value for name, value in decay.items() if part in name and not name.endswith("bias")} == {0.3}, part
    assert {value for name, value in decay.items() if "norm" in name} == {0.0}


def test_bf16_weights_follow_fp32_masters() -> None:
    """Updates far below bfloat16's resolution add up; weights are the masters, rounded."""
    model = policy(precision=Precision.bf16, clip_grad=0.0)
    own, adamw = reference(model, OptimizerConfig(lr=1e-4, weight_decay=0.3))
    assert model.optimizer is not None
    model.optimizer.config.lr = 1e-4
    before = {name: value.detach().clone() for name, value in model.module.named_parameters()}
    for step in range(6):
        grads = put_gradients(model, 0, 1.0)
        assert all(grad.dtype == torch.float32 for grad in grads.values())
        for name, parameter in own.items():
            parameter.grad = grads[name]
        adamw.step()
        assert model.optimizer_step(step).applied
        if step == 0:
            after_one = {name: value.detach().clone() for name, value in model.module.named_parameters()}
    moved_at_once = moved = 0
    for name, parameter in model.module.named_parameters():
        assert parameter.dtype == torch.bfloat16
        torch.testing.assert_close(parameter.detach(), own[name].detach().bfloat16(), rtol=2**-7, atol=1e-7)
        moved_at_once += int((after_one[name] != before[name]).sum())
        moved += int((parameter != before[name]).sum())
    assert moved > 2 * moved_at_once


# Not finite


def state_of(model: TrainableModel) -> dict[str, Tensor]:
    """Weights, moments and step counters."""
    assert model.optimizer is not None
    state = {name: parameter.detach().clone() for name, parameter in model.module.named_parameters()}
    for number, part in enumerate(model.optimizer.optimizer.chained_optimizers):
        for index, moments in enumerate(part.optimizer.state.values()):
            state |= {f"{number}/{index}/{key}": torch.as_tensor(value).clone() for key, value in moments.items()}
    return state


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("precision", list(Precision))
def test_a_gradient_that_is_not_finite_changes_nothing(value: float, precision: Precision) -> None:
    model = policy(precision=precision)
    put_gradients(model, 0, 1.0)
    assert model.optimizer_step(0).applied
    before = state_of(model)
    assert any(name.endswith("/exp_avg") and float(moment.abs().sum()) > 0 for name, moment in before.items())
    put_gradients(model, 1, 1.0)
    *_, last = model.module.parameters()
    last.main_grad.view(-1)[-1] = value
    result = model.optimizer_step(1)
    assert not result.applied
    assert not math.isfinite(result.grad_norm)
    after = state_of(model)
    assert after.keys() == before.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    put_gradients(model, 2, 1.0)
    assert model.optimizer_step(2).applied
    moved = state_of(model)
    assert [name for name in before if name.endswith("/step") and float(moved[name]) != 2] == []
    assert all(bool(tensor.isfinite().all()) for tensor in moved.values())


def test_a_finite_gradient_whose_norm_overflows_changes_nothing() -> None:
    """Squares beyond float32's range: clipping by an infinite norm would make every gradient zero."""
    model = policy()
    put_gradients(model, 0, 1.0)
    next(iter(model.module.parameters())).main_grad.fill_(1e25)
    before = state_of(model)
    assert not model.optimizer_step(0).applied
    after = state_of(model)
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


def spoil_steps(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """The gradient of these steps (from 1, of this process's count) is not finite."""
    apply = ModelOptimizer.step
    count = iter(range(1, 100))

    def step(self: ModelOptimizer, number: int) -> StepResult:
        if next(count) in steps:
            next(iter(self.chunks[0].parameters())).main_grad.view(-1)[0] = math.nan
        return apply(self, number)

    monkeypatch.setattr(ModelOptimizer, "step", step)


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "run"


def fit(stage: str, run: Path, *overrides: str) -> TrainableModel:
    with trainer_of(stage, run, *overrides) as trainer:
        trainer.fit()
    return trainer


def test_the_run_stops_after_bad_steps_in_a_row_and_names_their_samples(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil_steps(monkeypatch, {2, 4, 5})
    with pytest.raises(PrismError, match="the gradient was not finite in 2 steps in a row") as caught:
        fit("sft", run, "trainer.max_steps=7", "trainer.max_bad_steps=2", "trainer.save_interval=1")
    assert caught.value.where == str(run / "bad_samples.jsonl")
    assert "learning rate" in str(caught.value.remedy)
    rows = list(read_json_lines(run / "bad_samples.jsonl"))
    assert [row["reason"] for row in rows] == ["the gradient is not finite"] * 3
    assert all(len(row["samples"]) == 8 and all(name.startswith("public-") for name in row["samples"]) for row in rows)
    metrics, _ = written(run)
    assert [row["step"] for row in metrics] == [1, 2, 3, 4], "the step that ends the run is not done"
    assert [math.isfinite(row["grad_norm"]) for row in metrics] == [True, False, True, False]
    assert (run / "checkpoints" / "latest").read_text() == "step_00000004"


def test_bad_steps_are_counted_over_a_resume(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        spoil_steps(patch, {2})
        fit("sft", run, "trainer.max_steps=2", "trainer.max_bad_steps=2")
    spoil_steps(monkeypatch, {1})
    with pytest.raises(PrismError, match="in 2 steps in a row"):
        fit("sft", run, "trainer.max_steps=4", "trainer.max_bad_steps=2")


def test_a_score_that_is_not_finite_moves_neither_model(run: Path) -> None:
    with trainer_of("align", run, "trainer.max_steps=4", "trainer.max_bad_steps=2") as trainer:
        with torch.no_grad():
            trainer.discriminator.module.score_head.weight[0, 0] = math.nan
        before = state_of(trainer.policy), state_of(trainer.discriminator)
        with pytest.raises(PrismError, match="a score was not finite in 2 steps in a row"):
            trainer.fit()
        for old, model in zip(before, (trainer.policy, trainer.discriminator), strict=True):
            new = state_of(model)
            assert [name for name in old if not torch.equal(old[name].nan_to_num(9), new[name].nan_to_num(9))] == []
    rows = list(read_json_lines(run / "bad_samples.jsonl"))
    assert [(row["reason"], len(row["samples"])) for row in rows] == [("a score is not finite", 4)] * 2
    (first,) = written(run)[0]
    assert "discriminator/loss" in first


@pytest.mark.parametrize("stage", ["align", "rlvr"])
def test_a_policy_that_is_not_finite_says_so(stage: str, run: Path) -> None:
    with trainer_of(stage, run) as trainer:
        with torch.no_grad():
            trainer.policy.module.language_model.embedding.word_embeddings.weight.fill_(math.nan)
        with pytest.raises(PrismError, match="logits are not finite"):
            trainer.fit()


def test_an_optimizer_without_anything_to_train(run: Path) -> None:
    """Megatron's DDP over a module whose tower is frozen has fewer gradients; the norm is that of the rest."""
    module = build_model(tiny_model().directory)
    for parameter in module.vision_model.parameters():
        parameter.requires_grad_(False)
    optimizer = ModelOptimizer(
        wrap_data_parallel(module, ParallelConfig()), OptimizerConfig(lr_decay_style=CONSTANT), ParallelConfig(), 1
    )
    optimizer.zero_grad()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.main_grad.fill_(0.5)
    expected = 0.5 * math.sqrt(sum(parameter.numel() for parameter in trained))
    assert optimizer.step(0).grad_norm == pytest.approx(expected, rel=1e-5)
