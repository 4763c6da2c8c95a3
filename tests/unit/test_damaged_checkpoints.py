"""A checkpoint that is not what was written is found before it is loaded; the newest whole one is used, and that is said."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.rows import one_rank
from helpers.tiny import tiny_model

from prism_nemo.config.enums import Precision
from prism_nemo.config.schema import ModelConfig, ParallelConfig
from prism_nemo.convert import manifest
from prism_nemo.convert.manifest import STEP_MANIFEST
from prism_nemo.engine.checkpoint import CheckpointStore
from prism_nemo.errors import CheckpointError
from prism_nemo.models.policy import PolicyModel
from prism_nemo.run_directory import LATEST


def policy() -> PolicyModel:
    return PolicyModel(ModelConfig(path=str(tiny_model().directory), precision=Precision.fp32), ParallelConfig(), one_rank())


@pytest.fixture(scope="module")
def model() -> PolicyModel:
    return policy()


@pytest.fixture(scope="module")
def saved(model: PolicyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the checkpoints of steps 1, 2 and 3. In step n every weight is n."""
    directory = tmp_path_factory.mktemp("saved")
    store = CheckpointStore(directory, one_rank(), keep_last_k=9)
    for step in (1, 2, 3):
        fill(model, step)
        store.save(step, {"policy": model}, {})
    return directory


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


def fill(model: PolicyModel, value: float) -> None:
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.fill_(value)


def load(run: Path, model: PolicyModel, *, from_older: bool = True) -> tuple[int | None, str]:
    """The step that is loaded, by its weights and by its state, and the notice."""
    fill(model, -1.0)
    store = CheckpointStore(run, one_rank(), keep_last_k=2, from_older=from_older)
    state = store.load({"policy": model})
    if state is None:
        return None, store.notice
    assert all(bool((parameter == state["step"]).all()) for parameter in model.module.parameters())
    return int(state["step"]), store.notice


def step(run: Path, number: int) -> Path:
    return run / "checkpoints" / f"step_{number:08d}"


def flip(file: Path, position: float = 0.5, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[min(int(position * len(content)), len(content) - 1)] ^= 1 << bit
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def zero(file: Path) -> None:
    """What some file systems leave of a file after a power failure: its length, and no data."""
    file.write_bytes(bytes(file.stat().st_size))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


DAMAGES: dict[str, Callable[[Path], None]] = {"flipped": flip, "cut": cut, "zeros": zero, "gone": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_file_counts(damage: str, run: Path, model: PolicyModel) -> None:
    """Damage to any one file of the newest checkpoint is found, and the one before it is loaded."""
    whole = run.with_name("whole")
    shutil.copytree(step(run, 3), whole)
    names = [path.relative_to(whole) for path in files(whole)]
    assert len(names) > 8
    for name in names:
        DAMAGES[damage](step(run, 3) / name)
        found, notice = load(run, model)
        assert found == 2, name
        assert "resumed from step_00000002, not from step_00000003: 1 steps are done again" in notice, name
        shutil.copy(whole / name, step(run, 3) / name)
    assert load(run, model) == (3, "")


def test_any_bit_counts(run: Path, model: PolicyModel) -> None:
    """Single bits at random places of the largest file, of which a loader that looks at sizes would see nothing."""
    chance = random.Random(0)
    weights = max(files(step(run, 3)), key=lambda path: path.stat().st_size)
    for _ in range(20):
        place, bit = chance.random(), chance.randrange(8)
        flip(weights, place, bit)
        assert load(run, model)[0] == 2
        flip(weights, place, bit)
    assert load(run, model)[0] == 3


def test_without_permission_a_damaged_one_is_an_error(run: Path, model: PolicyModel) -> None:
    flip(step(run, 3) / "trainer.json")
    with pytest.raises(CheckpointError, match=r"the checkpoint is damaged: trainer\.json is not what was written") as caught:
        load(run, model, from_older=False)
    assert "experiment.resume_from_older=true" in str(caught.value)


def test_several_are_damaged(run: Path, model: PolicyModel) -> None:
    flip(step(run, 3) / "policy" / "common.pt")
    shutil.rmtree(step(run, 2) / "policy")
    found, notice = load(run, model)
    assert found == 1
    assert "2 steps are done again" in notice
    assert "step_00000003 is damaged: common.pt is not what was written" in notice
    assert "step_00000002 is " in notice
    (step(run, 1) / "trainer.json").unlink()
    with pytest.raises(CheckpointError, match="none of the run's checkpoints is whole") as caught:
        load(run, model)
    assert all(f"step_0000000{number} is" in str(caught.value) for number in (1, 2, 3))


@pytest.mark.parametrize("text", ["", "\0\0\0\0", None])
def test_a_marker_that_says_nothing(text: str | None, run: Path, model: PolicyModel) -> None:
    marker = run / "checkpoints" / LATEST
    marker.write_text(text) if text is not None else marker.unlink()
    assert load(run, model)[0] == 3


def test_steps_that_somebody_went_back_from_are_not_used(run: Path, model: PolicyModel) -> None:
    (run / "checkpoints" / LATEST).write_text("step_00000002")
    flip(step(run, 2) / "trainer.json")
    assert load(run, model)[0] == 1


def test_a_good_one_is_not_dropped_for_a_damaged_one(run: Path, model: PolicyModel) -> None:
    shutil.rmtree(step(run, 1))
    flip(step(run, 3) / "trainer.json")
    store = CheckpointStore(run, one_rank(), keep_last_k=2)
    assert store.load({"policy": model}) is not None
    store.save(4, {"policy": model}, {})
    assert [path.name for path in sorted(store.folder.glob("step_*"))] == ["step_00000002", "step_00000004"]


def test_checkpoints_of_earlier_versions_have_sizes_alone(run: Path, model: PolicyModel) -> None:
    for number in (1, 2, 3):
        (step(run, number) / STEP_MANIFEST).unlink()
        listed = step(run, number) / "policy" / manifest.MANIFEST
        entries = json.loads(listed.read_text())
        listed.write_text(json.dumps({name: entry["bytes"] for name, entry in entries.items()}))
    assert load(run, model) == (3, "")
    cut(step(run, 3) / "policy" / "common.pt")
    assert load(run, model)[0] == 2


def test_the_hash_does_not_depend_on_who_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file over several blocks, an empty one, and one of a block's exact length; each byte counts."""
    monkeypatch.setattr(manifest, "BLOCK", 4096)
    content = random.Random(0).randbytes(10_000)
    for name, data in {
        "long": content,
        "empty": b"",
        "exact": content[:4096],
        "swapped": content[4096:8192] + content[:4096],
    }.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "two").write_bytes(content[:8192])
    hashes = manifest.hash_files(tmp_path, ["long", "empty", "exact", "swapped", "two"])
    assert len(set(hashes.values())) == 5
    for place in (0, 4095, 4096, 9_999):
        flip(tmp_path / "long", place / 10_000)
        assert manifest.hash_files(tmp_path, ["long"])["long"] != hashes["long"]
        flip(tmp_path / "long", place / 10_000)
    assert manifest.hash_files(tmp_path, ["long"])["long"] == hashes["long"]
