"""What others write: discriminators with their head under other names, experts one by one, Megatron-Bridge's checkpoints."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.tiny import tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from prism_nemo.config.schema import DiscriminatorConfig
from prism_nemo.convert.checkpoint_keys import place
from prism_nemo.convert.commands import export_hf, import_hf, import_megatron, upcycle_hf
from prism_nemo.convert.hf import copy_assets, load_model_config
from prism_nemo.convert.hf_reader import HFReader
from prism_nemo.convert.inspect import describe
from prism_nemo.convert.ops import GatedColumn, PadRows
from prism_nemo.convert.qwen3_vl import ExpertLayout, hub_config, mappings
from prism_nemo.convert.sources import HFSource, full_tensor
from prism_nemo.convert.verify import verify
from prism_nemo.errors import CheckpointError

GOLDEN = Path(__file__).parents[1] / "golden" / "megatron_bridge_names.json"


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A discriminator in the Hub's layout, its head under our name."""
    root = tmp_path_factory.mktemp("released")
    upcycle_hf(tiny_model().directory, root / "checkpoint", DiscriminatorConfig(head_init_std=1.0), seed=3)
    export_hf(root / "checkpoint", root / "hf")
    return root / "hf"


def rewritten(source: Path, target: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    copy_assets(source, target)
    save_file(change(load_file(source / "model.safetensors")), target / "model.safetensors", metadata={"format": "pt"})
    return target


def without_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "value_head.weight"}


def head_of(released: Path) -> Tensor:
    return load_file(released / "model.safetensors")["value_head.weight"]


HEAD_NAMES = ("v_head.weight", "v_head.summary.weight", "value_head.summary.weight", "score.weight", "model.score.weight")


@pytest.mark.parametrize("name", HEAD_NAMES)
def test_a_head_within_the_shards(name: str, released: Path, tmp_path: Path) -> None:
    hf = rewritten(released, tmp_path / "hf", lambda tensors: without_head(tensors) | {name: tensors["value_head.weight"]})
    import_hf(hf, tmp_path / "out")
    assert verify(released, tmp_path / "out", outputs=False).same


HEAD_FILES: dict[str, Callable[[Tensor], Any]] = {
    "value_head.pt": lambda head: {"weight": head},
    "value_head.bin": lambda head: {"v_head.summary.weight": head, "v_head.summary.bias": torch.zeros(1)},
    "v_head.pth": lambda head: head,
    "score.pt": lambda head: {"score.weight": head[0]},
}


@pytest.mark.parametrize("name", [*HEAD_FILES, "value_head.safetensors"])
def test_a_head_in_a_file_of_its_own(name: str, released: Path, tmp_path: Path) -> None:
    hf = rewritten(released, tmp_path / "hf", without_head)
    if name.endswith("safetensors"):
        save_file({"weight": head_of(released)}, hf / name)
    else:
        torch.save(HEAD_FILES[name](head_of(released)), hf / name)
    import_hf(hf, tmp_path / "out")
    assert verify(released, tmp_path / "out", outputs=False).same


def test_a_head_in_another_type_takes_the_models(released: Path, tmp_path: Path) -> None:
    """Heads are often kept in float32 beside a bfloat16 model."""

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor if name == "value_head.weight" else tensor.bfloat16() for name, tensor in tensors.items()}

    hf = rewritten(released, tmp_path / "hf", change)
    import_hf(hf, tmp_path / "out")
    export_hf(tmp_path / "out", tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert {tensor.dtype for tensor in back.values()} == {torch.bfloat16}
    assert torch.equal(back["value_head.weight"], head_of(released).bfloat16())


def test_a_discriminator_may_keep_an_output_matrix(released: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {"lm_head.weight": torch.randn_like(tensors["model.language_model.embed_tokens.weight"])}

    hf = rewritten(released, tmp_path / "hf", change)
    config = json.loads((hf / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
    (hf / "config.json").write_text(json.dumps(config))
    import_hf(hf, tmp_path / "out")
    export_hf(tmp_path / "out", tmp_path / "back")
    assert "lm_head.weight" not in load_file(tmp_path / "back" / "model.safetensors")
    assert verify(released, tmp_path / "out", outputs=False).same


class Evil:
    def __reduce__(self) -> Any:
        return print, ("executed",)


def test_heads_that_will_not_do(released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = rewritten(released, tmp_path / "hf", without_head)
    (hf / "value_head.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="cannot be read safely"):
        import_hf(hf, tmp_path / "out")
    torch.save({"weight": head_of(released), "bias": torch.ones(1)}, hf / "value_head.pt")
    with pytest.raises(CheckpointError, match="has a bias"):
        import_hf(hf, tmp_path / "out")
    torch.save({"weight": torch.zeros(1, 3)}, hf / "value_head.pt")
    with pytest.raises(CheckpointError, match=r"value_head.weight: shape \[1, 3\], expected \[1, 64\]"):
        import_hf(hf, tmp_path / "out")
    torch.save({"weight": torch.zeros(1, 64)}, released / "value_head.pt")
    try:
        with pytest.raises(CheckpointError, match="stored twice, differently"):
            import_hf(released, tmp_path / "out")
    finally:
        (released / "value_head.pt").unlink()
    assert "executed" not in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["hf"], "nothing was begun"


def separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hub-layout experts taken apart by hand: gate and up are the halves of the last axis."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        prefix, marker, part = name.rpartition(".mlp.experts.")
        if not marker:
            result[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            if part == "down_proj":
                result[f"{prefix}{marker}{expert}.down_proj.weight"] = matrix.T.contiguous()
                continue
            gate, up = matrix.chunk(2, dim=1)
            result[f"{prefix}{marker}{expert}.gate_proj.weight"] = gate.T.contiguous()
            result[f"{prefix}{marker}{expert}.up_proj.weight"] = up.T.contiguous()
    return result


def test_experts_one_by_one_are_the_fused_ones(tmp_path: Path) -> None:
    import_hf(tiny_model(experts=True).directory, tmp_path / "checkpoint")
    export_hf(tmp_path / "checkpoint", tmp_path / "hub")
    hf = rewritten(tmp_path / "hub", tmp_path / "separate", separate)
    with HFReader(hf) as reader:
        assert reader.check(load_model_config(hf)) == ExpertLayout.separate
    import_hf(hf, tmp_path / "again")
    assert verify(tmp_path / "hub", tmp_path / "again", outputs=False).same
    facts = {name: describe(tmp_path / name).facts["expert layout"] for name in ("hub", "separate")}
    assert facts == {"hub": "hub", "separate": "separate"}
    assert describe(tiny_model(experts=True).directory).facts["expert layout"] == "transformers5"


def test_our_names_are_megatron_bridges() -> None:
    """The list is written out from Megatron-Bridge's table for two layers, two vision blocks, two experts."""
    golden = json.loads(GOLDEN.read_text())
    for kind, expected in golden["parameters"].items():
        config = golden["configs"][kind]
        found = {name: sorted(mapping.hf_names) for mapping in mappings(config) for name in mapping.megatron_names}
        assert found == expected, kind


def bridge_checkpoint(directory: Path, *, numbered: bool, wrapper: str, padded: int) -> None:
    """A `torch_dist` checkpoint with the values of the tiny MoE model, written by torch itself, as another tool would."""
    model = tiny_model(experts=True)
    config = hub_config(model.config)
    with HFReader(model.directory) as reader:
        source = HFSource(reader, config)
        state: dict[str, Tensor] = {}
        for mapping in mappings(config):
            shape = mapping.megatron_shape
            for name in mapping.megatron_names:
                full = full_tensor(source, name, shape)
                if isinstance(mapping.op, PadRows):
                    full = torch.cat([full, torch.full((padded, shape[1]), 9.0)])
                where = place(name, config)
                if not numbered:
                    stacked = state.setdefault(wrapper + where.key, torch.zeros(*where.counts, *full.shape))
                    stacked[where.index] = full
                    continue
                halves = isinstance(mapping.sharding, GatedColumn)
                key = wrapper + name.replace(".mlp.experts.", ".mlp.experts.experts.")
                parts = zip(("_w", "_v"), full.chunk(2), strict=True) if halves else [("", full)]
                state |= {key + suffix: part.contiguous() for suffix, part in parts}
    dcp.save(state, checkpoint_id=directory, no_dist=True)
    (directory / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))


@pytest.mark.parametrize(("numbered", "wrapper", "padded"), [(False, "", 0), (False, "module.", 64), (True, "model.", 0)])
def test_a_checkpoint_of_another_tool_is_imported(numbered: bool, wrapper: str, padded: int, tmp_path: Path) -> None:
    """Layers stacked or numbered, gate and up under keys of their own, a wrapped model, a padded vocabulary."""
    bridge_checkpoint(tmp_path / "bridge", numbered=numbered, wrapper=wrapper, padded=padded)
    model = tiny_model(experts=True).directory
    import_megatron(tmp_path / "bridge", model, tmp_path / "out")
    assert verify(model, tmp_path / "out", outputs=False).same
    assert describe(tmp_path / "bridge").facts["written by"] == "another tool"


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    bridge_checkpoint(tmp_path / "bridge", numbered=False, wrapper="", padded=0)
    with pytest.raises(CheckpointError, match=r"does not fit config\.json"):
        import_megatron(tmp_path / "bridge", tiny_model().directory, tmp_path / "out")
    dcp.save({"weight": torch.ones(2)}, checkpoint_id=tmp_path / "other", no_dist=True)
    with pytest.raises(CheckpointError, match="holds no Qwen3-VL"):
        import_megatron(tmp_path / "other", tiny_model().directory, tmp_path / "out")
    assert not (tmp_path / "out").exists()
