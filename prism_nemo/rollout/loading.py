"""A Megatron engine with a model of its own, which takes its weights from a stream of HuggingFace's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from prism_nemo.convert.ops import Op
from prism_nemo.convert.qwen3_vl import ParameterMapping, mappings
from prism_nemo.engine.chunks import Chunks, chunks_of
from prism_nemo.models.weights import canonical_parameters
from prism_nemo.rollout.base import RolloutError
from prism_nemo.rollout.buckets import Rows
from prism_nemo.rollout.megatron import MegatronEngine

_WHERE = "weights of a rollout server"
_REMEDY = "the servers must be started with the policy's own model.path"


class TensorLoader:
    """Fills a model that one rank holds, each HuggingFace tensor as it comes, through the one mapping.

    Nothing is kept: most tensors are rows of a parameter and are copied there, and a layer's fused experts are cut in place.
    """

    def __init__(self, model: Chunks, config: Mapping[str, Any]) -> None:
        parameters = canonical_parameters(model, config)
        self._fill: dict[str, tuple[tuple[int, ...], Callable[[int, Tensor], None]]] = {}  # by name: shape, where rows go
        filled: set[str] = set()
        for mapping in mappings(config):
            filled |= set(mapping.megatron_names)
            for source, (name, shape) in enumerate(zip(mapping.hf_names, mapping.hf_shapes, strict=True)):
                own = [parameters[megatron] for megatron in mapping.megatron_names]
                self._fill[name] = (shape, _filler(mapping, source, own))
        assert filled == parameters.keys(), f"no tensor fills {sorted(parameters.keys() - filled)[:3]}"

    @torch.no_grad()
    def load(self, rows: Iterable[Rows]) -> None:
        """Reads all of `rows`. Raises RolloutError unless they are exactly the model's, once each."""
        missing = dict.fromkeys(self._fill, 0)  # by name, the next row
        for part in rows:
            if part.name not in missing:
                problem = "came twice" if part.name in self._fill else "is none of the model's"
                raise RolloutError(f"the weight `{part.name:.200}` {problem}", where=_WHERE, remedy=_REMEDY)
            shape, fill = self._fill[part.name]
            if part.shape != shape:
                raise RolloutError(
                    f"the weight `{part.name}` has shape {list(part.shape)}, the server's model wants {list(shape)}",
                    where=_WHERE,
                    remedy=_REMEDY,
                )
            if part.first != missing[part.name]:
                raise RolloutError(
                    f"of the weight `{part.name}` row {part.first} came in place of {missing[part.name]}", where=_WHERE
                )
            fill(part.first, part.values)
            missing[part.name] += part.values.shape[0]
            if missing[part.name] == shape[0]:
                del missing[part.name]
        if missing:
            raise RolloutError(
                f"{len(missing)} of {len(self._fill)} weights did not come, `{min(missing)}` among them",
                where=_WHERE,
                remedy=_REMEDY,
            )


def _filler(mapping: ParameterMapping, source: int, parameters: list[torch.nn.Parameter]) -> Callable[[int, Tensor], None]:
    """What copies rows of HuggingFace tensor number `source` of a mapping to where they belong."""
    if mapping.fused:  # a row is an expert
        return partial(_fill_experts, mapping.op, parameters)
    (parameter,) = parameters
    rows = mapping.hf_shapes[source][0]
    order = mapping.op.row_order(*(shape[0] for shape in mapping.hf_shapes))
    assert order is not None, mapping
    runs, at = [], 0
    for run in order:
        if run.source == source:
            runs.append((run.start, run.count, at))
        at += run.count
    assert at == parameter.shape[0] and sum(count for _, count, _ in runs) == rows, mapping
    return partial(_fill_rows, parameter, runs)


def _fill_experts(op: Op, parameters: list[torch.nn.Parameter], first: int, values: Tensor) -> None:
    for parameter, part in zip(parameters[first : first + len(values)], values, strict=True):
        parameter.copy_(op.to_megatron(part))


def _fill_rows(parameter: torch.nn.Parameter, runs: list[tuple[int, int, int]], first: int, values: Tensor) -> None:
    """`runs`: first row of the HuggingFace tensor, how many, and the parameter's row."""
    end = first + len(values)
    for start, count, at in runs:
        low, high = max(start, first), min(start + count, end)
        if low < high:
            parameter[at + low - start : at + high - start].copy_(values[low - first : high - first])


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
        self.update_rows((Rows(name, tuple(tensor.shape), 0, tensor) for name, tensor in tensors), version)

    def update_rows(self, rows: Iterable[Rows], version: int) -> None:
        """See `TakesRows.update_rows`. Raises RolloutError as `update_weights` does."""
        self._loader.load(rows)
        self._weights_version = version
