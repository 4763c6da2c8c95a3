"""The model against transformers' own in fp32: logits, gradients of every parameter, vision tower, weights in and out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.rows import (
    assert_gradients_close,
    build_model,
    gradients,
    one_rank,
    run_row,
    sequences,
    transformers_gradients,
)
from helpers.tiny import PATCH_WIDTH, TinyModel, make_group, make_prompt, tiny_model, transformers_logits
from safetensors.torch import load_file
from transformers import Qwen3VLForConditionalGeneration, Qwen3VLMoeForConditionalGeneration

from prism_nemo.convert.hf import HFWriter, copy_assets
from prism_nemo.models.qwen3_vl.model import Qwen3VLModel
from prism_nemo.models.weights import export_hf_tensors
from prism_nemo.packing.groups import Group
from prism_nemo.packing.rows import make_row

MODELS = {"dense": {}, "dense_tied": {"tied": True}, "moe": {"experts": True}}
SEVERAL_IMAGES = [make_group([(4, 6), (8, 4), (2, 2)], (5, 7, 3), seed=1)]
TEXT = [make_group((), (4, 6), seed=2, text_length=9), make_group((), (8,), seed=3, text_length=5)]
# Grids above and below the 8 x 8 table of positions, a strip, and two images of one size, which the tower runs as one batch.
MIXED = [
    make_group([(4, 4), (2, 12), (4, 4)], (6, 2), seed=4),
    make_group((), (5, 3), seed=5, text_length=7),
    make_group([(10, 2)], (4,), seed=6),
]
CASES = {"several_images": SEVERAL_IMAGES, "text": TEXT, "mixed": MIXED}


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> None:
    one_rank()


@pytest.fixture(scope="module", params=MODELS)
def tiny(request: pytest.FixtureRequest) -> TinyModel:
    return tiny_model(**MODELS[request.param])


@pytest.fixture
def model(tiny: TinyModel) -> Qwen3VLModel:
    return build_model(tiny.directory)


def reference(tiny: TinyModel, groups: list[Group]) -> list[torch.Tensor]:
    """transformers' logits of every `prompt + segment`, each run alone."""
    return [transformers_logits(tiny.hf, group.prompt, segment.tokens) for group in groups for segment in group.segments]


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(tiny: TinyModel, model: Qwen3VLModel, case: str) -> None:
    groups = CASES[case]
    row = make_row(groups, pad_multiple=8)
    weight = torch.randn(row.num_labels, generator=torch.Generator().manual_seed(0))

    output = run_row(model, row)
    logits = output.hidden @ model.language_model.output_weight.t()
    (output.log_probs * weight).sum().backward()

    expected = reference(tiny, groups)
    for index, want in zip(sequences(row.layout), expected, strict=True):
        torch.testing.assert_close(logits[index], want, atol=1e-4, rtol=0)
    targets = [segment.tokens for group in groups for segment in group.segments]
    log_probs = [
        want[-len(tokens) - 1 : -1].log_softmax(dim=-1).gather(1, tokens.unsqueeze(1)).squeeze(1)
        for want, tokens in zip(expected, targets, strict=True)
    ]
    torch.testing.assert_close(output.log_probs, torch.cat(log_probs), atol=1e-4, rtol=0)
    (torch.cat(log_probs) * weight).sum().backward()
    found = gradients(model, tiny.config)
    assert_gradients_close(found, transformers_gradients(tiny.hf), 1e-4)
    reached = {name for name, grad in found.items() if grad.any()}
    assert reached == {name for name in found if case != "text" or not name.startswith("model.visual.")}


def test_vision_tower_equals_transformers(tiny: TinyModel, model: Qwen3VLModel) -> None:
    prompt = make_prompt([(4, 6), (8, 4), (2, 2), (4, 6), (10, 2)], seed=7)
    tokens, features = model.vision_model(prompt.pixel_values, prompt.image_grid_thw)
    expected = tiny.hf.model.visual(prompt.pixel_values, prompt.image_grid_thw)
    pairs = [(tokens, expected.pooler_output), *zip(features, expected.deepstack_features, strict=True)]
    assert len(pairs) == 3
    loss = expected_loss = torch.zeros(())
    for number, (found, want) in enumerate(pairs):
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)
        weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(number))
        loss = loss + (found * weight).sum()
        expected_loss = expected_loss + (want * weight).sum()
    loss.backward()
    expected_loss.backward()
    assert_gradients_close(gradients(model, tiny.config), transformers_gradients(tiny.hf), 1e-5)


def test_an_image_does_not_depend_on_the_other_images(model: Qwen3VLModel) -> None:
    prompt = make_prompt([(4, 6), (4, 6), (2, 8)], seed=8)
    together, features = model.vision_model(prompt.pixel_values, prompt.image_grid_thw)
    alone = [
        model.vision_model(pixels, prompt.image_grid_thw[image : image + 1])
        for image, pixels in enumerate(prompt.pixel_values.split([24, 24, 16]))
    ]
    torch.testing.assert_close(together, torch.cat([tokens for tokens, _ in alone]), atol=1e-5, rtol=1e-5)
    for depth, feature in enumerate(features):
        torch.testing.assert_close(feature, torch.cat([found[depth] for _, found in alone]), atol=1e-5, rtol=1e-5)
    assert (together[:6] - together[6:12]).abs().max() > 1e-2  # same size, other pixels


def test_frozen_tower_leaves_the_rest_as_it_is(tiny: TinyModel, model: Qwen3VLModel) -> None:
    row = make_row(MIXED)
    run_row(model, row).log_probs.sum().backward()
    trained = gradients(model, tiny.config)
    model.zero_grad(set_to_none=True)
    model.vision_model.requires_grad_(False)
    run_row(model, row).log_probs.sum().backward()
    assert all(parameter.grad is None for parameter in model.vision_model.parameters())
    frozen = gradients(model, tiny.config)
    for name, grad in trained.items():
        if name.startswith("model.visual."):
            assert grad.any()
        else:
            torch.testing.assert_close(frozen[name], grad, atol=0, rtol=0)


def test_text_row_reaches_the_tower_only_while_it_is_trained(model: Qwen3VLModel) -> None:
    """No rank may skip the tower's gradient, so that a row without images has one: zeros."""
    row = make_row(TEXT)
    run_row(model, row).log_probs.sum().backward()
    for name, parameter in model.vision_model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    model.zero_grad(set_to_none=True)
    model.vision_model.requires_grad_(False)
    trained = run_row(model, row)
    trained.log_probs.sum().backward()
    assert all(parameter.grad is None for parameter in model.vision_model.parameters())
    with torch.no_grad():
        assert torch.equal(run_row(model, row).hidden, trained.hidden)


def test_row_without_groups_has_zero_gradients_and_no_labels(tiny: TinyModel, model: Qwen3VLModel) -> None:
    row = make_row([], pad_multiple=4, patch_size=PATCH_WIDTH)
    output = run_row(model, row)
    assert output.log_probs.shape == (0,)
    assert output.hidden.isfinite().all()
    (output.log_probs.sum() + output.hidden.sum() * 0.0).backward()
    assert not any(grad.any() for grad in gradients(model, tiny.config).values())


def test_export_gives_back_every_tensor(tiny: TinyModel, model: Qwen3VLModel) -> None:
    """Bit-equal, under the same names; experts in the Hub's layout, which transformers holds (and saves) transposed."""
    exported = dict(export_hf_tensors(model, tiny.config))
    stored = load_file(tiny.directory / "model.safetensors")
    assert exported.keys() == stored.keys() == dict(tiny.hf.named_parameters()).keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor, stored[name].transpose(1, 2) if ".mlp.experts." in name else stored[name]), name


def test_exported_directory_is_the_same_model(tiny: TinyModel, model: Qwen3VLModel, tmp_path: Path) -> None:
    """To us bit by bit, and to transformers."""
    target = tmp_path / "exported"
    with HFWriter(target) as writer:
        for name, tensor in export_hf_tensors(model, tiny.config):
            writer.add(name, tensor)
        copy_assets(tiny.directory, writer.staging)
        writer.finish()
    exported = load_file(target / "model.safetensors")
    again = dict(export_hf_tensors(build_model(target), tiny.config))
    assert exported.keys() == again.keys()
    assert all(torch.equal(tensor, exported[name]) for name, tensor in again.items())

    loader = (
        Qwen3VLMoeForConditionalGeneration if "num_experts" in tiny.config["text_config"] else Qwen3VLForConditionalGeneration
    )
    theirs = loader.from_pretrained(target, dtype=torch.float32)
    for name, parameter in tiny.hf.named_parameters():
        assert torch.equal(theirs.get_parameter(name), parameter), name
