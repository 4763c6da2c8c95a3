"""How long it takes to give rollout servers new weights, beside copying the same bytes. Prints JSON.

    OMP_NUM_THREADS=1 python tools/bench/weight_sync.py [--megabytes 90 700] [--replicas 1] [--precision bf16] [--bucket-mb 16]
                                        [--engine megatron|vllm] [--moe] [--transport auto|shared_memory|body|process_group]
                                        [--repeats 15]

For each size a policy with random weights in this process, and servers in processes of their own on the same machine. What is
compared is timed in turns, after one round that nothing is measured of (memory is mapped there):

    update_seconds        `RemoteEngine.update_weights`, from the call until every server has the weights
    copy_seconds          one plain copy of every parameter of the policy, the same bytes, into memory that exists already
    copy_twice_seconds    the same through memory in between, as anything must that goes from one process to another
    through_file_seconds  the same tensors written to a file in memory (/dev/shm) and loaded again, as without weight sync

Medians and minima of the rounds. `processor_seconds` of an update, which other work on the machine does not stretch: run and
servers work at the same time, so that with a free core for each the larger is what it takes.
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
from prism_nemo.config.enums import Precision, RolloutEngineKind, RolloutPlacement, WeightTransport
from prism_nemo.config.rollout import RolloutConfig, RolloutServersConfig, VLLMConfig
from prism_nemo.config.schema import DataConfig, ModelConfig, ParallelConfig, RuntimeConfig
from prism_nemo.convert.random_init import write_random_weights
from prism_nemo.data.digits_model import write_model_files
from prism_nemo.engine.runtime import Runtime, session
from prism_nemo.models.policy import PolicyModel
from prism_nemo.rollout.fleet import LocalMember
from prism_nemo.rollout.remote import RemoteEngine

_EXPERTS = {"num_experts": 16, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True}


def write_model(directory: Path, megabytes: int, bytes_per_parameter: int, *, moe: bool) -> None:
    """Layers of width 1024, as many as make the size (but 4 at least); a quarter of it is vocabulary, not tied."""
    directory.mkdir()
    write_model_files(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    text = config["text_config"]
    parameters = megabytes * 2**20 // bytes_per_parameter
    vocabulary = min(151_936, max(4096, parameters // 8192 // 64 * 64))
    text |= {"hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
    text |= {"head_dim": 64, "vocab_size": vocabulary, "tie_word_embeddings": False}
    text["rope_scaling"]["mrope_section"] = [12, 10, 10]
    if moe:
        config["model_type"], text["model_type"] = "qwen3_vl_moe", "qwen3_vl_moe_text"
        text |= _EXPERTS | {"moe_intermediate_size": 384}
    config["tie_word_embeddings"] = False
    config["vision_config"]["out_hidden_size"] = 1024
    attention = 1024 * 64 * (16 + 16 + 2 * 8)
    layer = attention + (16 * 3 * 1024 * 384 if moe else 3 * 1024 * 3072)
    text["num_hidden_layers"] = max(4, round((parameters - 2 * vocabulary * 1024) / layer))
    path.write_text(json.dumps(config))
    write_random_weights(directory, seed=0)


def processor_seconds(pid: int) -> float:
    """Of another process, so far."""
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")


def in_turns(work: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each, one round after the other."""
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats + 1):
        for name, call in work.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return {name: found[1:] for name, found in seconds.items()}


def summary(seconds: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(seconds), 4), "best": round(min(seconds), 4)}


def plain_copies(parameters: list[torch.Tensor]) -> tuple[Callable[[], None], Callable[[], None]]:
    copies = [torch.zeros_like(parameter) for parameter in parameters]
    memory = torch.zeros(max(parameter.numel() for parameter in parameters), dtype=parameters[0].dtype)

    def copy() -> None:
        for target, source in zip(copies, parameters, strict=True):
            target.copy_(source)

    def copy_twice() -> None:
        for target, source in zip(copies, parameters, strict=True):
            between = memory[: source.numel()].view(source.shape)
            between.copy_(source)
            target.copy_(between)

    return copy, copy_twice


def through_file(policy: PolicyModel) -> None:
    file = Path("/dev/shm") / f"bench-{os.getpid()}.safetensors"
    try:
        save_file({name: tensor.contiguous() for name, tensor in policy.hf_tensors()}, file)
        load_file(file)
    finally:
        file.unlink(missing_ok=True)


def measure(options: argparse.Namespace, megabytes: int, runtime: Runtime, directory: Path) -> dict[str, Any]:
    precision = Precision(options.precision)
    write_model(directory, megabytes, 2 if precision is Precision.bf16 else 4, moe=options.moe)
    policy = PolicyModel(ModelConfig(path=str(directory), precision=precision), ParallelConfig(), runtime)
    parameters = [parameter.detach() for chunk in policy.chunks for parameter in chunk.parameters()]
    copy, copy_twice = plain_copies(parameters)
    servers = RolloutServersConfig(
        num_replicas=options.replicas,
        weight_bucket_mb=options.bucket_mb,
        weight_transport=WeightTransport(options.transport),
    )
    rollout = RolloutConfig(
        engine=RolloutEngineKind(options.engine),
        placement=RolloutPlacement.separate,
        servers=servers,
        vllm=VLLMConfig(kv_cache_gb=0.2),
    )
    data = DataConfig(max_prompt_length=128, max_response_length=128)
    engine = RemoteEngine(rollout, policy, data)
    processor: list[list[float]] = []

    def update() -> None:
        before = [time.process_time(), *map(processor_seconds, pids)]
        engine.update_weights(policy.hf_tensors(), 1)
        after = [time.process_time(), *map(processor_seconds, pids)]
        processor.append([end - start for start, end in zip(before, after, strict=True)])

    try:
        engine.update_weights(policy.hf_tensors(), 0)
        members = engine._fleet._members.values() if engine._fleet else ()
        pids = [one._process.process.pid for one in members if isinstance(one, LocalMember)]
        work = {"update": update, "copy": copy, "copy_twice": copy_twice, "through_file": lambda: through_file(policy)}
        seconds = in_turns(work, options.repeats)
    finally:
        engine.close()
    of_run, *of_servers = [round(statistics.mean(column), 4) for column in zip(*processor[1:], strict=True)]
    ratios = [one / other for one, other in zip(seconds["update"], seconds["copy"], strict=True)]
    return {
        "megabytes": round(sum(parameter.nbytes for parameter in parameters) / 2**20),
        "tensors": len(parameters),
        **{f"{name}_seconds": summary(found) for name, found in seconds.items()},
        "processor_seconds": {"run": of_run, "servers": of_servers},
        "update_over_copy": {
            "of_medians": round(statistics.median(seconds["update"]) / statistics.median(seconds["copy"]), 2),
            "median_of_rounds": round(statistics.median(ratios), 2),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[90, 700])
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--precision", choices=[one.value for one in Precision], default="bf16")
    parser.add_argument("--bucket-mb", type=int, default=RolloutServersConfig().weight_bucket_mb)
    parser.add_argument("--engine", choices=[one.value for one in RolloutEngineKind], default="megatron")
    parser.add_argument("--moe", action="store_true")
    parser.add_argument("--transport", choices=[one.value for one in WeightTransport], default="auto")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    shown = ("engine", "moe", "replicas", "precision", "bucket_mb", "transport", "repeats")
    result: dict[str, Any] = {name: getattr(options, name) for name in shown} | {"cores": len(os.sched_getaffinity(0))}
    with tempfile.TemporaryDirectory() as folder, session(ParallelConfig(), RuntimeConfig()) as runtime:
        result["models"] = [
            measure(options, megabytes, runtime, Path(folder) / f"model-{megabytes}") for megabytes in options.megabytes
        ]
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
