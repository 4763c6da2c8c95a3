"""How long a colocated vLLM takes to get new weights, beside a copy of the same bytes.

    OMP_NUM_THREADS=1 .venv/vllm/bin/python tools/bench/weight_update.py [--hidden 1024 --layers 12 --experts 8]

One process: a random policy of that shape in Megatron, and a vLLM engine that is given its weights again and again, as every step
of RLVR does. Prints one JSON object; seconds are medians. `copy` is `Tensor.copy_` of every tensor into one that exists already.
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

import torch

from prism_nemo.config.enums import Device, Precision, RolloutEngineKind
from prism_nemo.config.rollout import RolloutConfig, VLLMConfig
from prism_nemo.config.schema import ModelConfig, ParallelConfig, RuntimeConfig
from prism_nemo.convert.random_init import write_random_weights
from prism_nemo.data.digits_model import write_model_files
from prism_nemo.engine.runtime import session
from prism_nemo.models.policy import PolicyModel

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
    return round(statistics.median(seconds), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--experts", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, session(ParallelConfig(), RuntimeConfig(device=Device.cpu)) as runtime:
        from prism_nemo.rollout.vllm import ServedModel, VLLMEngine

        directory = Path(folder) / "model"
        shape = {name: getattr(arguments, name) for name in ("hidden", "layers", "vocabulary", "experts")}
        write_model(directory, **shape)
        policy = PolicyModel(ModelConfig(path=str(directory), precision=Precision.fp32), ParallelConfig(), runtime)
        config = RolloutConfig(engine=RolloutEngineKind.vllm, vllm=VLLMConfig(kv_cache_gb=0.2))
        engine = VLLMEngine(config, ServedModel.of(policy, MAX_LENGTH))
        tensors = {name: tensor.clone() for name, tensor in policy.hf_tensors()}
        target = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
        copy = median_seconds(lambda: [target[name].copy_(tensor) for name, tensor in tensors.items()], arguments.repeats)
        rename = median_seconds(lambda: sum(1 for _ in policy.hf_tensors()), arguments.repeats)
        load = median_seconds(lambda: engine.update_weights(tensors.items(), 0), arguments.repeats)
        update = median_seconds(lambda: engine.update_weights(policy.hf_tensors(), 0), arguments.repeats)
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    print(
        json.dumps(
            {
                "date": time.strftime("%Y-%m-%d"),
                "machine": f"{platform.machine()}, {torch.get_num_threads()} thread",
                **shape,
                "megabytes": round(num_bytes / 2**20),
                "copy_seconds": copy,
                "megatron_to_hf_seconds": rename,
                "vllm_load_seconds": load,
                "update_seconds": update,
                "update_over_copy": round(update / copy, 2),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
