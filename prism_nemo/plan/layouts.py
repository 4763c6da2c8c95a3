"""A layout of one model: made, checked, written in short."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from prism_nemo.config.enums import RecomputeGranularity, RecomputeModule
from prism_nemo.config.layout import EP, ModelSizes, check_model, check_parallel, model_sizes
from prism_nemo.config.schema import ParallelConfig
from prism_nemo.errors import LayoutError
from prism_nemo.plan.activations import Recompute
from prism_nemo.plan.placed import Placed, Settings
from prism_nemo.plan.shapes import Shape


@dataclass(frozen=True)
class Layout:
    """How one model is cut, with what goes with it."""

    parallel: ParallelConfig
    settings: Settings

    def of(self, shape: Shape) -> Placed:
        return Placed(shape, self.parallel, self.settings)


def sizes_of(shape: Shape) -> ModelSizes:
    """What `config.layout` checks a layout against."""
    sizes = model_sizes(dict(shape.config), shape.name)
    if shape.is_discriminator and shape.experts is not None:
        sizes = replace(sizes, num_experts=shape.experts.count, moe_ffn_hidden_size=shape.experts.ffn_hidden_size)
    return sizes


def check(shapes: Sequence[Shape], layout: Layout, world_size: int) -> None:
    """Raises LayoutError when models of these shapes cannot be cut so."""
    parallel = layout.parallel
    check_parallel(parallel, world_size)
    for shape in shapes:
        check_model(sizes_of(shape), parallel)
    if parallel.expert_model_parallel_size > 1 and all(shape.experts is None for shape in shapes):
        raise LayoutError("the model has no experts to distribute", where=f"{EP}, {shapes[0].name}", remedy=f"set {EP} to 1")
    if layout.settings.cpu_offload and layout.settings.cost.is_fp32:
        raise LayoutError("only a bf16 model's optimizer can be offloaded", where="--layout: offload", remedy="--precision bf16")


def is_possible(shapes: Sequence[Shape], layout: Layout, world_size: int) -> bool:
    try:
        check(shapes, layout, world_size)
    except LayoutError:
        return False
    return True


@contextmanager
def about_the_discriminator() -> Iterator[None]:
    """Layout errors name its section of the configuration."""
    try:
        yield
    except LayoutError as error:
        where, remedy = (
            text and text.replace("parallel.", "discriminator_parallel.").replace("--layout", "--discriminator-layout")
            for text in (error.where, error.remedy)
        )
        raise LayoutError(error.what, where=where, remedy=remedy) from error


def layout_of(
    settings: Settings,
    *,
    tp: int,
    pp: int = 1,
    cp: int = 1,
    ep: int = 1,
    vpp: int | None = None,
    first: int | None = None,
    replicas: int,
    recompute: Recompute = Recompute.none,
) -> Layout:
    """The configuration, with what goes with it."""
    parallel = ParallelConfig(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        num_layers_in_first_pipeline_stage=first,
        context_parallel_size=cp,
        expert_model_parallel_size=ep,
        sequence_parallel=tp > 1,
        use_distributed_optimizer=replicas > 1,
    )
    settings = replace(settings, cost=replace(settings.cost, recompute=recompute))
    return Layout(with_recompute(parallel, recompute), settings)


def with_recompute(parallel: ParallelConfig, recompute: Recompute) -> ParallelConfig:
    """The configuration's keys for it."""
    if recompute is Recompute.none:
        return replace(parallel, recompute_granularity=None)
    if recompute is Recompute.full:
        return replace(parallel, recompute_granularity=RecomputeGranularity.full)
    modules = [RecomputeModule(name) for name in recompute.value.split("+")]
    return replace(parallel, recompute_granularity=RecomputeGranularity.selective, recompute_modules=modules)


def describe_layout(layout: Layout) -> str:
    parallel = layout.parallel
    sizes = {
        "tp": parallel.tensor_model_parallel_size,
        "pp": parallel.pipeline_model_parallel_size,
        "vpp": parallel.virtual_pipeline_model_parallel_size or 1,
        "first": parallel.num_layers_in_first_pipeline_stage or 1,
        "last": parallel.num_layers_in_last_pipeline_stage or 1,
        "cp": parallel.context_parallel_size,
        "ep": parallel.expert_model_parallel_size,
        "etp": parallel.expert_tensor_parallel_size or 1,
    }
    parts = [f"{name}={size}" for name, size in sizes.items() if size > 1]
    parts += ["sp"] if parallel.sequence_parallel else []
    recompute = layout.settings.cost.recompute
    parts += [f"recompute={recompute}"] if recompute is not Recompute.none else []
    parts += ["offload"] if layout.settings.cpu_offload else []
    return " ".join(parts) or "data-parallel only"
