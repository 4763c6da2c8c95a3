"""A demo pipeline over several seeds: the tables of docs/demo.md.

    python tools/bench/demo_seeds.py --seeds 0 1 2 --dir runs/demo_seeds [--write docs/demo_seeds.json]
    python tools/bench/demo_seeds.py --demo rlvr --dir runs/rlvr_seeds [--write docs/rlvr_seeds.json]

Runs `prism-nemo pipeline demo=NAME seed=S` once a seed, each in its own process, and prints one JSON object: every arm's
figures per seed and their mean, wall time and peak memory of each run. Finished seeds are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean

FIGURES = ("accuracy", "caption_accuracy", "format_rate")


def run_seed(demo: str, seed: int, directory: Path) -> dict[str, object]:
    """One pipeline; its summary with the wall time and peak memory of the whole process."""
    summary = directory / "summary.json"
    began = time.perf_counter()
    if not summary.exists():
        command = [sys.executable, "-m", "prism_nemo", "pipeline", f"demo={demo}", f"seed={seed}", f"experiment.dir={directory}"]
        with (directory.parent / f"{directory.name}.log").open("w") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        measured = {
            "wall_seconds": round(time.perf_counter() - began, 1),
            "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20, 3),
        }
        (directory / "measured.json").write_text(json.dumps(measured))
    result: dict[str, object] = json.loads(summary.read_text())
    result.update(json.loads((directory / "measured.json").read_text()))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", choices=("digits", "rlvr"), default="digits")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--dir", type=Path, default=Path("runs/demo_seeds"))
    parser.add_argument("--write", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    arguments.dir.mkdir(parents=True, exist_ok=True)
    runs = {seed: run_seed(arguments.demo, seed, arguments.dir / f"seed{seed}") for seed in arguments.seeds}
    table: dict[str, object] = {}
    first = next(iter(runs.values()))
    arms = [name for name, value in first.items() if isinstance(value, dict) and "accuracy" in value]
    for arm in arms:
        rows = {}
        for decoding in ("temperature_1", "greedy"):
            for figure in FIGURES:
                values = [run[arm]["greedy"][figure] if decoding == "greedy" else run[arm][figure] for run in runs.values()]  # type: ignore[index]
                rows[f"{decoding}/{figure}"] = {"seeds": values, "mean": round(mean(values), 4)}
        table[arm] = rows
    output = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread used",
        "seeds": arguments.seeds,
        "wall_seconds": [run["wall_seconds"] for run in runs.values()],
        "peak_memory_gib": [run["peak_memory_gib"] for run in runs.values()],
        "arms": table,
        "discriminator": {seed: run["discriminator"] for seed, run in runs.items() if "discriminator" in run},
    }
    text = json.dumps(output, indent=1)
    print(text)
    if arguments.write:
        arguments.write.write_text(text + "\n")


if __name__ == "__main__":
    main()
