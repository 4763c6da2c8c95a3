"""Tokens a second of a vLLM rollout server, by how many requests a run has under way to it. Prints one JSON object.

    OMP_NUM_THREADS=1 .venv/vllm/bin/python tools/bench/server_requests.py [--prompts 32 --rollouts 1 --tokens 128]

A server process with the digits model and random weights, and one run after the other that sends it the same requests, of one
prompt each, so many at a time. Every repeat does them all, side by side; rates are medians over the repeats, of generated tokens
from the first request to the last answer.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import prism_nemo.engine  # noqa: F401  before megatron
from prism_nemo.config.enums import Device, Precision, RolloutEngineKind, RolloutPlacement
from prism_nemo.config.rollout import RolloutConfig, RolloutServersConfig, VLLMConfig
from prism_nemo.config.schema import DataConfig, ModelConfig, ParallelConfig, RuntimeConfig
from prism_nemo.data.digits_model import write_base_model
from prism_nemo.engine.runtime import Runtime, session
from prism_nemo.models.policy import PolicyModel
from prism_nemo.packing.groups import EncodedPrompt, text_prompt
from prism_nemo.rollout.base import SamplingParams
from prism_nemo.rollout.remote import RemoteEngine
from prism_nemo.rollout.server import TOKEN_VARIABLE

PROMPT_TOKENS = 50
PATCH_WIDTH = 3 * 2 * 16**2


@contextmanager
def server(policy: PolicyModel, config: RolloutConfig, data: DataConfig, directory: Path) -> Iterator[str]:
    """The address of a server that has its first weights."""
    with closing(RemoteEngine(config, policy, data, directory)) as owner:
        owner.update_weights(policy.hf_tensors(), 0)
        (receiver,) = owner._fleet.up()  # type: ignore[union-attr]
        yield receiver.address.url


def bench(args: argparse.Namespace, runtime: Runtime, directory: Path) -> dict[str, Any]:
    write_base_model(directory / "model", seed=0)
    policy = PolicyModel(ModelConfig(path=str(directory / "model"), precision=Precision.fp32), ParallelConfig(), runtime)
    special = tuple(policy.hf_config[f"{name}_token_id"] for name in ("image", "video"))
    sampling = SamplingParams(1.0, 1.0, 0, args.tokens, special[0], special)  # no response ends before
    data = DataConfig(max_prompt_length=PROMPT_TOKENS, max_response_length=args.tokens)
    generator = torch.Generator().manual_seed(0)
    prompts: list[EncodedPrompt] = [
        text_prompt(torch.randint(10, 50, (PROMPT_TOKENS,), generator=generator), PATCH_WIDTH) for _ in range(args.prompts)
    ]
    base = RolloutConfig(
        engine=RolloutEngineKind.vllm,
        placement=RolloutPlacement.separate,
        vllm=VLLMConfig(kv_cache_gb=0.5),
        servers=RolloutServersConfig(weight_bucket_mb=16),
    )
    rates: dict[int, list[float]] = {requests: [] for requests in args.requests}
    with server(policy, base, data, directory) as url:
        for repeat in range(args.repeats + 1):
            for requests in args.requests:
                servers = replace(base.servers, urls=[url], requests_per_replica=requests)
                with closing(RemoteEngine(replace(base, servers=servers), policy, data)) as run:
                    run.update_weights(policy.hf_tensors(), repeat)
                    seeds = range(args.prompts * args.rollouts)
                    start = time.perf_counter()
                    found = run.generate(prompts, sampling, num_rollouts_per_prompt=args.rollouts, seeds=seeds)
                    seconds = time.perf_counter() - start
                if repeat:  # the first does not count
                    rates[requests].append(sum(rollout.tokens.numel() for rollout in found) / seconds)
    first = statistics.median(rates[args.requests[0]])
    return {
        "prompts": args.prompts,
        "rollouts_per_prompt": args.rollouts,
        "response_tokens": args.tokens,
        "repeats": args.repeats,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_average": os.getloadavg()[0],
        "requests_at_a_time": {
            str(requests): {
                "tokens_per_second": round(statistics.median(found)),
                "each": [round(rate) for rate in found],
                "of_the_first": round(statistics.median(found) / first, 2),
            }
            for requests, found in rates.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--rollouts", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 2, 8])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    os.environ[TOKEN_VARIABLE] = "bench"  # of the server that is started, and of the runs that are named it
    runtime_config = RuntimeConfig(device=Device.cpu, num_threads=1)
    with tempfile.TemporaryDirectory() as temporary, session(ParallelConfig(), runtime_config) as runtime:
        print(json.dumps(bench(args, runtime, Path(temporary)), indent=2))


if __name__ == "__main__":
    main()
