"""`eval benchmark=…` from published files to the benchmark's own scores, with a model that can read any text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.chat import byte_level_tokenizer, model_config
from helpers.stages import run_stage, write_tiny_model, written
from PIL import Image

from prism_nemo import cli
from prism_nemo.convert.random_init import write_random_weights
from prism_nemo.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a byte-level tokenizer's vocabulary; its weights are random."""
    directory = tmp_path_factory.mktemp("model") / "tiny"
    write_tiny_model(directory)
    tokenizer = byte_level_tokenizer()
    tokenizer.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    own = model_config(tokenizer)
    config["text_config"]["vocab_size"] = own["text_config"]["vocab_size"]
    config["text_config"]["eos_token_id"] = tokenizer.eos_token_id
    config |= {name: value for name, value in own.items() if name.endswith("token_id")}
    (directory / "config.json").write_text(json.dumps(config))
    for weights in directory.glob("*.safetensors*"):
        weights.unlink()
    write_random_weights(directory, seed=0)
    return directory


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HallusionBench as its authors publish it: four questions, one without its figure."""
    folder = tmp_path_factory.mktemp("HallusionBench")
    rows = []
    for place, visual_input in (("VD/map/0/0/0", "1"), ("VD/map/0/1/0", "1"), ("VS/map/1/0/0", "0"), ("VS/map/1/1/0", "1")):
        category, subcategory, set_id, figure_id, question_id = place.split("/")
        file = f"./hallusion_bench/{category}/{subcategory}/{set_id}_{figure_id}.png"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), "white").save(folder / file)
        row = {"category": category, "subcategory": subcategory, "visual_input": visual_input, "set_id": set_id}
        row |= {"figure_id": figure_id, "question_id": question_id, "question": "Is it?", "gt_answer": "1", "filename": file}
        rows.append(row)
    (folder / "HallusionBench.json").write_text(json.dumps(rows))
    return folder


def given(model: Path, published: Path, *more: str) -> list[str]:
    return [
        f"model.path={model}",
        "data.system_prompt=null",
        "data.max_prompt_length=2048",
        "data.max_response_length=8",
        "benchmark=hallusionbench",
        f"data.validation={published}",
        *more,
    ]


def test_published_files_become_the_benchmarks_scores(model: Path, published: Path, tmp_path: Path) -> None:
    run = run_stage("eval", tmp_path / "run", *given(model, published))
    found = json.loads((run / "evaluation.json").read_text())
    assert found["num_prompts"] == 4 and found["categories"].keys() == {"VD", "VS"}
    own = found["benchmark"]
    assert own["name"] == "hallusionbench" and own["aAcc"] == own["qAcc"] == 0.0  # random weights do not keep the format
    assert found["greedy"]["benchmark"].keys() == own.keys()
    samples = written(run)[1]
    assert [row["id"] for row in samples[:4]] == ["VD/map/0/0/0", "VD/map/0/1/0", "VS/map/1/0/0", "VS/map/1/1/0"]
    assert {row["answer"] for row in samples} == {"Yes"} and all(row["tokens"] <= 8 for row in samples)


def test_a_report_of_it(model: Path, published: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_stage("eval", tmp_path / "run", *given(model, published, "also_greedy=false"))
    assert cli.main(["report", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "aAcc" in shown and "format_rate" in shown
    assert "| aAcc | 0.0000 |" in (run / "report.md").read_text()


def test_files_that_are_not_there(model: Path, published: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        run_stage("eval", tmp_path / "run", *given(model, published, f"data.validation={tmp_path / 'none'}"))
    with pytest.raises(DataError, match="no file below this folder"):
        run_stage("eval", tmp_path / "other", *given(model, published, "benchmark=mmmu"))


def test_an_image_that_is_missing_is_found_before_the_first_response(model: Path, published: Path, tmp_path: Path) -> None:
    file = published / "hallusion_bench" / "VS" / "map" / "1_1.png"
    file.rename(tmp_path / "kept.png")
    try:
        with pytest.raises(DataError, match=r"VS/map/1/1/0.*does not exist"):
            run_stage("eval", tmp_path / "run", *given(model, published))
    finally:
        (tmp_path / "kept.png").rename(file)
