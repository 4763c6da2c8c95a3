"""What an evaluation's own keys cannot be."""

from __future__ import annotations

from prism_nemo.config.schema import EvalConfig
from prism_nemo.errors import ConfigError


def check_pass_at_k(config: EvalConfig) -> None:
    """Raises ConfigError for a k that the number of rollouts does not allow."""
    rollouts = config.rollout.num_rollouts_per_prompt
    for k in config.pass_at_k:
        if not 1 <= k <= rollouts:
            raise ConfigError(
                f"pass@{k} cannot be told from {rollouts} response{'s' * (rollouts > 1)} to a prompt",
                where="pass_at_k, rollout.num_rollouts_per_prompt",
                remedy=f"use k from 1 to {rollouts}, or raise rollout.num_rollouts_per_prompt",
            )
