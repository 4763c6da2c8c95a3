"""A model with its layout: what memory and time are planned of."""

from __future__ import annotations

from dataclasses import dataclass, field

from prism_nemo.config.layout import data_parallel_size
from prism_nemo.config.schema import ParallelConfig
from prism_nemo.plan.activations import Cost
from prism_nemo.plan.shapes import Shape
from prism_nemo.plan.workload import Passes, Workload, discriminator_passes, policy_passes


@dataclass(frozen=True)
class Settings:
    """What changes memory beside shape and layout."""

    cost: Cost = field(default_factory=Cost)
    cpu_offload: bool = False  # optimizer.cpu_offload: its state is on the GPU only while it steps
    fused_adam: bool = False  # from Transformer Engine or apex; torch's keeps one more copy of the second moment for a moment


@dataclass(frozen=True, eq=False)
class Placed:
    """One model, cut over the ranks as `parallel` says. Equal only to itself, so that results about it can be kept."""

    shape: Shape
    parallel: ParallelConfig
    settings: Settings = Settings()

    def data_parallel_size(self, world_size: int) -> int:
        return data_parallel_size(self.parallel, world_size)

    def passes(self, workload: Workload, world_size: int) -> Passes:
        """What the busiest data-parallel rank runs through it in a step.

        A policy's batch divides over its ranks; a discriminator with a layout of its own gets comparisons dealt out in turn.
        """
        prompts = -(-workload.global_batch // self.data_parallel_size(world_size))
        return discriminator_passes(workload, prompts) if self.shape.is_discriminator else policy_passes(workload, prompts)
