"""What a checkpoint keeps of rollouts that were begun a step before they are trained on: those very rollouts.

Their weights are gone when the run is resumed, so they could not be sampled again.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from prism_nemo.engine.runtime import Runtime
from prism_nemo.rollout.base import Rollout
from prism_nemo.rollout.sampler import PendingRollouts


def packed(pending: PendingRollouts, positions: Sequence[int], runtime: Runtime) -> list[dict[str, Any]]:
    """The rollouts of all ranks, in values that JSON holds exactly. Waits for them. A collective.

    positions: of this rank's prompts in the global batch.
    """
    mine = [
        {
            "position": positions[rollout.prompt_index],
            "tokens": _text(rollout.tokens.to(torch.int32)),
            "log_probs": _text(rollout.log_probs),
            "finish_reason": rollout.finish_reason,
            "weights_version": rollout.weights_version,
        }
        for rollout in pending.result().rollouts
    ]
    return [one for part in runtime.gather_objects(mine) for one in part]


def unpacked(saved: Sequence[dict[str, Any]], positions: Sequence[int]) -> list[Rollout]:
    """Those of the prompts at `positions`, whatever ranks they were on."""
    index = {position: number for number, position in enumerate(positions)}
    found = [
        Rollout(
            prompt_index=index[one["position"]],
            tokens=_tensor(one["tokens"], np.int32).long(),
            log_probs=_tensor(one["log_probs"], np.float32),
            finish_reason=one["finish_reason"],
            weights_version=one["weights_version"],
        )
        for one in saved
        if one["position"] in index
    ]
    return sorted(found, key=lambda rollout: rollout.prompt_index)


def _text(values: Tensor) -> str:
    return base64.b64encode(values.numpy().tobytes()).decode()


def _tensor(text: str, dtype: type[np.generic]) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=dtype).copy())
