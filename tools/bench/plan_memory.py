"""How far the planner's memory model is from real runs. Prints one JSON object a case.

    OMP_NUM_THREADS=1 python tools/bench/plan_memory.py [--case dense] [--list]

Each case is a process of its own, on one CPU rank: it builds a model with random weights, takes one whole training step (so that
the optimizer's state exists), and then measures a second one: what is resident between steps, the peak of the forward and
backward passes, "Measured" is resident memory (VmHWM, which the kernel can reset) less what the
process held before the model; glibc is told to give every large block back at once, so that resident is what is in use.
"Predicted" is what `prism_nemo.plan` says of the same shape and rows. Nothing in the model was fitted to these figures.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

MIB = 1 << 20
MERGE, PATCH = 2, 8
IMAGE_TOKEN, VIDEO_TOKEN = 1, 2


@dataclass(frozen=True)
class Case:
    """Shape and rows of one run."""

    layers: int = 6
    hidden: int = 512
    ffn: int = 1536
    heads: int = 8
    kv_heads: int = 4
    head_dim: int = 64
    vocab: int = 8192
    tied: bool = False
    experts: int = 0  # 0: dense
    topk: int = 2
    precision: str = "fp32"
    vision_depth: int = 2
    vision_hidden: int = 128
    vision_ffn: int = 512
    images: int = 0  # a prompt
    image_side: int = 16  # merged tokens a side
    freeze_vision: bool = False
    recompute: str = "none"
    prompt: int = 128  # tokens of text beside the images
    segments: int = 1
    segment: int = 896
    groups: int = 1  # a row
    rows: int = 1
    discriminator: bool = False
    onednn: bool = True  # off: oneDNN keeps most of a megabyte of code for every shape of a bf16 product, and experts' are many


CASES = {
    "dense": Case(rows=2),
    "dense, bf16": Case(precision="bf16", segment=1408),
    "dense, tied, wide vocabulary": Case(tied=True, vocab=65536, hidden=384, ffn=1024, heads=6, kv_heads=2, layers=3),
    "dense, shared prompt": Case(prompt=256, segments=8, segment=128),
    "experts": Case(experts=8, ffn=384, layers=5),
    "experts, bf16": Case(experts=8, ffn=384, layers=4, vocab=1024, precision="bf16", segment=640, onednn=False),
    "images": Case(images=2, image_side=20, vision_depth=6, vision_hidden=256, vision_ffn=1024, prompt=64, segment=256, layers=4),
    "images, frozen tower": Case(
        images=2, image_side=20, vision_depth=6, vision_hidden=256, vision_ffn=1024, freeze_vision=True, prompt=64, layers=4
    ),
    "dense, full recompute": Case(recompute="full", layers=12, segment=1920),
    "dense, recompute of the MLP": Case(recompute="mlp", layers=8, segment=1408),
    "experts, recompute of the MLP": Case(experts=8, ffn=384, layers=6, recompute="mlp", segment=1408),
    "dense, recompute of attention": Case(recompute="core_attn"),
    "images, full recompute": Case(
        images=2, image_side=20, vision_depth=8, vision_hidden=256, vision_ffn=1024, prompt=64, segment=256, recompute="full"
    ),
    "discriminator": Case(experts=4, layers=4, ffn=1024, discriminator=True, segments=6, segment=160),
}


def hf_config(case: Case) -> dict[str, Any]:
    """config.json of the case's model."""
    text: dict[str, Any] = {
        "vocab_size": case.vocab,
        "hidden_size": case.hidden,
        "intermediate_size": case.ffn,
        "num_hidden_layers": case.layers,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.02,
        "rope_theta": 10000.0,
        "rope_scaling": {"rope_type": "default", "mrope_section": [case.head_dim // 4, case.head_dim // 8, case.head_dim // 8]},
    }
    if case.experts:
        text |= {"num_experts": case.experts, "num_experts_per_tok": case.topk, "moe_intermediate_size": case.ffn}
    return {
        "model_type": "qwen3_vl_moe" if case.experts else "qwen3_vl",
        "tie_word_embeddings": case.tied,
        "image_token_id": IMAGE_TOKEN,
        "video_token_id": VIDEO_TOKEN,
        "text_config": text,
        "vision_config": {
            "initializer_range": 0.02,
            "depth": case.vision_depth,
            "hidden_size": case.vision_hidden,
            "intermediate_size": case.vision_ffn,
            "num_heads": 4,
            "in_channels": 3,
            "patch_size": PATCH,
            "temporal_patch_size": 2,
            "spatial_merge_size": MERGE,
            "out_hidden_size": case.hidden,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [0, 1],
        },
    }


def predict(case: Case) -> dict[str, float]:
    """Bytes: between steps, while training, while the optimizer steps."""
    from prism_nemo.config.schema import ParallelConfig
    from prism_nemo.plan.activations import Attention, Cost, Recompute, Row
    from prism_nemo.plan.memory import model_state, training_pass
    from prism_nemo.plan.placed import Settings
    from prism_nemo.plan.shapes import shape_of

    shape = replace(shape_of(hf_config(case), "measured"), is_discriminator=case.discriminator)
    visual = case.groups * case.images * case.image_side**2
    prefix = case.prompt + case.images * case.image_side**2
    tokens = case.groups * (prefix + case.segments * case.segment)
    labels = 0 if case.discriminator else case.groups * case.segments * case.segment
    keys = tokens + case.groups * (case.segments * prefix if case.segments > 1 else 0)
    settings = Settings(
        Cost(
            value_bytes=2 if case.precision == "bf16" else 4,
            attention=Attention.cpu,
            vision_is_trained=not case.freeze_vision,
            recompute=Recompute(case.recompute),
        )
    )
    state = model_state(shape, ParallelConfig(), 1, settings)
    passes = training_pass(
        shape, Row(tokens, visual, labels, max(1, case.groups * case.images), keys), case.rows, ParallelConfig(), settings
    )
    return {"state": state.total, "training": state.total + passes.total}


def measure(case: Case) -> dict[str, float]:
    """The same of a real run in this process."""
    import torch

    import prism_nemo.engine  # noqa: F401  before megatron
    from prism_nemo.config.enums import Device
    from prism_nemo.config.schema import ParallelConfig, RuntimeConfig
    from prism_nemo.engine.runtime import session

    torch.backends.mkldnn.enabled = case.onednn  # type: ignore[assignment]
    miniature = replace(case, layers=2, hidden=32, ffn=48, vocab=64, head_dim=16, vision_hidden=16, vision_ffn=16, segment=8)
    with session(ParallelConfig(), RuntimeConfig(device=Device.cpu, num_threads=1)) as runtime:
        take_steps(replace(miniature, prompt=8, image_side=2, vision_depth=2), runtime)
        return take_steps(case, runtime)


def take_steps(case: Case, runtime: Any) -> dict[str, float]:
    """Two steps; the figures of the second."""
    import torch

    from prism_nemo.algorithms.metrics import MetricSums
    from prism_nemo.config.schema import OptimizerConfig
    from prism_nemo.models.base import TrainingBatch
    from prism_nemo.packing.rows import PackedRow

    def loss(row: PackedRow, output: Any) -> tuple[torch.Tensor, MetricSums]:
        return (output if case.discriminator else output.log_probs).mean(), {}

    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        directory = write_model(case, Path(folder))
        settle()
        baseline = resident("VmRSS")
        model = build_model(case, directory, runtime)
        model.build_optimizer(OptimizerConfig(), 10)
        model.prepare_for_training()
        for step in range(2):
            rows = [make_row(case, seed) for seed in range(case.rows)]
            settle()
            found["state"] = resident("VmRSS") - baseline
            model.prepare_for_training_step()
            reset_peak()
            model.get_loss_and_metrics(TrainingBatch(rows, loss), forward_only=False)
            found["training"] = resident("VmHWM") - baseline
            model.finish_training_step()
            model.optimizer_step(step)
    return found


def write_model(case: Case, directory: Path) -> Path:
    """A HuggingFace directory with random weights; a discriminator's is the dense model that it is upcycled from."""
    from prism_nemo.convert.random_init import write_random_weights

    dense = replace(case, experts=0) if case.discriminator else case
    (directory / "config.json").write_text(json.dumps(hf_config(dense)))
    write_random_weights(directory, seed=0)
    return directory


def build_model(case: Case, directory: Path, runtime: Any) -> Any:
    from prism_nemo.config.enums import Precision
    from prism_nemo.config.schema import DiscriminatorConfig, ModelConfig, ParallelConfig
    from prism_nemo.models.discriminator import DiscriminatorModel
    from prism_nemo.models.policy import PolicyModel
    from prism_nemo.plan.activations import Recompute
    from prism_nemo.plan.layouts import with_recompute

    layout = with_recompute(ParallelConfig(), Recompute(case.recompute))
    precision = Precision[case.precision]
    if case.discriminator:
        options = DiscriminatorConfig(
            path=str(directory), precision=precision, num_experts=case.experts, freeze_vision_model=case.freeze_vision
        )
        return DiscriminatorModel(options, layout, runtime, seed=0)
    config = ModelConfig(path=str(directory), precision=precision, freeze_vision_model=case.freeze_vision)
    return PolicyModel(config, layout, runtime)


def make_row(case: Case, seed: int) -> Any:
    """A packed row of random tokens and pixels."""
    import torch

    from prism_nemo.packing.groups import EncodedPrompt, Group, Segment
    from prism_nemo.packing.positions import mrope_positions
    from prism_nemo.packing.rows import make_row as pack

    generator = torch.Generator().manual_seed(seed)

    def words(count: int) -> torch.Tensor:
        return torch.randint(8, case.vocab, (count,), generator=generator)

    visual = case.images * case.image_side**2
    grid = torch.tensor([[1, MERGE * case.image_side, MERGE * case.image_side]] * case.images).view(-1, 3)
    groups = []
    for _ in range(case.groups):
        pieces = [torch.full((case.image_side**2,), IMAGE_TOKEN), words(1)] * case.images
        ids = torch.cat([words(case.prompt - case.images), *pieces])
        mask = ids == IMAGE_TOKEN
        positions = mrope_positions(ids, mask, grid, spatial_merge_size=MERGE)
        pixels = torch.randn(visual * MERGE**2, 3 * 2 * PATCH**2, generator=generator)
        prompt = EncodedPrompt(ids, positions, mask, pixels, grid)
        groups.append(Group(prompt, tuple(Segment(words(case.segment), sample) for sample in range(case.segments))))
    return pack(groups)


def settle() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def resident(field: str) -> float:
    """Bytes of a field of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return float(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def run_case(name: str) -> dict[str, Any]:
    """Measures a case in a fresh process and puts the prediction beside it."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "PYTHONWARNINGS": "ignore",
    }
    command = [sys.executable, __file__, "--measure", name]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    measured, predicted = json.loads(output.splitlines()[-1]), predict(CASES[name])
    result: dict[str, Any] = {"case": name, **asdict(CASES[name])}
    for key, value in measured.items():
        result[f"{key}_measured_mib"] = round(value / MIB, 1)
        result[f"{key}_predicted_mib"] = round(predicted[key] / MIB, 1)
        result[f"{key}_error"] = round(predicted[key] / value - 1, 4)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="one or more; all by default")
    parser.add_argument("--list", action="store_true", help="the cases' names")
    parser.add_argument("--measure", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.list:
        print("\n".join(CASES))
    elif options.measure:
        print(json.dumps(measure(CASES[options.measure])))
    else:
        for name in options.case or CASES:
            print(json.dumps(run_case(name)), flush=True)


if __name__ == "__main__":
    main()
