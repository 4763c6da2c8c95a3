"""One training step of small models at any layout of up to four ranks: models, rows, loss, and the layouts there are."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from helpers.tiny import make_group, tiny_model
from torch import Tensor

from prism_nemo.algorithms.metrics import MetricSums
from prism_nemo.config.enums import Precision, RecomputeGranularity, RecomputeModule
from prism_nemo.config.schema import DiscriminatorConfig, ModelConfig, OptimizerConfig, ParallelConfig
from prism_nemo.engine.runtime import Runtime
from prism_nemo.models.base import TrainableModel
from prism_nemo.models.discriminator import DiscriminatorModel
from prism_nemo.models.policy import PolicyModel
from prism_nemo.packing.groups import Group, SegmentKind
from prism_nemo.packing.rows import PackedRow, make_row

KINDS = (SegmentKind.PERCEPTION, SegmentKind.REASONING)
Share = Literal["some_have_images", "all_have_images", "none_has_images", "one_has_nothing"]
MODELS = ("dense", "moe", "discriminator")
DEEPSTACK = (0, 1, 3)  # three features over four language layers: with interleaved chunks of one layer they travel two stages
# Adam divides by the root of the second moment: where a gradient is rounding noise, a small epsilon turns the noise into a
# whole step of either sign. This one keeps the update proportional there.
RECOMPUTE: dict[str, dict[str, Any]] = {
    "recompute-full": {"recompute_granularity": RecomputeGranularity.full},
    "recompute-modules": {
        "recompute_granularity": RecomputeGranularity.selective,
        "recompute_modules": [RecomputeModule.core_attn, RecomputeModule.mlp],
    },
}
OPTIMIZER = OptimizerConfig(lr=1e-2, adam_eps=1e-3, clip_grad=1.0)


def batch() -> list[list[Group]]:
    """Rows of groups: two images and text, text alone, one image late in the row, images of several sizes."""
    return [
        [make_group([(4, 6), (8, 4)], (5, 9, 3, 7), seed=60, kinds=KINDS), make_group((), (6, 2), seed=61, kinds=KINDS)],
        [make_group((), (5, 7, 2), seed=63, kinds=KINDS, text_length=9)],
        [make_group((), (20, 21), seed=65, kinds=KINDS, text_length=10), make_group([(4, 6)], (3, 4), seed=64, kinds=KINDS)],
        [make_group([(2, 12)], (4, 4), seed=62, kinds=KINDS)],
    ]


def rows_of(runtime: Runtime, share: Share = "some_have_images") -> list[PackedRow]:
    """This data-parallel rank's part of the batch: the second rank has no images, the ranks have different numbers of rows."""
    rows = [make_row(groups, pad_multiple=runtime.row_multiple) for groups in batch()]
    shares = {
        "some_have_images": ([rows[0], rows[2], rows[3]], [rows[1]]),
        "all_have_images": ([rows[0]], [rows[2], rows[3]]),
        "none_has_images": ([rows[1], rows[1]], [rows[1]]),
        "one_has_nothing": ([rows[0], rows[1]], []),
    }[share]
    return shares[runtime.data_parallel_rank] if runtime.data_parallel_size > 1 else [*shares[0], *shares[1]]


def layouts(world_size: int, *, experts: bool) -> dict[str, ParallelConfig]:
    """Every cut of the model over `world_size` ranks by sizes of 1 and 2; what is left is data-parallel."""
    found = {}
    for tp, pp, cp, ep in itertools.product((1, 2), (1, 2), (1, 2), (1, 2) if experts else (1,)):
        dp, rest = divmod(world_size, tp * pp * cp)
        if rest or dp not in (1, 2) or (world_size // pp) % ep:
            continue
        vpps: tuple[int | None, ...] = (None, 2) if pp == 2 else (None,)
        etps: tuple[int | None, ...] = (1, 2) if ep == 2 and tp == 2 and world_size // pp % 4 == 0 else (None,)
        sps = (False, True) if tp == 2 and not experts else (tp == 2,)  # with experts it is always on
        shards = (False, True) if dp * cp > 1 else (False,)
        for vpp, etp, sp, sharded in itertools.product(vpps, etps, sps, shards):
            if sharded and (vpp or etp == 2 or sp != (tp == 2)):
                continue  # nothing new: the optimizer is spread over the same ranks as without these
            name = f"tp{tp} pp{pp} vpp{vpp or 1} cp{cp} dp{dp}" + (f" ep{ep}" if experts else "")
            name += (f" etp{etp}" if etp else "") + (" sp" if sp else "") + (" sharded-optimizer" if sharded else "")
            parallel = ParallelConfig(
                tensor_model_parallel_size=tp,
                pipeline_model_parallel_size=pp,
                virtual_pipeline_model_parallel_size=vpp,
                context_parallel_size=cp,
                expert_model_parallel_size=ep,
                expert_tensor_parallel_size=etp,
                sequence_parallel=sp,
                use_distributed_optimizer=sharded,
            )
            found[name] = parallel
            if (tp, pp, vpp, ep) == (2, 2, 2, 1):
                found |= {f"{name} {recompute}": replace(parallel, **keys) for recompute, keys in RECOMPUTE.items()}
    return found


def build(kind: str, directory: Path, parallel: ParallelConfig, runtime: Runtime) -> TrainableModel:
    if kind == "discriminator":
        config = DiscriminatorConfig(path=str(directory), precision=Precision.fp32, moe_aux_loss_coeff=0.1)
        return DiscriminatorModel(config, parallel, runtime, seed=3)
    return PolicyModel(ModelConfig(path=str(directory), precision=Precision.fp32), parallel, runtime)


def loss_of(row: PackedRow, output: Any, *, divisor: float) -> tuple[Tensor, MetricSums]:
    """A weighted sum that treats every label or score differently."""
    values = output if isinstance(output, Tensor) else output.log_probs
    tokens = row.label_ids if values.numel() == row.num_labels else row.input_ids[row.segment_end]
    weights = torch.sin(tokens.float() + torch.arange(values.numel()))
    return (values * weights).sum() / divisor, {"mean": (values.detach().sum(), torch.tensor(float(values.numel())))}


def directories() -> dict[str, Path]:
    dense = tiny_model(tied=True, deepstack=DEEPSTACK).directory
    return {"dense": dense, "discriminator": dense, "moe": tiny_model(experts=True, deepstack=DEEPSTACK).directory}
