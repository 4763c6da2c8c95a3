"""Rollouts on servers for two ranks: a policy that both hold a part of (one leader), and data-parallel ones (two leaders)."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from helpers.ranks import run_ranks
from helpers.tiny import make_prompt, tiny_model

from prism_nemo.config.enums import Device, Precision, RolloutPlacement
from prism_nemo.config.rollout import RolloutConfig, RolloutServersConfig
from prism_nemo.config.schema import DataConfig, ModelConfig, ParallelConfig, RuntimeConfig
from prism_nemo.engine.runtime import Runtime, initialize, session
from prism_nemo.errors import PrismError
from prism_nemo.models.policy import PolicyModel
from prism_nemo.rollout.base import Rollout, SamplingParams, build_engine
from prism_nemo.rollout.remote import RemoteEngine

PROMPTS = (make_prompt([(4, 6), (2, 4)], seed=1), make_prompt([], seed=2, text_length=8), make_prompt([(2, 2)], seed=3))
COUNT = 2
SAMPLING = SamplingParams(1.0, 1.0, 0, 60, -1, ())
Outcome = list[tuple[int, list[int], list[float], int]]


def policy_of(directory: Path, runtime: Runtime, parallel: ParallelConfig) -> PolicyModel:
    return PolicyModel(ModelConfig(path=str(directory), precision=Precision.fp32), parallel, runtime)


def outcome(rollouts: list[Rollout]) -> Outcome:
    return [(one.prompt_index, one.tokens.tolist(), one.log_probs.tolist(), one.weights_version) for one in rollouts]


def generate(engine: Any, first: int, last: int) -> Outcome:
    seeds = range(first * COUNT, last * COUNT)
    return outcome(engine.generate(PROMPTS[first:last], SAMPLING, num_rollouts_per_prompt=COUNT, seeds=seeds))


def kill_while_it_works(engine: RemoteEngine) -> threading.Thread:
    """The only server of the main rank."""
    assert engine._fleet is not None
    (member,) = engine._fleet._members.values()
    receiver = member.receiver
    assert receiver is not None

    def harm() -> None:
        while receiver.address.get("/v1/health", timeout_seconds=60).json()["busy"] == 0:
            time.sleep(0.005)
        os.kill(member._process.process.pid, signal.SIGKILL)  # type: ignore[attr-defined]

    thread = threading.Thread(target=harm)
    thread.start()
    return thread


def on_two_ranks(directory: Path, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    rank = int(os.environ["RANK"])
    config = RolloutConfig(placement=RolloutPlacement.separate, servers=RolloutServersConfig(weight_bucket_mb=1))
    runtime_config = RuntimeConfig(device=Device.cpu)
    with session(ParallelConfig(tensor_model_parallel_size=2), runtime_config) as runtime:
        policy = policy_of(directory, runtime, ParallelConfig(tensor_model_parallel_size=2))
        engine = build_engine(config, policy, DataConfig(), folder / "tp")
        engine.update_weights(policy.hf_tensors(), 1)
        found["tp"] = generate(engine, 0, 3)
        engine.close()

        limited = replace(SAMPLING, max_new_tokens=5000, time_limit_seconds=0.2)
        colocated = build_engine(RolloutConfig(), policy, DataConfig())
        found["limited"] = outcome(colocated.generate(PROMPTS, limited, num_rollouts_per_prompt=COUNT, seeds=range(6)))

        nowhere = RolloutConfig(
            placement=RolloutPlacement.separate,
            servers=RolloutServersConfig(urls=["http://127.0.0.1:9"], startup_timeout_seconds=1.0),
        )
        engine = build_engine(nowhere, policy, DataConfig(), folder / "nowhere")
        try:
            engine.update_weights(policy.hf_tensors(), 1)
        except PrismError as error:
            found["nowhere"] = str(error)
        engine.close()
        dist.barrier()
        runtime = initialize(ParallelConfig(), runtime_config)
        policy = policy_of(directory, runtime, ParallelConfig())
        engine = build_engine(config, policy, DataConfig(), folder / "dp")
        engine.update_weights(policy.hf_tensors(), 2)
        mine = (0, 2) if rank == 0 else (2, 3)
        found["dp"] = generate(engine, *mine)
        assert isinstance(engine, RemoteEngine)
        dist.barrier()
        thread = kill_while_it_works(engine) if rank == 0 else None
        found["killed"] = generate(engine, *mine)
        if thread is not None:
            thread.join()
        found["counts"] = engine.metrics()
        engine.close()
    return found


def test_two_ranks_get_what_one_rank_gets(tmp_path: Path) -> None:
    from helpers.rollout_servers import in_process
    from helpers.rows import one_rank

    directory = tiny_model().directory
    ranks = run_ranks(on_two_ranks, 2, directory, tmp_path)
    policy = policy_of(directory, one_rank(), ParallelConfig())

    def expected(version: int) -> Outcome:
        return outcome(in_process(policy, PROMPTS, SAMPLING, COUNT, version=version))

    assert ranks[0]["tp"] == ranks[1]["tp"] == expected(1)  # to the last bit: the servers are not cut
    assert ranks[0]["limited"] == ranks[1]["limited"]  # both stopped at one token
    assert 1 <= len(ranks[0]["limited"][0][1]) < 5000
    for name in ("dp", "killed"):
        of_second = [(index + 2, *rest) for index, *rest in ranks[1][name]]
        assert ranks[0][name] + of_second == expected(2)
    assert all("http://127.0.0.1:9: ConnectionRefusedError" in found["nowhere"] for found in ranks)
    restarts = [found["counts"]["restarts"] for found in ranks]
    assert (sum(total for total, _ in restarts), sum(count for _, count in restarts)) == (1.0, 1.0)
