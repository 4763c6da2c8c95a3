"""To this project's checkpoints and back: bit-equal weights, and transformers writes what our engine writes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.stages import runtime_of_this_process, tiny_task, trained_policy, trainer_of
from helpers.tiny import IMAGE_TOKEN, make_prompt, tiny_model
from safetensors.torch import load_file
from torch import Tensor

from prism_nemo.cli import main
from prism_nemo.config.enums import Precision
from prism_nemo.config.schema import ModelConfig, ParallelConfig
from prism_nemo.convert.commands import export_hf, import_hf
from prism_nemo.data.readers import read_records
from prism_nemo.models.policy import PolicyModel
from prism_nemo.packing.groups import EncodedPrompt
from prism_nemo.rollout.base import SamplingParams
from prism_nemo.rollout.megatron import MegatronEngine

LENGTH = 24
NO_END = 10**6


def our_greedy(policy: PolicyModel, prompts: list[EncodedPrompt], *, end: int, banned: tuple[int, ...]) -> list[list[int]]:
    engine = MegatronEngine(policy.module, device=policy.runtime.device, max_batch_size=64)
    sampling = SamplingParams(0.0, 1.0, 0, LENGTH, end, banned)
    rollouts = engine.generate(prompts, sampling, num_rollouts_per_prompt=1, seeds=[0] * len(prompts))
    return [rollout.tokens.tolist() for rollout in rollouts]


def their_greedy(hf: Any, prompt: EncodedPrompt, image_token: int, *, end: int | None, banned: tuple[int, ...]) -> list[int]:
    """transformers' `generate`, which works out the positions by itself."""
    input_ids = prompt.input_ids[None]
    images: dict[str, Tensor] = {}
    if prompt.image_grid_thw.numel():
        images = {
            "pixel_values": prompt.pixel_values,
            "image_grid_thw": prompt.image_grid_thw,
            "mm_token_type_ids": (input_ids == image_token).int(),
        }
    output = hf.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        max_new_tokens=LENGTH,
        eos_token_id=end,
        pad_token_id=0,
        suppress_tokens=list(banned) or None,
        temperature=None,
        **images,
    )
    return output[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy after SFT, by the command."""
    out = tmp_path_factory.mktemp("exported") / "hf"
    runtime_of_this_process()
    assert main(["convert", "export", "--checkpoint", str(trained_policy()), "--out", str(out)]) == 0
    return out


def test_transformers_writes_what_our_engine_writes(exported: Path, tmp_path: Path) -> None:
    """On the task's own prompts, with images of two widths, after training."""
    hf = transformers.Qwen3VLForConditionalGeneration.from_pretrained(exported, dtype=torch.float32).eval()
    with trainer_of("rlvr", tmp_path / "run") as trainer:
        records = read_records(tiny_task().data.test, image_root=None).records
        trainer.encoder.image_root = tiny_task().data.root
        prompts = [trainer.encoder.encode_prompt(record) for record in records]
        end, banned = trainer.encoder.end_token_id, trainer.encoder.banned_token_ids
        ours = our_greedy(trainer.policy, prompts, end=end, banned=banned)
        theirs = [their_greedy(hf, prompt, trainer.encoder.image_token_id, end=end, banned=banned) for prompt in prompts]
    assert len({int(prompt.image_grid_thw[0, 2]) for prompt in prompts}) == 2
    assert ours == theirs
    assert sum(tokens[-1] == end for tokens in ours) >= len(ours) / 2, "it has learned to stop"
    assert len({tuple(tokens) for tokens in ours}) > 1


def test_the_export_is_a_whole_model_of_the_hubs_form(exported: Path) -> None:
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"} <= {
        path.name for path in exported.iterdir()
    }
    assert json.loads((exported / "config.json").read_text())["architectures"] == ["Qwen3VLForConditionalGeneration"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "largest ?"}], tokenize=False, add_generation_prompt=True)
    assert text == "<|im_start|>user\nlargest ?<|im_end|>\n<|im_start|>assistant\n"
    before, after = (load_file(path / "model.safetensors") for path in (tiny_task().model, exported))
    assert before.keys() == after.keys()
    assert sum(not torch.equal(before[name], after[name]) for name in before) > 0.9 * len(before), "it was trained"


def test_a_stage_starts_from_the_export_as_from_the_run(exported: Path, tmp_path: Path) -> None:
    with trainer_of("sft", tmp_path / "run", f"model.path={trained_policy()}") as trainer:
        expected = {name: parameter.detach().clone() for name, parameter in trainer.policy.module.named_parameters()}
    with trainer_of("sft", tmp_path / "hf", f"model.path={exported}") as trainer:
        found = dict(trainer.policy.module.named_parameters())
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("experts", "tied"), [(False, False), (False, True), (True, False)])
def test_import_and_export_give_every_bit_back(experts: bool, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    runtime_of_this_process()
    source = tmp_path / "source"
    copy.deepcopy(tiny_model(experts=experts, tied=tied).hf).to(dtype).save_pretrained(source)
    import_hf(source, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "once")
    import_hf(tmp_path / "once", tmp_path / "again")
    export_hf(tmp_path / "again", tmp_path / "twice")
    once, twice = (load_file(tmp_path / name / "model.safetensors") for name in ("once", "twice"))
    assert once.keys() == twice.keys()
    assert all(tensor.dtype == dtype and torch.equal(tensor, once[name]) for name, tensor in twice.items())
    kind = transformers.Qwen3VLMoeForConditionalGeneration if experts else transformers.Qwen3VLForConditionalGeneration
    expected = dict(kind.from_pretrained(source, dtype=dtype).named_parameters())
    found = dict(kind.from_pretrained(tmp_path / "once", dtype=dtype).named_parameters())
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)] == []


@pytest.mark.parametrize("experts", [False, True])
def test_an_imported_model_writes_what_transformers_writes(experts: bool, tmp_path: Path) -> None:
    """Several images of different sizes, one, and none, in one batch of ours."""
    tiny = tiny_model(experts=experts)
    runtime = runtime_of_this_process()
    import_hf(tiny.directory, tmp_path / "checkpoint")
    policy = PolicyModel(ModelConfig(path=str(tmp_path / "checkpoint"), precision=Precision.fp32), ParallelConfig(), runtime)
    images: list[list[tuple[int, int]]] = [[(4, 6), (8, 4)], [(2, 12)], [], [(4, 4)] * 3]
    prompts = [make_prompt(sizes, seed=number, text_length=5 + number) for number, sizes in enumerate(images)]
    banned = tuple(range(120, 128))
    ours = our_greedy(policy, prompts, end=NO_END, banned=banned)
    theirs = [their_greedy(tiny.hf, prompt, IMAGE_TOKEN, end=None, banned=banned) for prompt in prompts]
    assert ours == theirs
    assert all(len(tokens) == LENGTH for tokens in ours)
