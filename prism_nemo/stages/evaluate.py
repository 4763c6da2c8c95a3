"""Evaluation of a policy on held-out prompts.

prism-nemo eval model.path=runs/rlvr data.validation=test.jsonl experiment.dir=runs/eval
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from prism_nemo.config.compose import dump_config
from prism_nemo.config.schema import EvalConfig
from prism_nemo.config.validate import validate
from prism_nemo.data.chat import ChatEncoder
from prism_nemo.engine.runtime import session
from prism_nemo.engine.step import reduce_metrics
from prism_nemo.evaluation.accuracy import sample_validation
from prism_nemo.experiment import Experiment
from prism_nemo.models.policy import PolicyModel
from prism_nemo.rollout.base import build_engine
from prism_nemo.run_directory import write_atomically

RESULT = "evaluation.json"


def run(config: EvalConfig) -> None:
    """The `eval` command: writes evaluation.json, {"accuracy", "caption_accuracy", "format_rate", …, "greedy": {…}}."""
    validate(config)
    directory = Path(config.experiment.dir)
    with (
        session(config.parallel, config.runtime) as runtime,
        Experiment(
            directory,
            stage="eval",
            config_yaml=dump_config(config),
            resume=config.experiment.resume,
            overwrite=config.experiment.overwrite,
            is_main=runtime.is_main,
            tensorboard=config.experiment.tensorboard,
            nemo_exp_manager=config.experiment.nemo_exp_manager,
            progress=config.experiment.progress,
        ) as experiment,
    ):
        runtime.barrier()
        experiment.rewind(0)
        policy = PolicyModel(config.model, config.parallel, runtime)
        encoder = ChatEncoder.from_directory(policy.assets, config.data, image_root=None)
        engine = build_engine(config.rollout, policy.module, device=runtime.device)
        results: dict[str, dict[str, float]] = {}
        decodings = {"sampled": config.rollout}
        if config.also_greedy and config.rollout.temperature > 0:
            decodings["greedy"] = replace(config.rollout, temperature=0.0, num_rollouts_per_prompt=1)
        for name, rollout in decodings.items():
            batch = sample_validation(
                engine, encoder, config.data, rollout, runtime, seed=config.runtime.seed, limit=config.limit_samples
            )
            results[name] = reduce_metrics(batch.metrics(), runtime)
            experiment.log_metrics(1, results[name], prefix=name)
            experiment.log_samples(1, [{"decoding": name, **row} for row in batch.samples(len(batch.texts), {})])
        if runtime.is_main:
            sampled = results.pop("sampled")
            write_atomically(directory / RESULT, json.dumps({**sampled, **results}, indent=2) + "\n")
            shown = "  ".join(f"{name} {value:.4f}" for name, value in sampled.items())
            print(f"{config.model.path}: {shown}", flush=True)
