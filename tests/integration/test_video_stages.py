"""Every stage, one after another, on records of images, of videos and of both."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
from helpers.stages import MODULES, runtime_of_this_process, tiny_task, write_tiny_model, written
from safetensors.torch import load_file

from prism_nemo.config.compose import load_config
from prism_nemo.convert.random_init import write_random_weights
from prism_nemo.data.chat import ChatEncoder
from prism_nemo.data.readers import read_records
from prism_nemo.experiment import read_metrics

TIMES = ("<0.0", "<0.2", "<0.5", "<1.0", "<2.0", "<2.5", "seconds>")  # words of the timestamps, for the word-level tokenizer


def write_model(directory: Path) -> None:
    """The tiny model with words for times."""
    write_tiny_model(directory)
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    words |= {word: len(words) + number for number, word in enumerate(TIMES)}
    path.write_text(json.dumps(tokenizer))
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["vocab_size"] = -(-len(words) // 8) * 8
    path.write_text(json.dumps(config))
    (directory / "model.safetensors").unlink()
    write_random_weights(directory, seed=0)
    assert len(load_file(directory / "model.safetensors")["model.language_model.embed_tokens.weight"]) == 72


def with_videos(file: Path, out: Path) -> Path:
    """The digits task's records, a third of them with the strip as a short video, a third with image and video."""
    lines = []
    for number, line in enumerate(file.read_text().splitlines()):
        record = json.loads(line)
        (image,) = record["images"]
        turn = record["messages"][0]
        if number % 3 == 1:
            turn["content"] = turn["content"].replace("<image>", "<video>")
            record |= {"images": [], "videos": [{"frames": [image] * 3, "fps": 1}]}
        elif number % 3 == 2:
            turn["content"] = turn["content"] + " <video>"
            record["videos"] = [{"frames": [image, image], "timestamps": [0, 0.5]}]
        lines.append(json.dumps(record))
    out.write_text("".join(f"{line}\n" for line in lines))
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model and the records."""
    root = tmp_path_factory.mktemp("videos")
    write_model(root / "model")
    data = tiny_task().data
    for name, file in {"public": data.public, "teacher": data.teacher, "prompts": data.prompts, "test": data.test}.items():
        with_videos(file, root / f"{name}.jsonl")
    return root


def run(stage: str, place: Path, name: str, *overrides: str) -> Path:
    runtime_of_this_process()
    common = ["experiment.progress=false", "experiment.tensorboard=false", "runtime.device=cpu", f"experiment.dir={place / name}"]
    common += ["data.system_prompt=<caption> <think> <answer>", "data.max_prompt_length=64", "data.max_response_length=32"]
    common += [f"data.image_root={tiny_task().data.root}", "data.max_bad_sample_share=0"]
    if stage in ("sft", "warmup", "align", "rlvr"):
        common.append("trainer.max_tokens_per_row=512")
    config: Any = load_config(stage, [*common, *overrides])
    importlib.import_module(f"prism_nemo.stages.{MODULES.get(stage, stage)}").run(config)
    return place / name


def test_the_records_hold_what_they_should(place: Path) -> None:
    config: Any = load_config(
        "eval", [f"model.path={place / 'model'}", f"data.validation={place / 'test.jsonl'}", f"experiment.dir={place / 'none'}"]
    )
    config.data.system_prompt = "<caption> <think> <answer>"
    root = tiny_task().data.root
    encoder = ChatEncoder.from_directory(place / "model", config.data, image_root=root)
    found = read_records(place / "test.jsonl", image_root=root).records[:3]
    prompts = [encoder.encode_prompt(record) for record in found]
    assert [len(prompt.image_grid_thw) for prompt in prompts] == [1, 2, 2]
    words = encoder.tokenizer.convert_ids_to_tokens(prompts[1].input_ids.tolist())
    assert [word for word in words if word in TIMES] == ["<0.5", "seconds>", "<2.0", "seconds>"]
    assert "<0.2" in encoder.tokenizer.convert_ids_to_tokens(prompts[2].input_ids.tolist())


def test_every_stage_takes_videos(place: Path) -> None:
    """Losses fall and nothing is left out as a bad record: not one is allowed."""
    policy = run(
        "sft",
        place,
        "sft",
        f"model.path={place / 'model'}",
        "model.precision=fp32",
        f"data.train={place / 'public.jsonl'}",
        "trainer.max_steps=40",
        "trainer.global_batch_size=8",
        "optimizer.lr=1e-2",
        "optimizer.lr_decay_style=constant",
        "optimizer.lr_warmup_fraction=0",
    )
    losses = [row["loss"] for row in read_metrics(policy, times=False) if "loss" in row]
    assert losses[-1] < 0.5 * losses[0]

    start = [f"model.path={policy}", "model.precision=fp32"]
    pairs = run(
        "pairs",
        place,
        "pairs",
        *start,
        f"data.train={place / 'teacher.jsonl'}",
        "limit_samples=12",
        "rollout.num_rollouts_per_prompt=2",
    )
    kept = [json.loads(line) for line in (pairs / "pairs.jsonl").read_text().splitlines()]
    assert {len(pair.get("videos", ())) + len(pair["images"]) for pair in kept} == {1, 2}
    assert written(pairs)[0][-1]["bad_records"] == 0

    held_out = f"data.validation={place / 'test.jsonl'}"
    judge = run(
        "warmup",
        place,
        "warmup",
        f"discriminator.path={policy}",
        "discriminator.precision=fp32",
        f"data.train={pairs / 'pairs.jsonl'}",
        held_out,
        "trainer.max_steps=2",
        "trainer.global_batch_size=4",
    )
    for stage, more in {
        "align": [
            f"data.train={place / 'teacher.jsonl'}",
            f"discriminator.path={judge}",
            "discriminator.precision=fp32",
            held_out,
        ],
        "rlvr": [f"data.train={place / 'prompts.jsonl'}"],
    }.items():
        steps = ["trainer.max_steps=2", "trainer.global_batch_size=6", "rollout.num_rollouts_per_prompt=2"]
        found = read_metrics(run(stage, place, stage, *start, *more, *steps), times=False)
        assert max(row["step"] for row in found) == 2
    run("eval", place, "eval", *start, held_out)
    results = {row["prefix"]: row["accuracy"] for row in read_metrics(place / "eval", times=False) if "accuracy" in row}
    assert len(results) == 2 and all(0 <= accuracy <= 1 for accuracy in results.values())
