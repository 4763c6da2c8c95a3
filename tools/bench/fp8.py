"""Loss curves and step times of bf16 against FP8, on a Qwen3-VL of the 2B's shape with random weights. Prints JSON.

    python tools/bench/fp8.py [--recipes delayed tensorwise blockwise mxfp8] [--steps 200] [--tokens 8192] [--rows 4] [--tiny]

Every way starts from the same weights and sees the same rows: text of which four tokens in five follow from the one before, so
that there is something to learn. `local` is Megatron's own layers in bf16, `bf16` Transformer Engine's, the others add a recipe.
A way that this machine cannot run is reported with the reason. Times are of whole steps (gradients and optimizer), the median
after the first ten; `loss_gap` is the mean of (loss - bf16's loss) over the last quarter. `--tiny` is a model of a few layers,
which runs on a CPU too (there: `local` alone).
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from prism_nemo.config.enums import DecayStyle, Fp8Recipe, TransformerImpl
from prism_nemo.config.schema import ModelConfig, OptimizerConfig, ParallelConfig, RuntimeConfig
from prism_nemo.convert.random_init import write_random_weights
from prism_nemo.engine.runtime import Runtime, session
from prism_nemo.errors import ConfigError
from prism_nemo.models.base import TrainingBatch
from prism_nemo.models.policy import PolicyModel
from prism_nemo.packing.groups import Group, Segment, text_prompt
from prism_nemo.packing.rows import PackedRow, make_row
from prism_nemo.stages.sft import cross_entropy

WARM_UP = 10  # steps that are not timed: kernels are chosen and compiled
WORDS = 4096  # tokens that the text is made of
_TOKENS = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653}


def write_model(directory: Path, *, tiny: bool) -> None:
    """A configuration and random weights."""
    layers, hidden, inner, heads, vision_hidden = (4, 256, 768, 2, 64) if tiny else (28, 2048, 6144, 16, 1024)
    config = {
        "model_type": "qwen3_vl",
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "qwen3_vl_text",
            "vocab_size": 8192 if tiny else 151936,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "head_dim": 128,
            "rms_norm_eps": 1e-6,
            "rope_theta": 5e6,
            "rope_scaling": {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True},
            "initializer_range": 0.02,
        },
        "vision_config": {
            "depth": 2 if tiny else 24,
            "hidden_size": vision_hidden,
            "intermediate_size": 4 * vision_hidden,
            "num_heads": 4 if tiny else 16,
            "in_channels": 3,
            "patch_size": 16,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "out_hidden_size": hidden,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [0, 1] if tiny else [5, 11, 17],
            "initializer_range": 0.02,
        },
        **_TOKENS,
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    write_random_weights(directory, seed=0, dtype=torch.bfloat16)


def text_rows(step: int, rows: int, tokens: int, runtime: Runtime, patch_width: int) -> list[PackedRow]:
    """A step's rows; every rank has its own."""
    generator = torch.Generator().manual_seed(0)
    follower = torch.randperm(WORDS, generator=generator)
    generator.manual_seed(1 + step * runtime.data_parallel_size + runtime.data_parallel_rank)
    text = torch.randint(0, WORDS, (rows, tokens), generator=generator)
    follows = torch.rand(rows, tokens, generator=generator) < 0.8
    for index in range(1, tokens):
        text[:, index] = torch.where(follows[:, index], follower[text[:, index - 1]], text[:, index])
    groups = (Group(text_prompt(row[:1], patch_width), (Segment(row[1:], sample=0),)) for row in text)
    return [make_row([group], pad_multiple=runtime.row_multiple) for group in groups]


def run(way: ModelConfig, args: argparse.Namespace, runtime: Runtime) -> dict[str, Any]:
    """Losses, step times and peak memory of one way; or why it does not run here."""
    cuda = runtime.device.type == "cuda"
    try:
        model = PolicyModel(way, ParallelConfig(), runtime)
    except ConfigError as error:
        return {"skipped": error.what}
    model.with_entropy = False
    model.build_optimizer(OptimizerConfig(lr=args.lr, lr_decay_style=DecayStyle.constant, lr_warmup_iters=10), args.steps)
    model.prepare_for_training()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    losses, norms, seconds = [], [], []
    width = model.module.shape.vision.patch_width
    for step in range(args.steps):
        rows = text_rows(step, args.rows, args.tokens, runtime, width)
        tokens = float(sum(row.num_labels for row in rows) * runtime.data_parallel_size)
        _wait(cuda)
        start = time.perf_counter()
        model.prepare_for_training_step()
        loss, _ = model.get_loss_and_metrics(TrainingBatch(rows, partial(cross_entropy, global_tokens=tokens)), False)
        model.finish_training_step()
        result = model.optimizer_step(step)
        _wait(cuda)
        seconds.append(time.perf_counter() - start)
        losses.append(loss)
        norms.append(result.grad_norm)
    timed = seconds[WARM_UP:] or seconds
    median = statistics.median(timed)
    return {
        "losses": [round(loss, 5) for loss in losses],
        "gradient_norms": [round(norm, 5) for norm in norms],
        "step_seconds": round(median, 5),
        "step_seconds_range": [round(min(timed), 5), round(max(timed), 5)],
        "tokens_per_second_per_rank": round(args.rows * args.tokens / median),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if cuda else None,
    }


def _wait(cuda: bool) -> None:
    if cuda:
        torch.cuda.synchronize()


def compare(results: dict[str, Any]) -> dict[str, Any]:
    """Each way against Transformer Engine's bf16, where that ran."""
    base = results.get("bf16", {})
    found = {}
    for name, result in results.items():
        if "losses" in base and "losses" in result and name != "bf16":
            quarter = -max(1, len(base["losses"]) // 4)
            gaps = [loss - other for loss, other in zip(result["losses"][quarter:], base["losses"][quarter:], strict=True)]
            found[name] = {
                "loss_gap": round(statistics.mean(gaps), 5),
                "speedup": round(base["step_seconds"] / result["step_seconds"], 3),
            }
    return found


def machine(runtime: Runtime) -> dict[str, Any]:
    cuda = runtime.device.type == "cuda"
    try:
        from transformer_engine import __version__ as te_version
    except ImportError:
        te_version = None
    return {
        "device": torch.cuda.get_device_name(runtime.device) if cuda else "cpu",
        "ranks": runtime.world_size,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformer_engine": te_version,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", choices=[recipe.value for recipe in Fp8Recipe], default=list(Fp8Recipe))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=8192, help="of a row")
    parser.add_argument("--rows", type=int, default=4, help="of a step, on each rank")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--tiny", action="store_true", help="a model of 4 layers, hidden 256")
    args = parser.parse_args()
    te = TransformerImpl.transformer_engine
    with tempfile.TemporaryDirectory() as temporary, session(ParallelConfig(), RuntimeConfig()) as runtime:
        directory = Path(temporary) / "model"
        write_model(directory, tiny=args.tiny)
        path = str(directory)
        ways = {
            "local": ModelConfig(path=path, transformer_impl=TransformerImpl.local),
            "bf16": ModelConfig(path=path, transformer_impl=te),
            **{str(name): ModelConfig(path=path, fp8_recipe=Fp8Recipe(name)) for name in args.recipes},
        }
        results = {}
        for name, way in ways.items():
            results[name] = run(way, args, runtime)
            gc.collect()
            torch.cuda.empty_cache()
        if runtime.is_main:
            settings = {key: value for key, value in vars(args).items() if key != "recipes"}
            print(json.dumps({**machine(runtime), **settings, "results": results, "against_bf16": compare(results)}, indent=1))


if __name__ == "__main__":
    main()
