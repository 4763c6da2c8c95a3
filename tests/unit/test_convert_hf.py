"""HuggingFace directories against transformers itself: reading what it saves, writing what it loads, and saying what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.qwen3_vl_configs import tiny_config, transformers_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from prism_nemo.convert.dtypes import BY_CODE
from prism_nemo.convert.files import read_weights_header
from prism_nemo.convert.hf import (
    HFReader,
    HFWriter,
    copy_assets,
    export_tensors,
    has_score_head,
    hf_assets_directory,
    import_tensors,
    load_model_config,
)
from prism_nemo.convert.pieces import Files, Run, Runs, read_tensor
from prism_nemo.convert.qwen3_vl import ExpertLayout, hf_shapes
from prism_nemo.errors import CheckpointError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models as transformers saves them: dense (tied), and MoE in its own expert layout."""
    root = tmp_path_factory.mktemp("saved")
    for name, moe in (("dense", False), ("moe", True)):
        torch.manual_seed(0)
        model: Any = transformers_model(tiny_config(moe=moe, tied=not moe), "cpu")
        model.save_pretrained(root / name)
    return {name: root / name for name in ("dense", "moe")}


def imported(directory: Path, config: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    with HFReader(directory) as reader:
        return {name: tensor.clone() for name, tensor, _ in import_tensors(reader, config, **options)}


def write(directory: Path, tensors: dict[str, Tensor], **options: Any) -> None:
    with HFWriter(directory, **options) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.finish()


def export(source: Path, target: Path, **options: Any) -> None:
    """HuggingFace -> Megatron -> HuggingFace, assets included."""
    config = load_model_config(source)
    full = imported(source, config)
    with HFWriter(target, **options) as writer:
        copy_assets(source, writer.staging)
        for name, tensor in export_tensors(config, full.__getitem__):
            writer.add(name, tensor)
        writer.finish()


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 20_000])
def test_transformers_loads_what_we_export_bit_for_bit(
    saved: dict[str, Path], kind: str, max_shard_bytes: int, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText

    export(saved[kind], tmp_path / "out", max_shard_bytes=max_shard_bytes)
    before = AutoModelForImageTextToText.from_pretrained(saved[kind], dtype=torch.float32).state_dict()
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_export_has_the_hubs_names_and_layout(saved: dict[str, Path], tmp_path: Path) -> None:
    export(saved["moe"], tmp_path / "out")
    original = load_file(saved["moe"] / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == original.keys()
    for name, tensor in written.items():
        fused = ".mlp.experts." in name
        assert torch.equal(tensor, original[name].transpose(1, 2) if fused else original[name]), name
    assert {name: tuple(tensor.shape) for name, tensor in written.items()} == hf_shapes(load_model_config(saved["moe"]))
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_both_layouts_are_read_alike(saved: dict[str, Path], tmp_path: Path) -> None:
    export(saved["moe"], tmp_path / "hub")
    config = load_model_config(saved["moe"])
    with HFReader(saved["moe"]) as theirs, HFReader(tmp_path / "hub") as hubs:
        assert theirs.check(config) == ExpertLayout.transformers5
        assert hubs.check(config) == ExpertLayout.hub
    one, other = imported(saved["moe"], config), imported(tmp_path / "hub", config)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("width", [32, 16])  # hidden 32: down is square, gate_up is square
@pytest.mark.parametrize("layout", ExpertLayout)
def test_a_square_expert_matrix_is_settled_by_the_other_one(width: int, layout: ExpertLayout, tmp_path: Path) -> None:
    config = tiny_config(moe=True)
    config["text_config"]["moe_intermediate_size"] = width
    write(tmp_path / "out", {name: torch.zeros(shape) for name, shape in hf_shapes(config, layout).items()})
    with HFReader(tmp_path / "out") as reader:
        assert reader.check(config) == layout


def test_experts_of_two_layouts_are_refused(saved: dict[str, Path], tmp_path: Path) -> None:
    config = load_model_config(saved["moe"])
    tensors = load_file(saved["moe"] / "model.safetensors")
    for name in tensors:
        if name.endswith("experts.down_proj"):
            tensors[name] = tensors[name].transpose(1, 2).contiguous()
    write(tmp_path / "out", tensors)
    with HFReader(tmp_path / "out") as reader, pytest.raises(CheckpointError, match="neither of the two known layouts"):
        reader.check(config)


def test_export_refuses_experts_that_transformers_would_misread() -> None:
    config = tiny_config(moe=True)
    config["text_config"]["moe_intermediate_size"] = 16
    with pytest.raises(CheckpointError, match="square experts"):
        next(export_tensors(config, lambda name: torch.zeros(1)))


def test_only_what_is_wanted_is_read(saved: dict[str, Path]) -> None:
    config = load_model_config(saved["moe"])
    names = {"language_model.decoder.layers.1.mlp.experts.linear_fc2.weight3", "vision_model.merger.patch_norm.bias"}
    some = imported(saved["moe"], config, wanted=names.__contains__)
    assert some.keys() == names
    fused = load_file(saved["moe"] / "model.safetensors")["model.language_model.layers.1.mlp.experts.down_proj"]
    assert torch.equal(some["language_model.decoder.layers.1.mlp.experts.linear_fc2.weight3"], fused[3])


def test_a_padded_vocabulary_comes_back_as_it_was(saved: dict[str, Path]) -> None:
    config = load_model_config(saved["moe"])
    full = imported(saved["moe"], config, padded_vocab_size=128)
    assert full["language_model.output_layer.weight"].shape == (128, 32)
    exported = dict(export_tensors(config, full.__getitem__, padded_vocab_size=128))
    assert torch.equal(exported["lm_head.weight"], load_file(saved["moe"] / "model.safetensors")["lm_head.weight"])


def test_a_discriminator_goes_there_and_back(saved: dict[str, Path], tmp_path: Path) -> None:
    config = load_model_config(saved["dense"])
    full = imported(saved["dense"], config) | {"score_head.weight": torch.randn(1, 32)}
    write(tmp_path / "out", dict(export_tensors(config, full.__getitem__, score_head=True)))
    with HFReader(tmp_path / "out") as reader:
        assert has_score_head(reader)
        with pytest.raises(CheckpointError, match=r"unexpected: value_head\.weight[^$]*holds a discriminator"):
            reader.check(config)
    back = imported(tmp_path / "out", config, score_head=True)
    assert torch.equal(back["score_head.weight"], full["score_head.weight"])


def test_names_without_the_outer_prefix(saved: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(saved["dense"] / "model.safetensors")
    write(tmp_path / "out", {name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    config = load_model_config(saved["dense"])
    one, other = imported(saved["dense"], config), imported(tmp_path / "out", config)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_tied_model_may_store_its_output_matrix_only_if_it_is_the_embedding(saved: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(saved["dense"] / "model.safetensors")
    config = load_model_config(saved["dense"])
    embedding = tensors["model.language_model.embed_tokens.weight"]
    write(tmp_path / "same", {**tensors, "lm_head.weight": embedding.clone()})
    assert "language_model.output_layer.weight" not in imported(tmp_path / "same", config)
    write(tmp_path / "other", {**tensors, "lm_head.weight": embedding + 1})
    with HFReader(tmp_path / "other") as reader, pytest.raises(CheckpointError, match="ties the embeddings"):
        reader.check(config)


def test_every_tensor_that_does_not_fit_is_listed(saved: dict[str, Path], tmp_path: Path) -> None:
    tensors = load_file(saved["dense"] / "model.safetensors")
    tensors["model.visual.extra.weight"] = tensors.pop("model.visual.merger.norm.bias")
    tensors["model.language_model.norm.weight"] = torch.ones(31)
    write(tmp_path / "out", tensors)
    with HFReader(tmp_path / "out") as reader, pytest.raises(CheckpointError) as error:
        reader.check(load_model_config(saved["dense"]))
    message = str(error.value)
    assert "3 problems" in message
    assert "missing: model.visual.merger.norm.bias" in message
    assert "unexpected: model.visual.extra.weight" in message
    assert "model.language_model.norm.weight: shape [31], expected [32]" in message
    assert str(tmp_path / "out") in message


def test_an_untied_config_for_a_tied_model_names_the_remedy(saved: dict[str, Path]) -> None:
    config = load_model_config(saved["dense"]) | {"tie_word_embeddings": False}
    with HFReader(saved["dense"]) as reader, pytest.raises(CheckpointError, match='"tie_word_embeddings": true'):
        reader.check(config)


@pytest.mark.parametrize("kept", [0, 4, 200, -1])
def test_a_file_cut_short(saved: dict[str, Path], kept: int, tmp_path: Path) -> None:
    content = (saved["dense"] / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:kept])
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        HFReader(tmp_path)


def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADERS = {  # of a file with eight bytes of values, and what is wrong
    "whole": ({"a": entry("F32", [1], 0, 4), "b": entry("U8", [2, 2], 4, 8)}, None),
    "in another order": ({"b": entry("F32", [], 4, 8), "a": entry("BF16", [2], 0, 4)}, None),
    "with an empty tensor": ({"a": entry("F64", [1], 0, 8), "b": entry("F32", [0, 3], 8, 8)}, None),
    "a gap": ({"a": entry("F32", [1], 4, 8)}, "one after another at byte"),
    "bytes left over": ({"a": entry("F32", [1], 0, 4)}, "end at byte"),
    "an overlap": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 4, 8)}, "one after another"),
    "beyond the end": ({"a": entry("F32", [3], 0, 12)}, "end at byte"),
    "another size": ({"a": entry("BF16", [2], 0, 8)}, r"`a` has 8 bytes for \[2\] of BF16"),
    "a negative offset": ({"a": entry("F32", [2], -8, 0)}, "does not describe `a`"),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, "does not describe `a`"),
    "a shape of text": ({"a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}, "does not describe `a`"),
    "a tensor that is a number": ({"a": 8}, "does not describe `a`"),
    "a list": ([1], "not a JSON object"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers_are_held_to_the_format_as_the_library_holds_them(case: str, tmp_path: Path) -> None:
    header, problem = HEADERS[case]
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(8)))
    if problem is None:
        found = read_weights_header(path)
        with safe_open(path, framework="pt") as theirs:
            assert found.keys() == set(theirs.keys())
            files = Files()
            for name, weight in found.items():
                run = Runs((Run(weight, 0, theirs.get_tensor(name).nbytes),))
                tensor = read_tensor([run], files, weight.shape, BY_CODE[weight.dtype])
                assert torch.equal(tensor, theirs.get_tensor(name))
            files.close()
        return
    with pytest.raises(SafetensorError), safe_open(path, framework="pt"):
        pass
    with pytest.raises(CheckpointError, match=problem):
        read_weights_header(path)


def test_a_git_lfs_pointer_is_not_weights(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        HFReader(tmp_path)


def sharded(saved: dict[str, Path], target: Path) -> dict[str, Any]:
    write(target, load_file(saved["dense"] / "model.safetensors"), max_shard_bytes=20_000)
    return json.loads((target / "model.safetensors.index.json").read_text())


def test_shards_with_an_index(saved: dict[str, Path], tmp_path: Path) -> None:
    index = sharded(saved, tmp_path / "out")
    tensors = load_file(saved["dense"] / "model.safetensors")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    for name in files:
        shard = load_file(tmp_path / "out" / name)
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard.values()) <= 20_000
    with HFReader(tmp_path / "out") as reader:
        assert reader.names == tensors.keys()
        assert all(torch.equal(reader.get(name), tensor) for name, tensor in tensors.items())


def test_wrong_shards_are_named(saved: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "out"
    index = sharded(saved, target)
    second = sorted(set(index["weight_map"].values()))[1]
    (target / second).rename(tmp_path / "aside")
    with pytest.raises(CheckpointError, match=f"shards are missing: {second}"):
        HFReader(target)
    save_file({"model.other": torch.zeros(1)}, target / second)
    with pytest.raises(CheckpointError, match="no shard holds"):
        HFReader(target)
    (target / second).unlink()
    index["weight_map"] = {name: "../aside" if file == second else file for name, file in index["weight_map"].items()}
    (target / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"outside of the directory: \.\./aside"):
        HFReader(target)


def test_no_weights_and_two_sets_of_weights(saved: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        HFReader(tmp_path)
    sharded(saved, tmp_path / "out")
    shutil.copy(saved["dense"] / "model.safetensors", tmp_path / "out")
    with pytest.raises(CheckpointError, match="and an index of shards"):
        HFReader(tmp_path / "out")


def test_writing_casts_only_floating_point(tmp_path: Path) -> None:
    write(tmp_path / "out", {"a": torch.tensor([1.0, 1 / 3]), "b": torch.tensor([1, 2])}, dtype=torch.bfloat16)
    with HFReader(tmp_path / "out") as reader:
        assert torch.equal(reader.get("a"), torch.tensor([1.0, 1 / 3]).bfloat16())
        assert reader.get("b").dtype == torch.int64


def test_an_existing_target_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    write(target, {"a": torch.ones(1)})  # an empty directory will do
    with pytest.raises(CheckpointError, match="exists already"):
        HFWriter(target)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        HFWriter(tmp_path / "file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]


def test_a_target_that_appears_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with pytest.raises(CheckpointError, match="exists already"), HFWriter(target) as writer:
        writer.add("a", torch.ones(1))
        target.mkdir()
        (target / "mine").write_text("mine")
        writer.finish()
    assert [path.name for path in target.iterdir()] == ["mine"]


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stop"), HFWriter(tmp_path / "out", max_shard_bytes=4) as writer:
        writer.add("a", torch.ones(1))
        writer.add("b", torch.ones(1))
        assert any(writer.staging.iterdir())
        raise RuntimeError("stop")
    assert not any(tmp_path.iterdir())


def test_a_killed_writer_leaves_no_target(tmp_path: Path) -> None:
    script = f"""
import os, signal, torch
from pathlib import Path
from prism_nemo.convert.hf import HFWriter
writer = HFWriter(Path({str(tmp_path / "out")!r}), max_shard_bytes=4)
writer.add("a", torch.ones(1))
writer.add("b", torch.ones(1))
os.kill(os.getpid(), signal.SIGKILL)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": str(root)}, check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.") and left.name.endswith(".incomplete")
    write(tmp_path / "out", {"a": torch.ones(1)})  # and is in nobody's way
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_assets_are_carried_along_without_weights_and_code(saved: dict[str, Path], tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(saved["moe"], source)
    original = json.loads((source / "config.json").read_text())
    original["torch_dtype"] = "float32"
    del original["text_config"]["norm_topk_prob"], original["text_config"]["rope_parameters"]["mrope_interleaved"]
    (source / "config.json").write_text(json.dumps(original))
    for name in ("tokenizer.json", "merges.txt", "chat_template.jinja", "preprocessor_config.json"):
        (source / name).write_text(f"content of {name}")
    for name in ("modeling_evil.py", "pytorch_model.bin", "README.md"):
        (source / name).write_text("not this")
    copy_assets(source, target, dtype=torch.bfloat16)
    carried = [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "tokenizer.json",
    ]
    assert sorted(path.name for path in target.iterdir()) == carried
    assert (target / "merges.txt").read_text() == "content of merges.txt"
    config = json.loads((target / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    assert "torch_dtype" not in config
    assert config["text_config"]["num_experts"] == 4
    assert config["text_config"]["norm_topk_prob"] is True
    assert config["text_config"]["rope_scaling"]["mrope_interleaved"] is True
    assert config["architectures"] == ["Qwen3VLMoeForConditionalGeneration"]


def test_assets_are_found_in_a_model_and_in_a_checkpoint(saved: dict[str, Path], tmp_path: Path) -> None:
    assert hf_assets_directory(saved["dense"]) == saved["dense"]
    copy_assets(saved["dense"], tmp_path / "checkpoint" / "hf")
    assert hf_assets_directory(tmp_path / "checkpoint") == tmp_path / "checkpoint" / "hf"
    assert load_model_config(tmp_path / "checkpoint") == load_model_config(saved["dense"])
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        hf_assets_directory(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory"):
        hf_assets_directory(tmp_path / "absent")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not a readable JSON"), ("[]", "not a JSON object"), ('{"model_type": "llama"}', "'llama' is not supported")],
)
def test_a_config_of_something_else(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=message):
        load_model_config(tmp_path)
