"""What runs inside of vLLM's worker: taking weights, and drawing tokens as the Megatron engine draws them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.interface import MoveDirectionality

from prism_nemo.rollout.base import SamplingParams
from prism_nemo.rollout.sampling import Sampler, uniforms

DRAW = "prism_draw"  # of a request, in vLLM's `extra_args`: what `SharedDraws` needs


class WorkerExtension:
    """Methods that vLLM adds to its worker, which holds the model."""

    model_runner: Any

    def load_prism_weights(self, tensors: Iterator[tuple[str, Tensor]]) -> frozenset[str]:
        """Fills the model from HuggingFace's tensors; the parameters that were not."""
        model = self.model_runner.get_model()
        expected = {name for name, _ in model.named_parameters()}
        if current_platform.is_cpu():
            with torch.no_grad():
                return frozenset(expected - model.load_weights(tensors))  # in place: nothing is packed, see `_start`
        initialize_layerwise_reload(model)
        try:
            loaded = model.load_weights(tensors)
        finally:  # or what was not loaded stays without storage
            finalize_layerwise_reload(model, self.model_runner.model_config)
        return frozenset(expected - loaded)

    def take_prism_log_probs(self, keys: Sequence[int]) -> list[list[float]]:
        """What `SharedDraws` drew for the requests with these keys; they are not asked for again."""
        (draws,) = (one for one in self.model_runner.input_batch.logitsprocs.all if isinstance(one, SharedDraws))
        return [draws.take(key) for key in keys]

    def clear_prism_cache(self) -> None:
        """Nothing is left of the keys and values of any request."""
        for cache in self.model_runner.kv_caches:
            cache.zero_()


class SharedDraws(LogitsProcessor):
    """Draws tokens from logits as the Megatron engine does: the same seeds give the same rollouts on either.

    The token drawn is all that it leaves possible, so that vLLM takes it; the log-probabilities are its own.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._device = device
        self._rows: dict[int, tuple[tuple[int, int, SamplingParams], list[int]]] = {}  # key, seed, sampling; tokens so far
        self._log_probs: dict[int, list[float]] = {}  # by the request's key

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Keeps track of which request is in which row."""
        if batch_update is None:
            return
        for row in batch_update.removed:
            self._rows.pop(row, None)
        for row, parameters, _, output in batch_update.added:
            self._rows.pop(row, None)
            draw = (parameters.extra_args or {}).get(DRAW)
            if draw is not None:
                self._rows[row] = draw, output
        for source, target, kind in batch_update.moved:
            moved, replaced = self._rows.pop(source, None), self._rows.pop(target, None)
            if moved is not None:
                self._rows[target] = moved
            if replaced is not None and kind is MoveDirectionality.SWAP:
                self._rows[source] = replaced

    def apply(self, logits: Tensor) -> Tensor:
        """logits float32 [B, V]: -inf but at the token that is drawn."""
        rows = [row for row in self._rows if row < logits.shape[0]]
        if not rows:
            return logits
        for sampling in dict.fromkeys(self._rows[row][0][2] for row in rows):
            self._draw(logits, [row for row in rows if self._rows[row][0][2] == sampling], sampling)
        return logits

    def _draw(self, logits: Tensor, rows: list[int], sampling: SamplingParams) -> None:
        """The given rows, all of them sampled in one way."""
        seeds = np.array([self._rows[row][0][1] for row in rows], dtype=np.uint64)
        steps = np.array([len(self._rows[row][1]) for row in rows])
        uniform = torch.from_numpy(uniforms(seeds, steps)).to(self._device)
        tokens, log_probs = Sampler(sampling, self._device)(logits[rows], uniform)
        for row, step, value in zip(rows, steps.tolist(), log_probs.tolist(), strict=True):
            known = self._log_probs.setdefault(self._rows[row][0][0], [])
            known[step:] = [value]  # a token of a response that was put back is drawn again
        logits[rows] = float("-inf")
        logits[rows, tokens] = 0.0

    def take(self, key: int) -> list[float]:
        return self._log_probs.pop(key, [])
