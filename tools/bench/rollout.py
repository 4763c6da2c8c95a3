"""How fast the Megatron rollout engine decodes, beside transformers' `generate` of the same model. Prints JSON.

    OMP_NUM_THREADS=1 python tools/bench/rollout.py [--precision bf16] [--shape demo|long] [--repeats 3] [--without-transformers]

The model is the digits task's, with random weights. `demo`: 16 prompts of 50 tokens, an image each, 8 rollouts of 24 tokens.
`long`: 16 prompts of 1000 tokens, 8 rollouts of 64. Rates are generated tokens a second, prefill included; the best of the
repeats. `ragged` lets sequences end (about one token in 64 is the end token), so the batch shrinks as it goes.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import prism_nemo.engine  # noqa: F401  before megatron
from prism_nemo.config.enums import Precision
from prism_nemo.config.schema import ParallelConfig, RuntimeConfig
from prism_nemo.convert.hf import load_model_config
from prism_nemo.data.digits_model import write_base_model
from prism_nemo.engine.runtime import Runtime, session
from prism_nemo.models.qwen3_vl.config import Qwen3VLShape
from prism_nemo.models.qwen3_vl.model import Qwen3VLModel
from prism_nemo.models.weights import load_hf_weights
from prism_nemo.packing.groups import EncodedPrompt
from prism_nemo.packing.positions import mrope_positions
from prism_nemo.rollout.base import SamplingParams, rollout_seed
from prism_nemo.rollout.megatron import MegatronEngine

NEVER = -1  # an end token that no model samples


@dataclass(frozen=True)
class Load:
    prompts: int
    rollouts: int
    prompt_tokens: int
    new_tokens: int


LOADS = {"demo": Load(16, 8, 50, 24), "long": Load(16, 8, 1000, 64)}


def make_prompt(load: Load, shape: Qwen3VLShape, generator: torch.Generator) -> EncodedPrompt:
    """Random words around one image of 4 merged tokens (a strip of 4 digits)."""
    ids = torch.randint(8, shape.vocab_size, (load.prompt_tokens,), generator=generator)
    ids[3:7] = shape.image_token_id
    mask = ids == shape.image_token_id
    grid = torch.tensor([[1, 2, 8]])
    positions = mrope_positions(ids, mask, grid, spatial_merge_size=shape.vision.spatial_merge_size)
    return EncodedPrompt(ids, positions, mask, torch.randn(16, shape.vision.patch_width, generator=generator), grid)


def best_seconds(function: Callable[[], int], repeats: int) -> tuple[float, int]:
    """The fastest of the runs, after one that does not count, and what it returned."""
    function()
    timed = []
    for _ in range(repeats):
        start = time.perf_counter()
        tokens = function()
        timed.append((time.perf_counter() - start, tokens))
    return min(timed)


def bench_engine(
    engine: MegatronEngine, prompts: list[EncodedPrompt], load: Load, end_token: int, repeats: int
) -> dict[str, Any]:
    sampling = SamplingParams(1.0, 1.0, 0, load.new_tokens, end_token, ())
    seeds = [rollout_seed(0, 0, str(prompt), index) for prompt in range(load.prompts) for index in range(load.rollouts)]

    def run() -> int:
        rollouts = engine.generate(prompts, sampling, num_rollouts_per_prompt=load.rollouts, seeds=seeds)
        return sum(rollout.tokens.numel() for rollout in rollouts)

    seconds, tokens = best_seconds(run, repeats)
    return {"seconds": round(seconds, 3), "tokens": tokens, "tokens_per_second": round(tokens / seconds)}


def bench_transformers(
    directory: Path, precision: Precision, prompts: list[EncodedPrompt], load: Load, repeats: int
) -> dict[str, Any]:
    from transformers import Qwen3VLForConditionalGeneration

    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    model = Qwen3VLForConditionalGeneration.from_pretrained(directory, dtype=dtype).eval()
    ids = torch.stack([prompt.input_ids for prompt in prompts]).repeat_interleave(load.rollouts, 0)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == model.config.image_token_id).int(),
        "pixel_values": torch.cat([prompt.pixel_values for prompt in prompts for _ in range(load.rollouts)]).to(dtype),
        "image_grid_thw": torch.cat([prompt.image_grid_thw for prompt in prompts for _ in range(load.rollouts)]),
    }
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": None, "pad_token_id": 0}

    def run() -> int:
        return model.generate(**inputs, **options, max_new_tokens=load.new_tokens)[:, ids.shape[1] :].numel()

    seconds, tokens = best_seconds(run, repeats)
    return {"seconds": round(seconds, 3), "tokens": tokens, "tokens_per_second": round(tokens / seconds)}


def bench(args: argparse.Namespace, directory: Path, runtime: Runtime) -> dict[str, Any]:
    precision, load = Precision(args.precision), LOADS[args.shape]
    config = load_model_config(directory)
    shape = Qwen3VLShape.from_hf(config)
    model = Qwen3VLModel(shape, ParallelConfig(), precision).to(runtime.device)
    load_hf_weights(model, directory, config)
    generator = torch.Generator().manual_seed(0)
    prompts = [make_prompt(load, shape, generator) for _ in range(load.prompts)]
    engine = MegatronEngine(model, device=runtime.device, max_batch_size=load.prompts * load.rollouts)
    result: dict[str, Any] = {
        "shape": args.shape,
        "precision": args.precision,
        "threads": torch.get_num_threads(),
        "engine": bench_engine(engine, prompts, load, NEVER, args.repeats),
        "engine_ragged": bench_engine(engine, prompts, load, shape.vocab_size - 1, args.repeats),
    }
    if not args.without_transformers:
        result["transformers"] = bench_transformers(directory, precision, prompts, load, args.repeats)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=[precision.value for precision in Precision], default="fp32")
    parser.add_argument("--shape", choices=sorted(LOADS), default="demo")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without-transformers", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, session(ParallelConfig(), RuntimeConfig()) as runtime:
        directory = Path(temporary) / "model"
        write_base_model(directory, seed=0)
        print(json.dumps(bench(args, directory, runtime), indent=2))


if __name__ == "__main__":
    main()
