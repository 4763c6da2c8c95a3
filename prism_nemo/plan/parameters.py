"""How many parameters a model has, and how many of them a rank holds under a layout. Exact."""

from __future__ import annotations

from dataclasses import dataclass

from prism_nemo.config.schema import ParallelConfig
from prism_nemo.plan.shapes import Shape, Vision


@dataclass(frozen=True)
class Cut:
    """A number of parameters, by how tensor parallelism treats them."""

    split: int = 0  # cut over the ranks
    replicated: int = 0  # whole on every rank

    def __add__(self, other: Cut) -> Cut:
        return Cut(self.split + other.split, self.replicated + other.replicated)

    def __mul__(self, times: int) -> Cut:
        return Cut(self.split * times, self.replicated * times)

    def on_rank(self, ranks: int) -> int:
        return self.split // ranks + self.replicated


@dataclass(frozen=True)
class RankParameters:
    """Parameters that one rank holds."""

    vision: int
    language: int  # all but the experts
    experts: int  # distributed over other groups of ranks than the rest

    @property
    def dense(self) -> int:
        return self.vision + self.language

    @property
    def total(self) -> int:
        return self.dense + self.experts


def expert_tensor_size(parallel: ParallelConfig) -> int:
    """Ranks that share every expert's matrices."""
    tp, ep = parallel.tensor_model_parallel_size, parallel.expert_model_parallel_size
    return parallel.expert_tensor_parallel_size or (tp if ep == 1 else 1)


def stage_layers(shape: Shape, parallel: ParallelConfig, stage: int) -> int:
    """Language layers of a pipeline stage; the first and the last may be set apart."""
    last_stage = parallel.pipeline_model_parallel_size - 1
    set_apart = {0: parallel.num_layers_in_first_pipeline_stage, last_stage: parallel.num_layers_in_last_pipeline_stage}
    given = {number: layers for number, layers in set_apart.items() if layers is not None}
    if stage in given:
        return given[stage]
    return (shape.num_layers - sum(given.values())) // (last_stage + 1 - len(given))


def rank_parameters(shape: Shape, parallel: ParallelConfig, stage: int = 0) -> RankParameters:
    """What every rank of pipeline stage `stage` holds (all of them hold equally much)."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    layers = stage_layers(shape, parallel, stage)
    language = layer_parameters(shape) * layers
    is_first, is_last = stage == 0, stage == pp - 1
    if is_first:
        language += _embedding(shape)
    if is_last:
        language += Cut(replicated=shape.hidden_size * (2 if shape.is_discriminator else 1))  # final norm; scalar head
        shared = shape.tied and is_first
        if not shape.is_discriminator and not shared:  # a tied weight has a second copy on the last of several stages
            language += _embedding(shape)
    experts = 0
    if shape.experts is not None:
        local = shape.experts.count // parallel.expert_model_parallel_size
        experts = layers * local * expert_parameters(shape) // expert_tensor_size(parallel)
    return RankParameters(
        vision=vision_parameters(shape.vision).on_rank(tp) if is_first else 0, language=language.on_rank(tp), experts=experts
    )


def model_parameters(shape: Shape) -> RankParameters:
    """The whole model's."""
    return rank_parameters(shape, ParallelConfig())


def _embedding(shape: Shape) -> Cut:
    return Cut(split=shape.vocab_size * shape.hidden_size)


def layer_parameters(shape: Shape) -> Cut:
    """One language layer without its experts."""
    hidden = shape.hidden_size
    attention = hidden * (shape.query_width + 2 * shape.key_width) + shape.query_width * hidden
    norms = 2 * hidden + 2 * shape.head_dim
    if shape.experts is None:
        return Cut(attention + 3 * hidden * shape.ffn_hidden_size, norms)
    return Cut(attention, norms + hidden * shape.experts.count)  # the router


def expert_parameters(shape: Shape) -> int:
    """One expert of one layer."""
    assert shape.experts is not None
    return 3 * shape.hidden_size * shape.experts.ffn_hidden_size


def vision_parameters(vision: Vision) -> Cut:
    """The tower with its mergers; biases of row-parallel layers are whole on every rank."""
    hidden, ffn = vision.hidden_size, vision.ffn_hidden_size
    block = Cut(4 * hidden * hidden + 3 * hidden + 2 * hidden * ffn + ffn, 6 * hidden)  # two norms, two output biases
    width = hidden * vision.patches_per_token
    mergers = Cut(width * width + width + width * vision.out_hidden_size, vision.out_hidden_size) * (1 + vision.num_deepstack)
    norms = Cut(replicated=2 * hidden + 2 * width * vision.num_deepstack)  # deepstack mergers norm what is merged already
    entry = Cut(replicated=hidden * vision.patch_width + hidden + vision.num_position_embeddings * hidden)
    return block * vision.depth + mergers + norms + entry
