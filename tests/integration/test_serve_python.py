"""A run whose Python has no vLLM, with rollout servers in another that does: the two environments of the container."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.stages import write_tiny_model, written

from prism_nemo.data.digits import write_digits_task

pytestmark = pytest.mark.vllm
CHECKOUT = Path(__file__).parents[2]
# `make test-vllm` makes this environment on top of one that lacks vLLM.
WITHOUT_VLLM = Path(sys.prefix).parent / "bin" / "python"


@pytest.mark.skipif(not WITHOUT_VLLM.exists(), reason="there is no other environment: make test-vllm")
def test_a_run_without_vllm_starts_servers_with_it(tmp_path: Path) -> None:
    data = write_digits_task(tmp_path / "data", seed=0, num_public=1, num_teacher=1, num_prompts=8, num_test=1)
    write_tiny_model(tmp_path / "model", head_dim=32)
    run = tmp_path / "run"
    command = [
        WITHOUT_VLLM, "-m", "prism_nemo", "rlvr", "rollout=vllm", "rollout.placement=separate", f"experiment.dir={run}",
        f"model.path={tmp_path / 'model'}", f"data.train={data.prompts}", "model.precision=fp32", "runtime.device=cpu",
        "data.system_prompt=<caption> <think> <answer>",
        "data.max_prompt_length=64", "data.max_response_length=8", "trainer.max_steps=2", "trainer.global_batch_size=2",
        "rollout.num_rollouts_per_prompt=2", "rollout.vllm.kv_cache_gb=0.1", "trainer.max_tokens_per_row=512",
    ]  # fmt: skip
    kept = {name: value for name, value in os.environ.items() if name != "PRISM_NEMO_SERVE_PYTHON"}

    def call(**more: str) -> subprocess.CompletedProcess[str]:
        environment = kept | {"PYTHONPATH": str(CHECKOUT)} | more
        return subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)

    refused = call()
    assert refused.returncode == 2 and "vLLM is not installed" in refused.stderr, refused.stderr
    done = call(PRISM_NEMO_SERVE_PYTHON=sys.executable)
    assert done.returncode == 0, done.stderr
    metrics, samples = written(run)
    assert len([row for row in metrics if row["prefix"] == "train"]) == 2 and samples
    assert "rollouts by vllm" in (run / "servers" / "replica-0.log").read_text()
    assert json.loads((run / "status.json").read_text())["state"] == "finished"
