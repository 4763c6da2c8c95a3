"""Streamed conversion and layouts: what is streamed loads at any, what any layout saved is exported; ranks share the work."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.ranks import run_ranks
from helpers.saving import save_model
from helpers.tiny import tiny_model
from safetensors.torch import load_file

from prism_nemo.config.enums import Precision
from prism_nemo.config.schema import DiscriminatorConfig, ModelConfig, ParallelConfig, RuntimeConfig
from prism_nemo.convert.commands import export_hf, import_hf, upcycle_hf
from prism_nemo.convert.manifest import seal
from prism_nemo.convert.ranks import launched_ranks
from prism_nemo.engine.runtime import initialize, session
from prism_nemo.errors import CheckpointError
from prism_nemo.models.base import TrainableModel
from prism_nemo.models.discriminator import DiscriminatorModel
from prism_nemo.models.policy import PolicyModel
from prism_nemo.models.weights import export_hf_tensors

WORLD = 4
SHARD_BYTES = 100_000
DENSE = {
    "tp2": ParallelConfig(tensor_model_parallel_size=2),
    "pp2 vpp2": ParallelConfig(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    "tp2 pp2": ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
}
EXPERTS = {
    "ep2": ParallelConfig(expert_model_parallel_size=2),
    "tp2 ep2": ParallelConfig(tensor_model_parallel_size=2, expert_model_parallel_size=2, sequence_parallel=True),
    "pp2 ep2": ParallelConfig(pipeline_model_parallel_size=2, expert_model_parallel_size=2),
    "tp2 pp2": ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, sequence_parallel=True),
}
CASES = {"dense": DENSE, "experts": EXPERTS, "discriminator": EXPERTS}


def on_ranks(work: Path, sources: dict[str, Path]) -> dict[str, list[str]]:
    """For each case, the names of the tensors that are not equal (on the first rank), and what the shared conversion did."""
    found: dict[str, list[str]] = {}
    with session(ParallelConfig(), RuntimeConfig()) as runtime:
        with launched_ranks() as ranks:
            for kind, source in sources.items():
                if kind == "discriminator":
                    upcycle_hf(source, work / kind, DiscriminatorConfig(), seed=3, ranks=ranks, max_shard_bytes=SHARD_BYTES)
                else:
                    import_hf(source, work / kind, ranks=ranks, max_shard_bytes=SHARD_BYTES)
                export_hf(work / kind, work / f"{kind}-hf", ranks=ranks, max_shard_bytes=SHARD_BYTES)
            found["together"] = [failing_together(work, sources["dense"], ranks)]
        for kind, layouts in CASES.items():
            expected = all_tensors(work / f"{kind}-hf")
            for name, parallel in layouts.items():
                runtime = initialize(parallel, RuntimeConfig())
                model = build(kind, work / kind, parallel, runtime)
                score_head = kind == "discriminator"
                exported = dict(export_hf_tensors(model.chunks, model.hf_config, score_head=score_head))
                found[f"{kind} {name} loads"] = different(exported, expected)
                saved = work / f"{kind} {name}" / model.name
                save_model(saved, model.chunks, None)
                if runtime.is_main:
                    model.save_assets(saved / "hf")
                    seal(saved)
                    export_hf(saved, work / "exported")
                    found[f"{kind} {name} saved"] = different(all_tensors(work / "exported"), expected)
                    shutil.rmtree(work / "exported")
                dist.barrier()
    return found


def failing_together(work: Path, source: Path, ranks: Any) -> str:
    """One rank cannot read its source: all must fail, and none may wait."""
    try:
        import_hf(source if ranks.rank != 1 else work / "absent", work / "never", ranks=ranks)
    except CheckpointError as error:
        assert not (work / "never").exists()
        return error.what
    return "nothing failed"


def build(kind: str, path: Path, parallel: ParallelConfig, runtime: Any) -> TrainableModel:
    if kind == "discriminator":
        return DiscriminatorModel(DiscriminatorConfig(path=str(path), precision=Precision.fp32), parallel, runtime, seed=0)
    return PolicyModel(ModelConfig(path=str(path), precision=Precision.fp32), parallel, runtime)


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(directory.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def different(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    if found.keys() != expected.keys():
        return sorted(found.keys() ^ expected.keys())
    return [name for name in expected if not torch.equal(found[name], expected[name])]


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def found(work: Path) -> list[dict[str, list[str]]]:
    sources = {kind: tiny_model(experts=kind == "experts").directory for kind in CASES}
    results: list[dict[str, list[str]]] = run_ranks(on_ranks, WORLD, work, sources)
    return results


@pytest.mark.parametrize("case", [f"{kind} {name}" for kind, layouts in CASES.items() for name in layouts])
def test_a_streamed_checkpoint_loads_at_any_layout_and_any_is_exported(found: list[dict[str, list[str]]], case: str) -> None:
    assert [result[f"{case} loads"] for result in found] == [[]] * WORLD
    assert found[0][f"{case} saved"] == []


def test_what_ranks_write_together_is_what_one_writes(found: list[dict[str, list[str]]], work: Path, tmp_path: Path) -> None:
    import_hf(tiny_model(experts=True).directory, tmp_path / "alone", max_shard_bytes=SHARD_BYTES)
    one, other = (
        {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "alone", work / "experts")
    )
    assert one == other and sum(name.endswith(".distcp") for name in one) > WORLD


def test_when_one_rank_fails_all_do(found: list[dict[str, list[str]]]) -> None:
    messages = [result["together"][0] for result in found]
    assert messages[1] == "no such directory"
    assert all(message.startswith("rank 1 failed:\nno such directory") for message in (messages[0], *messages[2:]))
