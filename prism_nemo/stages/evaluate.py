"""Evaluation of a policy on held-out prompts.

prism-nemo eval model.path=runs/rlvr data.validation=test.jsonl experiment.dir=runs/eval
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from prism_nemo.algorithms.metrics import MetricSums, mean_of, merge
from prism_nemo.config.schema import EvalConfig, RolloutConfig
from prism_nemo.config.validate import validate
from prism_nemo.engine.step import reduce_metrics
from prism_nemo.evaluation.accuracy import HeldOutPrompts
from prism_nemo.rewards.grader import Grader
from prism_nemo.rollout.batch import RolloutBatch
from prism_nemo.run_directory import write_atomically
from prism_nemo.stages.sampling_run import SamplingRun, open_sampling_run

RESULT = "evaluation.json"


def run(config: EvalConfig) -> None:
    """The `eval` command: writes evaluation.json, {"accuracy", "caption_accuracy", "format_rate", …, "greedy": {…}}.

    Told to stop, it ends with status 75 and has nothing to show; the same command evaluates anew.
    """
    validate(config)
    directory = Path(config.experiment.dir)
    with Grader(config.reward) as grader, open_sampling_run("eval", config, grader=grader) as opened:
        prompts = HeldOutPrompts(opened.sampler, config.data, limit=config.limit_samples)
        decodings = {"sampled": config.rollout}
        if config.also_greedy and config.rollout.temperature > 0:
            decodings["greedy"] = replace(config.rollout, temperature=0.0, num_rollouts_per_prompt=1)
        results = {name: _measure(name, rollout, prompts, config, opened) for name, rollout in decodings.items()}
        if opened.runtime.is_main:
            sampled = results.pop("sampled")
            write_atomically(directory / RESULT, json.dumps({**sampled, **results}, indent=2) + "\n")
            shown = "  ".join(f"{name} {value:.4f}" for name, value in sampled.items())
            print(f"{config.model.path}: {shown}", flush=True)


def _measure(
    name: str, rollout: RolloutConfig, prompts: HeldOutPrompts, config: EvalConfig, opened: SamplingRun
) -> dict[str, float]:
    """The metrics of one way of decoding; the samples go to samples.jsonl as they come."""
    sums: MetricSums = {}
    for batch in prompts.sample(rollout):
        sums = merge(sums, {**batch.metrics(), "reward": _rewards(batch)})
        rows = [{"decoding": name, **row} for row in batch.samples(len(batch.texts), {})]
        opened.experiment.log_samples(1, [row for share in opened.runtime.gather_objects(rows) for row in share])
        opened.stop_if_told()
    result = reduce_metrics(sums, opened.runtime)
    opened.experiment.log_metrics(1, result, prefix=name)
    return result


def _rewards(batch: RolloutBatch) -> tuple[Tensor, Tensor]:
    """The mean reward, as RLVR would give it, where there is an answer to verify."""
    return mean_of(torch.tensor([reward.score for reward in batch.rewards if reward is not None]))
