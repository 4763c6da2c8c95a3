"""A Megatron engine with a model of its own, which takes its weights from a stream of HuggingFace's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prism_nemo.convert.qwen3_vl import ParameterMapping, mappings
from prism_nemo.engine.chunks import Chunks, chunks_of
from prism_nemo.models.weights import canonical_parameters
from prism_nemo.rollout.base import RolloutError
from prism_nemo.rollout.megatron import MegatronEngine

_REMEDY = "the servers must be started with the policy's own model.path"


class TensorLoader:
    """Fills a model that one rank holds, each HuggingFace tensor as it comes, through the one mapping.

    Nothing is kept: most tensors are rows of a parameter and are copied there, and a layer's fused experts are cut in place.
    """

    def __init__(self, model: Chunks, config: Mapping[str, Any]) -> None:
        parameters = canonical_parameters(model, config)
        self._fill: dict[str, tuple[tuple[int, ...], Callable[[Tensor], None]]] = {}  # by name: shape, and where it goes
        filled: set[str] = set()
        for mapping in mappings(config):
            filled |= set(mapping.megatron_names)
            for source, (name, shape) in enumerate(zip(mapping.hf_names, mapping.hf_shapes, strict=True)):
                own = [parameters[megatron] for megatron in mapping.megatron_names]
                self._fill[name] = (shape, partial(_fill, mapping, source, own))
        assert filled == parameters.keys(), f"no tensor fills {sorted(parameters.keys() - filled)[:3]}"

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Reads all of `tensors`. Raises RolloutError unless they are exactly the model's, once each."""
        missing = set(self._fill)
        for name, tensor in tensors:
            if name not in missing:
                problem = "came twice" if name in self._fill else "is none of the model's"
                raise RolloutError(f"the weight `{name:.200}` {problem}", where="weights of a rollout server", remedy=_REMEDY)
            shape, fill = self._fill[name]
            if tuple(tensor.shape) != shape:
                raise RolloutError(
                    f"the weight `{name}` has shape {list(tensor.shape)}, the server's model wants {list(shape)}",
                    where="weights of a rollout server",
                    remedy=_REMEDY,
                )
            fill(tensor)
            missing.discard(name)
        if missing:
            raise RolloutError(
                f"{len(missing)} of {len(self._fill)} weights did not come, `{min(missing)}` among them",
                where="weights of a rollout server",
                remedy=_REMEDY,
            )


def _fill(mapping: ParameterMapping, source: int, parameters: list[torch.nn.Parameter], tensor: Tensor) -> None:
    """Copies HuggingFace tensor number `source` of a mapping to where it belongs."""
    if mapping.fused:
        for parameter, part in zip(parameters, tensor, strict=True):
            parameter.copy_(mapping.op.to_megatron(part))
        return
    (parameter,) = parameters
    order = mapping.op.row_order(*(shape[0] for shape in mapping.hf_shapes))
    if order is None:
        parameter.copy_(mapping.op.to_megatron(tensor))
        return
    at = taken = 0
    for run in order:
        if run.source == source:
            assert tensor.shape[0] >= run.start + run.count
            parameter[at : at + run.count].copy_(tensor[run.start : run.start + run.count])
            taken += run.count
        at += run.count
    assert taken == tensor.shape[0] and at == parameter.shape[0], mapping


class ServedMegatronEngine(MegatronEngine):
    """`MegatronEngine` over a model that nobody trains: `update_weights` reads its tensors."""

    def __init__(self, model: Chunks, config: Mapping[str, Any], **options: Any) -> None:
        """`options`: see `MegatronEngine`."""
        super().__init__(model, **options)
        for chunk in chunks_of(model):
            chunk.requires_grad_(False)
        self._loader = TensorLoader(model, config)

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """See `RolloutEngine.update_weights`. Raises RolloutError for other tensors than the model's: it has parts of two."""
        self._loader.load(tensors)
        self._weights_version = version
