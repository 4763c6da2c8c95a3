"""The same RLVR run on the Megatron engine, on vLLM with the same random numbers, and on vLLM with its own.

    OMP_NUM_THREADS=1 .venv/vllm/bin/python tools/bench/rlvr_engines.py --demo runs/demo [--policy runs/other] [--precision bf16]

`--demo` is a finished `make demo`: its SFT policy (unless `--policy` names another) and prompts are taken. One seed; each run
is then evaluated on the demo's test problems by the Megatron engine. Prints one JSON object: for every metric the largest
difference, over the steps, between the first two runs, accuracies, and seconds a step, the first two steps left out.
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

WARM_UP = 2  # steps that are not timed: engines start, memory is allocated
WAYS = {
    "megatron": ["rollout=megatron"],
    "vllm_shared_draws": ["rollout=vllm", "rollout.vllm.draws=shared"],
    "vllm_own_draws": ["rollout=vllm", "rollout.vllm.draws=engine"],
}
TRAINING = [
    "algorithm=grpo",
    "trainer.global_batch_size=16",
    "rollout.num_rollouts_per_prompt=8",
    "optimizer.lr=1.0e-4",
    "optimizer.adam_beta2=0.95",
]


def run(options: argparse.Namespace, way: str) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """One training run and its evaluation: the metrics of every step, and what came out."""
    directory, policy = options.dir / way, options.policy or options.demo / "sft"
    data, precision = options.demo / "data", f"model.precision={options.precision}"
    own = [f"model.path={policy}", f"data.train={data / 'prompts.jsonl'}", f"trainer.max_steps={options.steps}"]
    run_stage("rlvr", directory, precision, *TRAINING, *own, f"runtime.seed={options.seed}", *WAYS[way], *options.set)
    evaluation = options.dir / f"{way}_eval"
    test = ["rollout.temperature=1.0", f"model.path={directory}", f"data.validation={data / 'test.jsonl'}"]
    run_stage("eval", evaluation, precision, *test)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["prefix"] == "train"]
    found = json.loads((evaluation / "evaluation.json").read_text())
    result = {
        "accuracy": {"sampled": round(found["accuracy"], 4), "greedy": round(found["greedy"]["accuracy"], 4)},
        "seconds": {
            name: round(mean(row[f"time/{name}_seconds"] for row in rows[WARM_UP:]), 3) for name in ("step", "rollout", "policy")
        },
        "mean_abs_log_ratio": float(f"{mean(row['mismatch/abs_log_ratio'] for row in rows):.3g}"),
        "last_reward": {key: value for key, value in rows[-1].items() if key in ("reward", "accuracy")},
    }
    return rows, result


def largest_differences(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> dict[str, Any]:
    """By metric. Times are left out; a metric that only one run has in some step is named."""
    assert [row["step"] for row in left] == [row["step"] for row in right]
    names = sorted({name for row in (*left, *right) for name in row if not name.startswith("time/") and name != "prefix"})
    differing: dict[str, float] = {}
    lone = []
    for name in names:
        if any((name in one) != (name in other) for one, other in zip(left, right, strict=True)):
            lone.append(name)
            continue
        largest = max(abs(one[name] - other[name]) for one, other in zip(left, right, strict=True) if name in one)
        if largest > 0:
            differing[name] = float(f"{largest:.3g}")
    equal = [name for name in names if name not in differing and name not in lone]
    return {"steps": len(left), "equal": equal, "largest_difference": differing or "none", "in_one_run_only": lone}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True)
    parser.add_argument("--policy", type=Path, help="a run or a HuggingFace directory to start from")
    parser.add_argument("--dir", type=Path, default=Path("runs/rlvr_engines"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--set", nargs="*", default=[], help="further KEY=VALUE of the training runs")
    options = parser.parse_args()
    options.demo, options.dir = options.demo.resolve(), options.dir.resolve()
    found = {way: run(options, way) for way in WAYS}
    output = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
        "policy": str(options.policy or options.demo / "sft"),
        "precision": options.precision,
        "seed": options.seed,
        "megatron_and_vllm_shared_draws": largest_differences(found["megatron"][0], found["vllm_shared_draws"][0]),
        "runs": {way: result for way, (_, result) in found.items()},
    }
    print(json.dumps(output, indent=1))


if __name__ == "__main__":
    main()
