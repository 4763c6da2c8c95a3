"""How long a colocated vLLM takes to get new weights, beside a copy of the same bytes.

    OMP_NUM_THREADS=1 .venv/vllm/bin/python tools/bench/weight_update.py [--hidden 1024 --layers 12 --experts 8]

One process: a random policy of that shape in Megatron, and a vLLM engine that is given its weights again and again, as every step
of RLVR does. Prints one JSON object; seconds are medians. `copy` is `Tensor.copy_` of every tensor into one that exists already;
`hub_layout` is an update by tensors in the Hub's layout, as a server gets them. Then 16 prompts of 100 tokens get 4 rollouts of
at most 48 tokens each. With `--packed-experts` vLLM computes experts with its own kernel, which packs them: then only that is
measured, for what it packed as it started does not follow an update.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prism_nemo.config.enums import Device, Precision, RolloutEngineKind
from prism_nemo.config.rollout import RolloutConfig, VLLMConfig
from prism_nemo.config.schema import ModelConfig, ParallelConfig, RuntimeConfig
from prism_nemo.convert.random_init import write_random_weights
from prism_nemo.data.digits_model import write_model_files
from prism_nemo.engine.runtime import session
from prism_nemo.models.policy import PolicyModel
from prism_nemo.packing.groups import text_prompt
from prism_nemo.rollout.base import SamplingParams

MAX_LENGTH = 256


def write_model(directory: Path, *, hidden: int, layers: int, vocabulary: int, experts: int) -> None:
    directory.mkdir()
    write_model_files(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    text = config["text_config"]
    text |= {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers, "vocab_size": vocabulary}
    text |= {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 128, "head_dim": 64}
    text["rope_scaling"]["mrope_section"] = [12, 10, 10]
    config["vision_config"]["out_hidden_size"] = hidden
    if experts:
        text |= {"model_type": "qwen3_vl_moe_text", "num_experts": experts, "num_experts_per_tok": 2}
        text |= {
            "moe_intermediate_size": hidden * 3 // 4,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        }
        config |= {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe"}
        config["vision_config"]["model_type"] = "qwen3_vl_moe"
    path.write_text(json.dumps(config))
    write_random_weights(directory, seed=0)


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    run()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def updates(engine: Any, policy: PolicyModel, tensors: dict[str, Tensor], repeats: int) -> dict[str, float]:
    target = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    copy = median_seconds(lambda: [target[name].copy_(tensor) for name, tensor in tensors.items()], repeats)
    update = median_seconds(lambda: engine.update_weights(policy.hf_tensors(), 0), repeats)
    return {
        "copy_seconds": round(copy, 4),
        "update_seconds": round(update, 4),
        "hub_layout_seconds": round(median_seconds(lambda: engine.update_weights(tensors.items(), 0), repeats), 4),
        "update_over_copy": round(update / copy, 2),
    }


def tokens_per_second(engine: Any, shape: Any, repeats: int) -> int:
    """Of generation, prefill included; the best of the repeats."""
    prompts = [text_prompt(torch.randint(10, 50, (100,)), shape.vision.patch_width) for _ in range(16)]
    sampling = SamplingParams(1.0, 1.0, 0, 48, end_token_id=shape.vocab_size - 1, banned_token_ids=())
    best = 0.0
    for _ in range(repeats):
        began = time.perf_counter()
        rollouts = engine.generate(prompts, sampling, num_rollouts_per_prompt=4, seeds=range(64))
        best = max(best, sum(len(rollout.tokens) for rollout in rollouts) / (time.perf_counter() - began))
    return round(best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--experts", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--packed-experts", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, session(ParallelConfig(), RuntimeConfig(device=Device.cpu)) as runtime:
        from prism_nemo.rollout.vllm import ServedModel, VLLMEngine, start

        if arguments.packed_experts:
            start.keep_experts_unpacked = lambda: None
        directory = Path(folder) / "model"
        shape = {name: getattr(arguments, name) for name in ("hidden", "layers", "vocabulary", "experts")}
        write_model(directory, **shape)
        policy = PolicyModel(ModelConfig(path=str(directory), precision=Precision.fp32), ParallelConfig(), runtime)
        config = RolloutConfig(engine=RolloutEngineKind.vllm, vllm=VLLMConfig(kv_cache_gb=0.2))
        engine = VLLMEngine(config, ServedModel.of(policy, MAX_LENGTH))
        tensors = {name: tensor.clone() for name, tensor in policy.hf_tensors()}
        result = {"megabytes": round(sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / 2**20)}
        if arguments.packed_experts:
            engine.update_weights(policy.hf_tensors(), 0)
        else:
            result |= updates(engine, policy, tensors, arguments.repeats)
        result["tokens_per_second"] = tokens_per_second(engine, policy.chunks[0].shape, min(arguments.repeats, 3))
    machine = f"{platform.machine()}, {torch.get_num_threads()} thread"
    print(json.dumps({"date": time.strftime("%Y-%m-%d"), "machine": machine, **shape, **result}, indent=1))


if __name__ == "__main__":
    main()
