"""Evaluation of a policy on held-out prompts.

prism-nemo eval model.path=runs/rlvr data.validation=test.jsonl experiment.dir=runs/eval
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from prism_nemo.config.schema import EvalConfig
from prism_nemo.config.validate import validate
from prism_nemo.engine.step import reduce_metrics
from prism_nemo.evaluation.accuracy import sample_validation
from prism_nemo.run_directory import write_atomically
from prism_nemo.stages.sampling_run import open_sampling_run

RESULT = "evaluation.json"


def run(config: EvalConfig) -> None:
    """The `eval` command: writes evaluation.json, {"accuracy", "caption_accuracy", "format_rate", …, "greedy": {…}}."""
    validate(config)
    directory = Path(config.experiment.dir)
    with open_sampling_run("eval", config) as opened:
        results: dict[str, dict[str, float]] = {}
        decodings = {"sampled": config.rollout}
        if config.also_greedy and config.rollout.temperature > 0:
            decodings["greedy"] = replace(config.rollout, temperature=0.0, num_rollouts_per_prompt=1)
        for name, rollout in decodings.items():
            batch = sample_validation(
                opened.engine,
                opened.encoder,
                config.data,
                rollout,
                opened.runtime,
                seed=config.runtime.seed,
                limit=config.limit_samples,
            )
            results[name] = reduce_metrics(batch.metrics(), opened.runtime)
            opened.experiment.log_metrics(1, results[name], prefix=name)
            opened.experiment.log_samples(1, [{"decoding": name, **row} for row in batch.samples(len(batch.texts), {})])
        if opened.runtime.is_main:
            sampled = results.pop("sampled")
            write_atomically(directory / RESULT, json.dumps({**sampled, **results}, indent=2) + "\n")
            shown = "  ".join(f"{name} {value:.4f}" for name, value in sampled.items())
            print(f"{config.model.path}: {shown}", flush=True)
