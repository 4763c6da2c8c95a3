"""kill -9 at random moments of saving: the newest checkpoint is always a whole one, and the run goes on from it exactly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from helpers.tiny import tiny_model

TRIALS = 10

# Imports once and forks: a trial then costs no start of Python. Every child trains on from the newest checkpoint and saves behind
# every step; it tells when a save begins, and is killed a random while later.
SCRIPT = """
import hashlib, json, os, random, signal, sys, time
from pathlib import Path
import torch
from prism_nemo.config.enums import DecayStyle, Device
from prism_nemo.config.schema import DiscriminatorConfig, ModelConfig, OptimizerConfig, ParallelConfig
from prism_nemo.config.enums import Precision
from prism_nemo.config.schema import RuntimeConfig
from prism_nemo.engine.checkpoint import CheckpointStore
from prism_nemo.engine.runtime import session
from prism_nemo.models.discriminator import DiscriminatorModel
from prism_nemo.models.policy import PolicyModel
from prism_nemo.run_directory import LATEST

source, folder, trials = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)

def models(runtime):
    policy = PolicyModel(ModelConfig(path=source, precision=Precision.fp32), ParallelConfig(), runtime)
    discriminator = DiscriminatorModel(
        DiscriminatorConfig(path=source, precision=Precision.fp32), ParallelConfig(), runtime, seed=0)
    found = {"policy": policy, "discriminator": discriminator}
    for model in found.values():
        model.build_optimizer(OptimizerConfig(lr=0.01, lr_decay_style=DecayStyle.constant), 1000)
    return found

def train(found, step):
    for model in found.values():
        generator = torch.Generator().manual_seed(step)
        model.prepare_for_training_step()
        for parameter in model.module.parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))
        assert model.optimizer_step(step).applied

def digest(found):
    seen = hashlib.sha256()
    for model in found.values():
        for parameter in model.module.parameters():
            seen.update(parameter.detach().numpy().tobytes())
        for part in model.optimizer.optimizer.chained_optimizers:
            for moments in part.optimizer.state.values():
                for key in sorted(moments):
                    seen.update(torch.as_tensor(moments[key]).numpy().tobytes())
    return seen.hexdigest()

def child(work):
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        try:
            with session(ParallelConfig(), RuntimeConfig(device=Device.cpu)) as runtime:
                work(runtime, models(runtime), lambda text: os.write(writing, text.encode() + b"\\n"))
        except BaseException as error:
            os.write(writing, f"failed {error!r}".encode() + b"\\n")
            raise
        os._exit(0)
    os.close(writing)
    return pid, os.fdopen(reading)

def unbroken(runtime, found, tell):
    for step in range(2 * trials + 4):
        train(found, step)
        tell(f"{step + 1} {digest(found)}")

def resumed(runtime, found, tell):
    store = CheckpointStore(folder, runtime, keep_last_k=2)
    state = store.load(found)
    step = 0 if state is None else state["step"]
    tell(f"loaded {step} {digest(found) if step else ''}")
    while True:
        train(found, step)
        step += 1
        tell(f"saving {step}")
        began = time.monotonic()
        store.save(step, found, {})
        tell(f"saved {step} {time.monotonic() - began}")

pid, told = child(unbroken)
expected = dict(line.split() for line in told)
os.waitpid(pid, 0)

generator = random.Random(0)
results, seconds = [], 0.5
for trial in range(trials + 1):
    pid, told = child(resumed)
    word, step, *digests = told.readline().split()
    assert word == "loaded", (word, step)
    loaded = int(step)
    if loaded:
        assert digests == [expected[step]], f"step {step} is not what was saved"
    last = loaded
    for line in told:
        word, step, *rest = line.split()
        assert word in ("saving", "saved"), line
        if word == "saved":
            last, seconds = int(step), float(rest[0])
        elif int(step) == loaded + 1 + trial % 2:  # the first or the second save of this process
            break
    time.sleep(generator.uniform(0, seconds))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    last = max([last] + [int(line.split()[1]) for line in told.read().splitlines() if line.startswith("saved")])
    latest = folder / "checkpoints" / LATEST
    there = int(latest.read_text().removeprefix("step_")) if latest.is_file() else 0
    assert there >= last, f"step {last} was saved, the newest is {there}"
    results.append({"loaded": loaded, "killed_in": int(step), "newest": there})
print(json.dumps(results))
"""


def test_a_kill_while_saving_loses_nothing_that_was_saved(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", SCRIPT, str(tiny_model().directory), str(tmp_path), str(TRIALS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    assert len(results) == TRIALS + 1
    cut = [result for result in results if result["newest"] < result["killed_in"]]
    assert len(cut) >= TRIALS // 3, "killed in the middle of a save"
    assert results[-1]["newest"] > results[0]["newest"], "the run went on"
