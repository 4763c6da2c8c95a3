"""`prism-nemo convert` as it is called: what it prints, its status, and mistakes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.stages import runtime_of_this_process, trained_discriminator, trained_policy
from helpers.tiny import IMAGE_TOKEN, tiny_model
from safetensors.torch import load_file, save_file

from prism_nemo.cli import main
from prism_nemo.config.enums import Precision
from prism_nemo.config.schema import ModelConfig, ParallelConfig
from prism_nemo.convert.hf import copy_assets
from prism_nemo.convert.manifest import files_of
from prism_nemo.convert.verify import sample_rows
from prism_nemo.models.policy import PolicyModel
from prism_nemo.models.qwen3_vl.config import Qwen3VLShape


def status_of(arguments: list[str]) -> int:
    """What the process would exit with."""
    try:
        return main(["convert", *arguments])
    except SystemExit as exit_:
        assert isinstance(exit_.code, int)
        return exit_.code


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runtime_of_this_process()
    out = tmp_path_factory.mktemp("imported") / "checkpoint"
    assert main(["convert", "import", "--hf", str(tiny_model(experts=True).directory), "--out", str(out)]) == 0
    return out


def test_import_says_what_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert status_of(["import", "--hf", str(tiny_model().directory), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: policy, 250,016 parameters in float32, 0.00 GB in 1 file\n"
    assert status_of(["import", "--hf", str(tiny_model().directory), "--out", str(out)]) == 2
    assert "the target exists" in capsys.readouterr().err


def test_a_dense_model_is_converted_without_torch(tmp_path: Path) -> None:
    """Importing torch takes longer than copying a small model."""
    script = """
import sys
from prism_nemo.cli import main
assert main(["convert", "import", "--hf", sys.argv[1], "--out", sys.argv[2]]) == 0
assert main(["convert", "export", "--checkpoint", sys.argv[2], "--out", sys.argv[3]]) == 0
print(sorted({"torch", "numpy", "safetensors", "omegaconf"} & sys.modules.keys()))
"""
    source, exported = tiny_model().directory, tmp_path / "exported"
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "checkpoint"), str(exported)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    before, after = (load_file(directory / "model.safetensors") for directory in (source, exported))
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_verify(imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal weights compute equal numbers; a weight that differs by one unit in the last place shows in both."""
    source = tiny_model(experts=True).directory
    assert status_of(["verify", "--hf", str(source), "--checkpoint", str(imported)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "tensors: 132 of 132 are equal, bit for bit",
        "outputs on text: equal",
        "outputs on text and an image: equal",
        f"files: {len(files_of(imported))} of {len(files_of(imported))} are what was written",
        "the same model",
    ]
    changed = tmp_path / "changed"
    copy_assets(source, changed)
    tensors = load_file(source / "model.safetensors")
    tensors["model.language_model.norm.weight"] *= 1.01
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    assert status_of(["verify", "--hf", str(changed), "--checkpoint", str(imported)]) == 1
    out = capsys.readouterr().out
    assert out.startswith("differs: language_model.decoder.final_layernorm.weight\ntensors: 131 of 132 are equal")
    assert out.count("differ by up to") == 2 and out.endswith("NOT the same model\n")
    assert status_of(["verify", "--hf", str(tiny_model().directory), "--checkpoint", str(imported)]) == 1
    assert "differs: config.json: text_config.model_type" in capsys.readouterr().out


def test_verifys_samples_are_read_as_transformers_reads_them() -> None:
    """Log-probabilities of the sample responses against transformers' own: text alone, and with the image."""
    tiny = tiny_model(experts=True)
    runtime = runtime_of_this_process()
    policy = PolicyModel(ModelConfig(path=str(tiny.directory), precision=Precision.fp32), ParallelConfig(), runtime)
    for row in sample_rows(Qwen3VLShape.from_hf(tiny.config)).values():
        (found,) = policy.get_inference_log_probs([row])
        images = {}
        if row.image_grid_thw.numel():
            images = {
                "pixel_values": row.pixel_values,
                "image_grid_thw": row.image_grid_thw,
                "mm_token_type_ids": (row.input_ids == IMAGE_TOKEN).int()[None],
            }
        logits = tiny.hf(input_ids=row.input_ids[None], **images).logits[0]
        expected = torch.log_softmax(logits[row.label_source], dim=-1).gather(1, row.label_ids[:, None]).squeeze(1)
        assert row.num_labels > 10
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", ["run", "checkpoints", "step", "model"])
def test_inspect_a_run(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained_policy()
    latest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    path = {"run": run, "checkpoints": run / "checkpoints", "step": latest, "model": latest / "policy"}[kind]
    assert status_of(["inspect", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["whole"] is True and found["problems"] == []
    if kind in ("run", "checkpoints"):
        assert found["facts"]["latest"] == latest.name
        (found,) = found["parts"]
    if kind != "model":
        assert found["facts"]["step"] == 40
        (found,) = found["parts"]
    facts = found["facts"]
    assert (facts["model"], facts["type"], facts["optimizer state"] != 0) == ("policy", "float32", True)
    with (latest / "policy" / "hf" / "config.json").open() as file:
        assert facts["language"].startswith(f"{json.load(file)['text_config']['num_hidden_layers']} layers")


def test_inspect_what_is_not_whole(imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(imported, broken)
    (shard,) = broken.glob("*.distcp")
    shard.write_bytes(shard.read_bytes()[:-1])
    assert status_of(["inspect", str(broken)]) == 1
    size = shard.stat().st_size
    assert f"NOT WHOLE: truncated: {shard.name} is {size} bytes, it had {size + 1} bytes" in capsys.readouterr().out
    (broken / "manifest.json").unlink()
    (broken / ".metadata").unlink()
    assert status_of(["inspect", str(broken)]) == 1
    assert status_of(["inspect", str(tmp_path)]) == 2
    assert "not a directory of a model" in capsys.readouterr().err
    assert status_of(["inspect", str(tmp_path / "absent")]) == 2


def test_a_trained_discriminator_goes_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained_discriminator()
    assert status_of(["export", "--checkpoint", str(run), "--out", str(tmp_path / "hf")]) == 0
    assert status_of(["import", "--hf", str(tmp_path / "hf"), "--out", str(tmp_path / "back")]) == 0
    assert status_of(["verify", "--hf", str(tmp_path / "hf"), "--checkpoint", str(run)]) == 0
    assert status_of(["verify", "--hf", str(tmp_path / "hf"), "--checkpoint", str(tmp_path / "back")]) == 0
    assert capsys.readouterr().out.count("the same model\n") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import", "--megatron", "x", "--out", "y"], "--megatron and --config go together"),
        (["import", "--out", "y"], "one of the arguments --hf --megatron is required"),
        (["upcycle", "--hf", "x", "--out", "y", "--topk", "5"], "a token cannot reach 5 of 4 experts"),
        (["export", "--checkpoint", "x", "--out", "y", "--max-shard-size", "0"], "a file needs a positive size"),
        (["export", "--checkpoint", "x", "--out", "y"], "there is no checkpoint"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_script_is_the_command() -> None:
    script = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("usage: prism-nemo convert import")
