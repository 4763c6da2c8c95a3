"""How long it takes to give rollout servers new weights, beside copying the same bytes. Prints JSON.

    OMP_NUM_THREADS=1 python tools/bench/weight_sync.py [--megabytes 400] [--replicas 1] [--precision bf16] [--bucket-mb 256]
                                                        [--moe] [--transport shared|body] [--repeats 5]

A policy with random weights, about as large as asked for, in this process; servers in processes of their own, on the same
machine. `copy_seconds` is a plain copy of every parameter into memory that exists already; `copy_twice` goes
through memory in between, as anything must that goes from one process to another; `through_file_seconds` writes the same
tensors to a file in memory (/dev/shm) and loads it again, as a server without weight sync would. Best and median of the repeats,
after one that nothing is measured of (memory is mapped there). `processor_seconds` of an update, which other work on the machine
does not stretch: run and servers work at the same time, so that with a free core for each the larger is what it takes.
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
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import prism_nemo.engine  # noqa: F401  before megatron
from prism_nemo.config.enums import Precision, RolloutPlacement
from prism_nemo.config.rollout import RolloutConfig, RolloutServersConfig
from prism_nemo.config.schema import DataConfig, ModelConfig, ParallelConfig, RuntimeConfig
from prism_nemo.convert.random_init import write_random_weights
from prism_nemo.data.digits_model import write_model_files
from prism_nemo.engine.runtime import session
from prism_nemo.models.policy import PolicyModel
from prism_nemo.rollout import buckets
from prism_nemo.rollout.fleet import LocalMember
from prism_nemo.rollout.remote import RemoteEngine

_EXPERTS = {"num_experts": 16, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}


def write_model(directory: Path, megabytes: int, bytes_per_parameter: int, *, moe: bool) -> None:
    """Layers of width 1024, as many as make the size; vocabulary of 32,768, not tied."""
    directory.mkdir()
    write_model_files(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    text = config["text_config"]
    text |= {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
    text |= {"head_dim": 64, "vocab_size": 32768, "tie_word_embeddings": False}
    text["rope_scaling"]["mrope_section"] = [12, 10, 10]
    if moe:
        config["model_type"], text["model_type"] = "qwen3_vl_moe", "qwen3_vl_moe_text"
        text |= _EXPERTS | {"moe_intermediate_size": 384}
    config["tie_word_embeddings"] = False
    config["vision_config"]["out_hidden_size"] = 1024
    attention = 1024 * 64 * (16 + 16 + 2 * 8)
    layer = attention + (16 * 3 * 1024 * 384 if moe else 3 * 1024 * 3072)
    left = megabytes * 2**20 // bytes_per_parameter - 2 * 32768 * 1024
    text["num_hidden_layers"] = max(4, round(left / layer))
    path.write_text(json.dumps(config))
    write_random_weights(directory, seed=0)


def processor_seconds(pid: int) -> float:
    """Of another process, so far."""
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")


def timed(work: Callable[[], Any], repeats: int) -> dict[str, float]:
    work()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return {"best": round(min(seconds), 4), "median": round(statistics.median(seconds), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--precision", choices=[one.value for one in Precision], default="bf16")
    parser.add_argument("--bucket-mb", type=int, default=256)
    parser.add_argument("--moe", action="store_true")
    parser.add_argument("--transport", choices=["shared", "body"], default="shared")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if options.transport == "body":
        buckets.SHARED_MEMORY = Path("/nowhere")
    precision = Precision(options.precision)
    with tempfile.TemporaryDirectory() as folder, session(ParallelConfig(), RuntimeConfig()) as runtime:
        directory = Path(folder) / "model"
        write_model(directory, options.megabytes, 2 if precision is Precision.bf16 else 4, moe=options.moe)
        policy = PolicyModel(ModelConfig(path=str(directory), precision=precision), ParallelConfig(), runtime)
        parameters = [parameter.detach() for chunk in policy.chunks for parameter in chunk.parameters()]
        copies = [torch.empty_like(parameter) for parameter in parameters]

        def copy() -> None:
            for target, source in zip(copies, parameters, strict=True):
                target.copy_(source)

        shared = torch.empty(max(parameter.numel() for parameter in parameters), dtype=parameters[0].dtype)

        def copy_twice() -> None:
            for target, source in zip(copies, parameters, strict=True):
                between = shared[: source.numel()].view(source.shape)
                between.copy_(source)
                target.copy_(between)

        def through_file() -> None:
            file = Path("/dev/shm") / f"bench-{runtime.rank}-{id(policy)}.safetensors"
            try:
                save_file({name: tensor.contiguous() for name, tensor in policy.hf_tensors()}, file)
                load_file(file)
            finally:
                file.unlink(missing_ok=True)

        servers = RolloutServersConfig(num_replicas=options.replicas, weight_bucket_mb=options.bucket_mb)
        engine = RemoteEngine(RolloutConfig(placement=RolloutPlacement.separate, servers=servers), policy, DataConfig())
        try:
            engine.update_weights(policy.hf_tensors(), 0)
            members = engine._fleet._members.values() if engine._fleet else ()
            servers_pids = [one._process.process.pid for one in members if isinstance(one, LocalMember)]
            before = [time.process_time(), *map(processor_seconds, servers_pids)]
            update = timed(lambda: engine.update_weights(policy.hf_tensors(), 1), options.repeats)
            after = [time.process_time(), *map(processor_seconds, servers_pids)]
            of_run, *of_servers = [
                round((end - start) / (options.repeats + 1), 4) for start, end in zip(before, after, strict=True)
            ]
        finally:
            engine.close()
        plain = timed(copy, options.repeats)
        result = {
            "megabytes": round(sum(parameter.nbytes for parameter in parameters) / 2**20),
            "tensors": len(parameters),
            "replicas": options.replicas,
            "bucket_mb": options.bucket_mb,
            "transport": options.transport,
            "update_seconds": update,
            "processor_seconds": {"run": of_run, "servers": of_servers},
            "copy_seconds": plain,
            "copy_twice_seconds": timed(copy_twice, options.repeats),
            "through_file_seconds": timed(through_file, options.repeats),
            "update_over_copy": {name: round(update[name] / plain[name], 2) for name in update},
        }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
