"""What the commands that only sample from a policy (`eval`, `pairs`) open: ranks, run directory, policy, encoder, engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prism_nemo.config.schema import EvalConfig, PairsConfig
from prism_nemo.data.chat import ChatEncoder
from prism_nemo.engine.runtime import Runtime, session
from prism_nemo.experiment import Experiment
from prism_nemo.models.policy import PolicyModel
from prism_nemo.rollout.base import RolloutEngine, build_engine
from prism_nemo.stages.loop import open_experiment


@dataclass(frozen=True, eq=False)
class SamplingRun:
    runtime: Runtime
    experiment: Experiment
    encoder: ChatEncoder
    engine: RolloutEngine


@contextmanager
def open_sampling_run(stage: str, config: EvalConfig | PairsConfig) -> Iterator[SamplingRun]:
    """Such a run has no steps to resume at: it starts anew each time, with empty metrics and samples."""
    with session(config.parallel, config.runtime) as runtime, open_experiment(stage, config, runtime) as experiment:
        experiment.rewind(0)
        policy = PolicyModel(config.model, config.parallel, runtime)
        encoder = ChatEncoder.from_directory(policy.assets, config.data, image_root=None)
        yield SamplingRun(runtime, experiment, encoder, build_engine(config.rollout, policy.module, device=runtime.device))
