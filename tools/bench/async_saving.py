"""How long a checkpoint holds training: waited for, and written while the next steps run.

    OMP_NUM_THREADS=1 python tools/bench/async_saving.py [--hidden 1024 --layers 12 --folder DIR]

One process: a random policy of that shape with its optimizer, fp32. A step is a number of matrix products (`--passes`) and an
optimizer step. Prints one JSON object; seconds are medians of `--repeats` rounds, in each of which both ways take their turn.

held_waiting       for which a save that is waited for holds the loop (`trainer.async_save=false`)
held_meanwhile     likewise of one that is not: planned, and copied
slower_meanwhile   by how much more the steps took that ran until it was through, than as many without
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from weight_update import write_model

from prism_nemo.config.enums import DecayStyle, Device, Precision
from prism_nemo.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, RuntimeConfig
from prism_nemo.engine.checkpoint import CheckpointStore
from prism_nemo.engine.runtime import session
from prism_nemo.models.policy import PolicyModel


def seconds_of(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


class Steps:
    """Training, without data: matrix products, and an optimizer step with made-up gradients."""

    def __init__(self, policy: PolicyModel, passes: int) -> None:
        self.policy, self.passes, self.done = policy, passes, 0
        self.matrices = torch.randn(2, 1024, 1024)

    def step(self) -> None:
        for _ in range(self.passes):
            self.matrices[0] @ self.matrices[1]
        self.policy.prepare_for_training_step()
        for chunk in self.policy.chunks:
            for parameter in chunk.parameters():
                parameter.main_grad.fill_(1e-3)
        assert self.policy.optimizer_step(self.done).applied
        self.done += 1


def one_round(steps: Steps, store: CheckpointStore) -> dict[str, float]:
    models = {"policy": steps.policy}
    steps.step()
    found = {"held_waiting": seconds_of(lambda: store.save(steps.done, models, {}))}
    steps.step()
    began = time.perf_counter()
    found["held_meanwhile"] = seconds_of(lambda: store.begin(steps.done, models, {}))
    meanwhile = []
    while store.settle(wait=False) is None:
        meanwhile.append(seconds_of(steps.step))
    found["through_after"] = time.perf_counter() - began
    alone = seconds_of(lambda: [steps.step() for _ in meanwhile])
    found |= {"steps_meanwhile": len(meanwhile), "slower_meanwhile": sum(meanwhile) - alone}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--passes", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(dir=options.folder) as name,
        session(ParallelConfig(), RuntimeConfig(device=Device.cpu)) as runtime,
    ):
        source = Path(name) / "model"
        write_model(source, hidden=options.hidden, layers=options.layers, vocabulary=options.vocabulary, experts=0)
        policy = PolicyModel(ModelConfig(path=str(source), precision=Precision.fp32), ParallelConfig(), runtime)
        policy.build_optimizer(OptimizerConfig(lr=1e-5, lr_decay_style=DecayStyle.constant), 1000)
        steps = Steps(policy, options.passes)
        store = CheckpointStore(Path(name), runtime, keep_last_k=1)
        one_round(steps, store)
        rounds = [one_round(steps, store) for _ in range(options.repeats)]
        latest = store.latest()
        assert latest is not None
        size = sum(path.stat().st_size for path in latest.rglob("*") if path.is_file())
    medians = {key: statistics.median(found[key] for found in rounds) for key in rounds[0]}
    print(
        json.dumps(
            {
                "megabytes": round(size / 1e6),
                "cpus": os.cpu_count(),
                "load": round(os.getloadavg()[0], 1),
                "seconds": {key: round(value, 3) for key, value in medians.items()},
                "held_share": round(medians["held_meanwhile"] / medians["held_waiting"], 3),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
