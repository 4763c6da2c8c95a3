"""Drawing tokens: reproducible uniform numbers, and the inverse of a distribution's cumulative sum."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from prism_nemo.rollout.base import SamplingParams

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # SplitMix64's constants (Steele, Lea, Flood 2014; Vigna's finaliser)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * _MIX_1
    state = (state ^ (state >> np.uint64(27))) * _MIX_2
    return state ^ (state >> np.uint64(31))


def uniforms(seeds: np.ndarray, position: int | np.ndarray) -> np.ndarray:
    """Number `position`, or [B] of them, of every seed's stream: float64 [B] in [0, 1) with 53 random bits, for uint64 seeds [B].

    A function of (seed, position) alone, so a sample does not depend on what is drawn beside it. The seed is mixed first: plain
    SplitMix64 streams of nearby seeds would be one stream, shifted.
    """
    start = _mix(seeds + _GOLDEN)
    step = (np.atleast_1d(position).astype(np.uint64) + np.uint64(1)) * _GOLDEN  # arrays: numpy would warn of a scalar's overflow
    return (_mix(start + step) >> np.uint64(11)) * 2.0**-53


class Sampler:
    """Draws one token a row, as `SamplingParams` says."""

    def __init__(self, sampling: SamplingParams, device: torch.device) -> None:
        self.sampling = sampling
        self._banned = torch.tensor(sampling.banned_token_ids, dtype=torch.int64, device=device)

    def __call__(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int64 [B] and their log-probabilities float32 [B], from float32 logits [B, V] (overwritten) and float64 [B].

        The token drawn is the first, by id, whose cumulative probability exceeds the uniform number. NaN logits give NaN
        log-probabilities.
        """
        logits = self._restrict(logits)
        log_probs = logits.log_softmax(dim=-1)
        if self.sampling.temperature == 0:
            token = logits.argmax(dim=-1)
        else:
            cumulative = log_probs.exp().cumsum(dim=-1, dtype=torch.float64)
            target = uniform.unsqueeze(1) * cumulative[:, -1:]  # 53 bits below 1: the product cannot round up to the sum
            token = torch.searchsorted(cumulative, target, right=True).squeeze(1)
            token = token.clamp(max=logits.shape[1] - 1)  # NaN only
        return token, log_probs.gather(1, token.unsqueeze(1)).squeeze(1)

    def _restrict(self, logits: Tensor) -> Tensor:
        """Logits after ban, temperature, top-k and top-p; what cannot be drawn is -inf."""
        temperature, top_k, top_p = self.sampling.temperature, self.sampling.top_k, self.sampling.top_p
        if self._banned.numel():
            logits = logits.index_fill_(1, self._banned, float("-inf"))
        if temperature == 0:
            return logits
        if temperature != 1:
            logits = logits / temperature
        if 0 < top_k < logits.shape[1]:
            least = logits.topk(top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        if top_p < 1:
            ordered, order = logits.sort(dim=-1, descending=True, stable=True)
            probability = ordered.softmax(dim=-1, dtype=torch.float64)
            likelier = probability.cumsum(dim=-1) - probability  # the probability of all that come before
            dropped = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, order, likelier >= top_p)
            logits = logits.masked_fill(dropped, float("-inf"))
        return logits
