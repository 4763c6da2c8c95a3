"""What `eval`, `pairs` and `generate`, which only sample from a policy, open: ranks, run directory, policy, encoder, engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from prism_nemo.data.chat import ChatEncoder
from prism_nemo.engine.runtime import Runtime, session
from prism_nemo.experiment import Experiment
from prism_nemo.models.policy import PolicyModel
from prism_nemo.rewards.grader import Grader
from prism_nemo.rollout.base import build_engine
from prism_nemo.rollout.sampler import Sampler
from prism_nemo.run_directory import resolve_model_directory
from prism_nemo.stages.loop import SamplingConfig, open_experiment
from prism_nemo.stages.signals import EXIT_INTERRUPTED, StopSignals


@dataclass(frozen=True, eq=False)
class SamplingRun:
    runtime: Runtime
    experiment: Experiment
    sampler: Sampler
    policy_directory: Path
    signals: StopSignals

    def stop_if_told(self) -> None:
        """Ends the process with status 75, on every rank, when any of them got SIGTERM or SIGUSR1. A collective."""
        if self.runtime.max_over_all(int(self.signals.received)) > 0:
            raise SystemExit(EXIT_INTERRUPTED)


@contextmanager
def open_sampling_run(stage: str, config: SamplingConfig, *, grader: Grader | None = None) -> Iterator[SamplingRun]:
    """Such a run has no steps: its metrics and samples start anew each time."""
    with (
        StopSignals() as signals,
        session(config.parallel, config.runtime) as runtime,
        open_experiment(stage, config, runtime) as experiment,
    ):
        experiment.rewind(0)
        directory = resolve_model_directory(Path(config.model.path), PolicyModel.name)
        with closing(build_sampler(config, runtime, grader)) as sampler:
            yield SamplingRun(runtime, experiment, sampler, directory, signals)


def build_sampler(config: SamplingConfig, runtime: Runtime, grader: Grader | None) -> Sampler:
    """The policy of `model.path`, loaded, with its encoder and its engine. A collective."""
    policy = PolicyModel(config.model, config.parallel, runtime)
    encoder = ChatEncoder.from_directory(policy.assets, config.data, image_root=None)
    engine = build_engine(config.rollout, policy, config.data, Path(config.experiment.dir))
    sampler = Sampler(engine, encoder, grader, runtime, config.runtime.seed)
    sampler.update_weights(policy.hf_tensors(), version=0)
    return sampler
