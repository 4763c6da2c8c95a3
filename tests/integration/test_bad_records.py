"""Records that cannot be used: held-out ones before the first step, others left out and listed, in every stage that reads any."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.stages import run_stage, tiny_task, trainer_of, written

from prism_nemo.errors import DataError, PrismError
from prism_nemo.run_directory import read_json_lines

EMPTY_ANSWER = " $ . $ "  # nothing is left of it when answers are compared


@pytest.fixture
def data(tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(tiny_task().data.root, tmp_path / "data")
    yield tmp_path / "data"


def change(file: Path, changes: dict[int, dict[str, Any] | str]) -> list[str]:
    """Changes fields of the numbered records, or replaces the line; the ids of these records."""
    lines = file.read_text().splitlines()
    names = [json.loads(lines[number])["id"] for number in changes]
    for number, given in changes.items():
        lines[number] = given if isinstance(given, str) else json.dumps(json.loads(lines[number]) | given)
    file.write_text("".join(line + "\n" for line in lines))
    return names


def long_prompt(words: int) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "<image> " + "largest " * words}, {"role": "assistant", "content": "x"}]}


NO_RESPONSE = {"messages": [{"role": "user", "content": "<image> largest"}, {"role": "assistant", "content": "largest"}]}
HELD_OUT = {
    "sft_image": ("sft", {"images": ["images/none.png"]}, "the image does not exist"),
    "warmup_prompt": ("warmup", long_prompt(80), "the limit is 64"),
    "warmup_response": ("warmup", NO_RESPONSE, "the response is not <caption>"),
    "align_probe": ("align", {"probe_response": "largest"}, "the response is not <caption>"),
    "align_answer": ("align", {"answer": ""}, "the verified answer is empty"),
    "rlvr_answer": ("rlvr", {"answer": "1" * 1001}, "too long to be compared"),
    "rlvr_line": ("rlvr", "{", "the line is not JSON"),
    "sft_turns": ("sft", {"messages": []}, "the turns are none"),
    "eval_line": ("eval", "[1]", "a record is an object"),
    "eval_answer": ("eval", {"answer": EMPTY_ANSWER}, "the verified answer is empty"),
}


@pytest.mark.parametrize("case", HELD_OUT)
def test_a_held_out_record_is_found_before_the_first_step(case: str, data: Path, tmp_path: Path) -> None:
    """Not by the validation behind the last one; and it is named with its file."""
    stage, changes, reason = HELD_OUT[case]
    (name,) = change(data / "test.jsonl", {3: changes})
    run = tmp_path / "run"
    with pytest.raises(DataError) as caught:
        run_stage(stage, run, f"data.validation={data / 'test.jsonl'}", f"data.image_root={tmp_path}", *image_root(stage, data))
    message = str(caught.value)
    assert reason in message
    assert (name if isinstance(changes, dict) else "test.jsonl:4") in message
    assert caught.value.where == f"data.validation: {data / 'test.jsonl'}"
    assert not (run / "metrics.jsonl").exists()
    assert not (run / "checkpoints").exists()
    assert json.loads((run / "status.json").read_text())["state"] == "failed"


def image_root(stage: str, data: Path) -> list[str]:
    """Both files' images are below one folder: the training records of this copy of the task."""
    train = {"sft": "public", "align": "teacher", "rlvr": "prompts"}.get(stage)
    return [f"data.image_root={data}", *([f"data.train={data / train}.jsonl"] if train else [])]


@pytest.mark.parametrize(("stage", "file"), [("rlvr", "prompts.jsonl"), ("align", "teacher.jsonl")])
def test_answers_that_cannot_be_compared_are_left_out(stage: str, file: str, data: Path, tmp_path: Path) -> None:
    """Two of the first eight records; the others are trained on, and the metrics are of these."""
    names = change(data / file, {1: {"answer": EMPTY_ANSWER}, 6: {"answer": "1" * 1001}})
    run = run_stage(
        stage,
        tmp_path / "run",
        f"data.train={data / file}",
        f"data.image_root={data}",
        f"data.validation={data / 'test.jsonl'}",
        "data.shuffle=false",
        "data.max_bad_sample_share=0.05",
        "trainer.max_steps=2",
        "trainer.log_samples=99",
    )
    assert [(row["id"], row["reason"].partition(":")[0]) for row in read_json_lines(run / "bad_samples.jsonl")] == [
        (names[0], "the verified answer is empty"),
        (names[1], "the verified answer is too long to be compared"),
    ]
    metrics, samples = written(run)
    assert [row["step"] for row in metrics if row["prefix"] == "train"] == [1, 2]
    all_names = [json.loads(line)["id"] for line in (data / file).read_text().splitlines()[:8]]
    assert list(dict.fromkeys(row["id"] for row in samples)) == [name for name in all_names if name not in names]


def test_too_many_are_listed_before_the_run_stops(data: Path, tmp_path: Path) -> None:
    names = change(data / "prompts.jsonl", {number: {"answer": "."} for number in range(3)})
    with pytest.raises(DataError, match=r"3 of 4 records cannot be used, more than the allowed share of 0\.04"):
        run_stage(
            "rlvr",
            tmp_path / "run",
            f"data.train={data / 'prompts.jsonl'}",
            "data.shuffle=false",
            "data.max_bad_sample_share=0.04",
        )
    assert [row["id"] for row in read_json_lines(tmp_path / "run" / "bad_samples.jsonl")] == names
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_batch_of_bad_records_alone_is_passed_over(data: Path, tmp_path: Path) -> None:
    change(data / "prompts.jsonl", {number: {"answer": "."} for number in range(4)})
    run = run_stage(
        "rlvr",
        tmp_path / "run",
        f"data.train={data / 'prompts.jsonl'}",
        "data.shuffle=false",
        "data.max_bad_sample_share=0.1",
        "trainer.max_steps=1",
        "trainer.log_samples=99",
    )
    expected = [json.loads(line)["id"] for line in (data / "prompts.jsonl").read_text().splitlines()[4:8]]
    assert list(dict.fromkeys(row["id"] for row in written(run)[1])) == expected


# The content probe's gate


def test_a_gate_with_nothing_to_measure_is_closed(data: Path, tmp_path: Path) -> None:
    lines = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    (data / "test.jsonl").write_text("".join(json.dumps(line | {"probe_response": None}) + "\n" for line in lines))
    paths = (f"data.validation={data / 'test.jsonl'}", f"data.train={data / 'teacher.jsonl'}")
    with pytest.raises(PrismError, match="nothing to measure it on") as caught:
        run_stage("align", tmp_path / "run", *paths, "algorithm.min_content_probe=0.0")
    assert caught.value.where == "algorithm.min_content_probe, data.validation"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_gate_is_closed_to_scores_that_are_no_numbers(tmp_path: Path) -> None:
    """They win no pair, which a gate of 0 would let pass."""
    with trainer_of("align", tmp_path / "run", "algorithm.min_content_probe=0.0") as trainer:
        trainer.check_content_probe()
        trainer.discriminator.module.score_head.weight.data.fill_(float("nan"))
        with pytest.raises(PrismError, match="content probe is"):
            trainer.check_content_probe()
