"""RLVR one step off against RLVR in turn, on a rollout server of its own: the same final accuracy, and how much sooner.

    OMP_NUM_THREADS=1 python tools/bench/one_step_off.py --demo runs/demo --seeds 0 1 2 --steps 60

`--demo` is a finished `make demo`: its SFT policy and prompts are taken. Every run trains `--steps` steps with one server process
beside the training process, then is evaluated on the demo's test problems at temperature 1. Prints one JSON object; seconds are
means over the steps behind the first two.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from statistics import mean
from typing import Any

from demo_stages import run_stage

WARM_UP = 2  # steps that are not timed: the server starts, memory is allocated
SETTINGS = [
    "algorithm=grpo",
    "model.precision=fp32",
    "trainer.global_batch_size=16",
    "rollout.num_rollouts_per_prompt=8",
    "rollout.placement=separate",
    "rollout.servers.prompts_per_request=16",
    "algorithm.policy_loss.rollout_correction=token",
    "optimizer.lr=1.0e-4",
    "optimizer.adam_beta2=0.95",
]


def run(demo: Path, directory: Path, *, staleness: int, seed: int, steps: int, extra: list[str]) -> dict[str, Any]:
    """One training run and its evaluation."""
    train = [f"model.path={demo / 'sft'}", f"data.train={demo / 'data' / 'prompts.jsonl'}", f"trainer.max_steps={steps}"]
    run_stage("rlvr", directory, *SETTINGS, *train, f"runtime.seed={seed}", f"rollout.max_staleness={staleness}", *extra)
    evaluation = directory.with_name(f"{directory.name}_eval")
    test = [
        "model.precision=fp32",
        "rollout.temperature=1.0",
        f"model.path={directory}",
        f"data.validation={demo / 'data' / 'test.jsonl'}",
    ]
    run_stage("eval", evaluation, *test)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    timed = rows[WARM_UP:]
    found = next(row for row in map(json.loads, (evaluation / "metrics.jsonl").open()) if row["prefix"] == "sampled")
    return {
        "seed": seed,
        "accuracy": round(found["accuracy"], 4),
        "caption_accuracy": round(found["caption_accuracy"], 4),
        **{
            f"{name}_seconds": round(mean(row[f"time/{name}_seconds"] for row in timed), 3)
            for name in ("step", "rollout", "policy")
        },
        "mismatch": round(mean(row["mismatch/abs_log_ratio"] for row in timed), 6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--dir", type=Path, default=Path("runs/one_step_off"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--set", nargs="*", default=[], help="further KEY=VALUE of both ways")
    arguments = parser.parse_args()
    ways: dict[str, list[dict[str, Any]]] = {"in_turn": [], "one_step_off": []}
    for seed in arguments.seeds:
        for staleness, way in enumerate(ways):
            directory = arguments.dir.resolve() / f"{way}_{seed}"
            options = {"staleness": staleness, "seed": seed, "steps": arguments.steps, "extra": arguments.set}
            ways[way].append(run(arguments.demo.resolve(), directory, **options))
    means = {
        way: {name: round(mean(one[name] for one in runs), 4) for name in runs[0] if name != "seed"} for way, runs in ways.items()
    }
    step = {way: found["step_seconds"] for way, found in means.items()}
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread a process",
        "steps": arguments.steps,
        "runs": ways,
        "means": means,
        "generation_over_training": round(means["in_turn"]["rollout_seconds"] / means["in_turn"]["policy_seconds"], 2),
        "step_time_ratio": round(step["one_step_off"] / step["in_turn"], 3),
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
