"""The command under torchrun, on two tensor-parallel ranks, against the same command on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.stages import assert_same_metrics, run_stage, settings, written

from prism_nemo.cli import main

STEPS = "trainer.max_steps=2"


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "prism_nemo"]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=400, check=False)


def test_align_on_two_ranks_is_align_on_one(tmp_path: Path) -> None:
    run = tmp_path / "two"
    done = torchrun("align", *settings("align", run, STEPS, "parallel.tensor_model_parallel_size=2"))
    assert done.returncode == 0, done.stderr[-3000:]
    metrics, samples = written(run)
    expected_metrics, expected_samples = written(run_stage("align", tmp_path / "one", STEPS))
    assert [row["step"] for row in metrics] == [1, 2, 2]
    assert_same_metrics(metrics, expected_metrics, 1e-4)
    scores = ("score/perception", "score/reasoning")
    assert len(samples) == 8
    for found, want in zip(samples, expected_samples, strict=True):
        assert {name: value for name, value in found.items() if name not in scores} == {
            name: value for name, value in want.items() if name not in scores
        }
        assert [found[name] for name in scores] == pytest.approx([want[name] for name in scores], abs=1e-4)
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
    assert main(["convert", "export", "--checkpoint", str(run), "--out", str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf" / "model.safetensors").stat().st_size > 100_000
