"""What one step of a stage runs: how many tokens, in which rows, on each data-parallel rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

from prism_nemo.config.layout import data_parallel_size
from prism_nemo.config.schema import ParallelConfig
from prism_nemo.errors import LayoutError
from prism_nemo.plan.activations import Row

STAGES = ("sft", "warmup", "align", "rlvr")


@dataclass(frozen=True)
class Workload:
    """One step; lengths are those of a typical sample, in tokens."""

    stage: str
    prompt_tokens: int  # visual tokens included
    response_tokens: int
    image_tokens: int  # visual tokens of a prompt
    rollouts: int  # responses a prompt
    global_batch: int  # prompts, pairs or demonstrations
    row_tokens: int  # trainer.max_tokens_per_row
    max_batch_size: int  # rollout.max_batch_size: sequences decoded together, at most

    @property
    def samples(self) -> bool:
        return self.stage in ("align", "rlvr")


@dataclass(frozen=True)
class Passes:
    """What one data-parallel rank runs through one model in a step."""

    row: Row  # the largest row
    num_rows: int
    num_groups: int  # prompts with their responses, cut where a row cannot hold them
    prefix: int  # tokens of a group's prompt
    segment: int  # tokens of one of its responses
    segments: int  # responses of a group, teachers included
    visual_tokens: int  # of a group

    @property
    def tokens(self) -> int:
        return self.num_groups * (self.prefix + self.segments * self.segment)

    @property
    def labels(self) -> int:
        return self.num_groups * self.segments * self.segment


def prompts_per_rank(workload: Workload, parallel: ParallelConfig, world_size: int) -> int:
    """Raises LayoutError when the global batch does not divide over the data-parallel ranks, as a stage would."""
    copies = data_parallel_size(parallel, world_size)
    if workload.global_batch % copies:
        raise LayoutError(
            f"a global batch of {workload.global_batch} does not divide over {copies} data-parallel ranks",
            where="--global-batch",
            remedy=f"use a multiple of {copies}, or give more ranks to one model",
        )
    return workload.global_batch // copies


def policy_passes(workload: Workload, prompts: int) -> Passes:
    """The policy's rows for so many prompts."""
    return _pack(workload, prompts, always=0)


def discriminator_passes(workload: Workload, prompts: int) -> Passes:
    """The discriminator's: the teacher's response stands in every piece of a group that is cut."""
    return _pack(workload, prompts, always=1)


def _pack(workload: Workload, prompts: int, *, always: int) -> Passes:
    prefix, length = workload.prompt_tokens, workload.response_tokens
    per_piece = min(workload.rollouts, max(1, (workload.row_tokens - prefix - always * length) // length))
    pieces = prompts * math.ceil(workload.rollouts / per_piece)
    segments = per_piece + always
    size = prefix + segments * length
    rows = math.ceil(pieces / max(1, workload.row_tokens // size))
    tokens = min(max(workload.row_tokens, size), pieces * size)  # samples differ in length: some row is full
    groups = tokens / size
    keys = tokens if segments == 1 else round(groups * (prefix + segments * (prefix + length)))
    labels = 0 if always else round(groups * segments * length)
    row = Row(tokens, min(tokens, math.ceil(groups * workload.image_tokens)), labels, math.ceil(groups), keys)
    return Passes(row, rows, pieces, prefix, length, segments, workload.image_tokens)
