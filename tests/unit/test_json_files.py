"""JSON of runs and models that others give: whatever it holds, commands say what is wrong with it."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
from helpers.tiny import tiny_model

from prism_nemo.cli import main
from prism_nemo.errors import ConfigError, PrismError
from prism_nemo.json_files import read_json_object
from prism_nemo.run_directory import resolve_model_directory

CONTENTS = {
    "deep": b'{"a":' * 100_000,
    "a deep list": b"[" * 100_000,
    "a list": b"[1]",
    "null": b"null",
    "other text": b"\xff\xfe{",
    "a long number": b'{"accuracy": 1' + b"0" * 5000 + b"}",
    "words for figures": b'{"sft": {"accuracy": "x"}, "accuracy": "x", "greedy": 3, "benchmark": 5, "categories": [1]}',
    "objects for figures": b'{"sft": {"accuracy": {"a": 1}}, "categories": {"a": 1}, "accuracy": 0.5, "intervals": 3}',
}


@pytest.mark.parametrize("case", CONTENTS)
def test_read_json_object(case: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(CONTENTS[case])
    if "figures" in case:
        assert "accuracy" in read_json_object(file)
        return
    with pytest.raises(ConfigError, match="this file") as caught:
        read_json_object(file, remedy="do this", kind=ConfigError)
    assert (caught.value.where, caught.value.remedy) == (str(file), "do this")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("case", CONTENTS)
@pytest.mark.parametrize("name", ["summary.json", "evaluation.json", "metrics.jsonl", "samples.jsonl", "status.json"])
def test_runs(name: str, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One error of one command, never a traceback."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "prefix": "train", "loss": 1.0}\n')
    (tmp_path / "status.json").write_text('{"stage": "sft"}')
    if name == "samples.jsonl":
        (tmp_path / "evaluation.json").write_text('{"num_prompts": 1}')
    (tmp_path / name).write_bytes(CONTENTS[case] + b"\n" * name.endswith("l"))
    assert main(["report", str(tmp_path)]) in (0, 2)
    assert main(["compare", str(tmp_path), str(tmp_path)]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("case", [case for case in CONTENTS if "figures" not in case])
@pytest.mark.parametrize(
    "name", ["config.json", "manifest.json", "metadata.json", "trainer.json", "model.safetensors.index.json"]
)
def test_models(name: str, case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model().directory, model)
    (model / name).write_bytes(CONTENTS[case])
    with contextlib.suppress(SystemExit):  # what is not whole
        main(["convert", "inspect", str(model)])
    if name == "config.json":
        settings = [f"data.train={model / name}", "trainer.max_steps=1", f"experiment.dir={tmp_path / 'run'}"]
        assert main(["sft", f"model.path={model}", *settings]) == 2
        assert main(["plan", "--model", str(model), "--stage", "sft", "--gpu", "h100"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../../other", "/etc", "a/b", ".."])
def test_latest_names_a_folder_beside_it(name: str, tmp_path: Path) -> None:
    (tmp_path / "latest").write_text(name)
    (tmp_path / "a" / "b").mkdir(parents=True)
    if name == "..":
        (tmp_path / "latest").write_text("../")
    with pytest.raises(PrismError, match="names no checkpoint"):
        resolve_model_directory(tmp_path, "policy")
