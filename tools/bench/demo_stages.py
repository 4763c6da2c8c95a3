"""Stages on the demo's data, as the benches run them: not a bench itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SHARED = (
    "runtime.num_threads=1",
    "runtime.device=cpu",
    "data.system_prompt=<caption> <think> <answer>",
    "data.max_prompt_length=64",
    "data.max_response_length=48",
    "experiment.progress=false",
)


def run_stage(stage: str, directory: Path, *overrides: str) -> None:
    """The stage's command, unless it has finished there already."""
    status = directory / "status.json"
    if status.is_file() and json.loads(status.read_text()).get("state") == "finished":
        return
    arguments = [sys.executable, "-m", "prism_nemo", stage, f"experiment.dir={directory}", *SHARED, *overrides]
    subprocess.run(arguments, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
