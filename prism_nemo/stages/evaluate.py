"""Evaluation of a policy on held-out prompts: records of our own, or a published benchmark's files.

    prism-nemo eval model.path=runs/rlvr data.validation=test.jsonl experiment.dir=runs/eval
    prism-nemo eval model.path=runs/rlvr benchmark=mathvista data.validation=MathVista/data experiment.dir=runs/mathvista

What a prompt gave is on the disk before the next ones are sampled; a run that was stopped goes on there, on any number of ranks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from prism_nemo.config.schema import EvalConfig, RolloutConfig
from prism_nemo.config.validate import validate
from prism_nemo.data.records import Record
from prism_nemo.data.stream import fingerprint
from prism_nemo.evaluation.accuracy import HeldOutPrompts
from prism_nemo.evaluation.metrics import token_f1
from prism_nemo.evaluation.samples import Answered, Sample, category_of
from prism_nemo.evaluation.summary import scalars, summarize
from prism_nemo.evaluation.votes import votes_of
from prism_nemo.rewards.grader import Grader
from prism_nemo.rewards.verifier import Verifier
from prism_nemo.rollout.batch import RolloutBatch
from prism_nemo.run_directory import write_atomically
from prism_nemo.stages.parts import PartFiles
from prism_nemo.stages.sampling_run import SamplingRun, open_sampling_run

RESULT = "evaluation.json"
PARTS = "parts"


def run(config: EvalConfig) -> None:
    """The `eval` command: writes evaluation.json, {"accuracy", "caption_accuracy", "format_rate", …, "greedy": {…}}.

    Every response, with its answer and whether that is right, is in samples.jsonl. Told to stop, it ends with status 75; the same
    command goes on.
    """
    validate(config)
    with (
        Grader(config.reward) as grader,
        Verifier(config.reward) as verifier,
        open_sampling_run("eval", config, grader=grader) as opened,
    ):
        prompts = HeldOutPrompts(opened.sampler, config.data, limit=config.limit_samples, benchmark=config.benchmark)
        records = prompts.records.all
        made_of = {
            "list of records": fingerprint(records),
            "set of prompts and verified answers": _fingerprint_of_truth(records),
            "policy": str(opened.policy_directory),
        }
        parts = PartFiles(Path(config.experiment.dir) / PARTS, made_of, opened.runtime)
        done = {row["record"] for row in parts.in_order()}
        opened.runtime.barrier()  # all have read before any writes
        decodings = _decodings(config)
        for place, (name, rollout) in enumerate(decodings.items()):
            first = place * len(records)  # record i is number `first + i` in the parts
            for numbers, batch in prompts.sample(rollout, done={number - first for number in done}):
                rows = _rows(name, batch, config, _votes(batch, verifier, opened))
                parts.append([{"record": first + number, "samples": rows[place]} for place, number in enumerate(numbers)])
                opened.stop_if_told()
        opened.runtime.barrier()
        if opened.runtime.is_main:
            _write(list(decodings), records, parts, config, opened)
        parts.remove()


def _decodings(config: EvalConfig) -> dict[str, RolloutConfig]:
    """The ways to decode: as configured, and the likeliest token each time."""
    decodings = {"sampled": config.rollout}
    if config.also_greedy and config.rollout.temperature > 0:
        decodings["greedy"] = replace(config.rollout, temperature=0.0, num_rollouts_per_prompt=1)
    return decodings


def _votes(batch: RolloutBatch, verifier: Verifier, opened: SamplingRun) -> list[list[int | None]]:
    """`votes_of` for each prompt's responses. Decided by one of the ranks that hold one model."""
    answers: list[list[str | None]] = [[] for _ in batch.records]
    for rollout, parsed in zip(batch.rollouts, batch.parsed, strict=True):
        answers[rollout.prompt_index].append(None if parsed is None else parsed.answer)
    kinds = [record.answer_kind for record in batch.records]
    return opened.runtime.share_from_leader(partial(votes_of, answers, kinds, verifier.verdicts))


def _rows(name: str, batch: RolloutBatch, config: EvalConfig, votes: list[list[int | None]]) -> list[list[dict[str, Any]]]:
    """Each prompt's responses as lines of samples.jsonl."""
    records = [batch.record_of(index) for index in range(len(batch.texts))]
    captions = [None if parsed is None else parsed.caption for parsed in batch.parsed]
    columns: dict[str, list[Any]] = {
        "extracted": [None if parsed is None else parsed.answer for parsed in batch.parsed],
        "reward": [None if reward is None else reward.score for reward in batch.rewards],
        "caption_f1": [
            None if record.caption is None else 0.0 if caption is None else token_f1(caption, record.caption)
            for record, caption in zip(records, captions, strict=True)
        ],
        "truncated": [rollout.finish_reason != "stop" for rollout in batch.rollouts],
        "category": [category_of(record, config.category) for record in records],
    }
    rows: list[list[dict[str, Any]]] = [[] for _ in batch.records]
    for rollout, row in zip(batch.rollouts, batch.samples(len(batch.texts), columns), strict=True):
        group = rows[rollout.prompt_index]
        group.append({"decoding": name, **row, "vote": votes[rollout.prompt_index][len(group)]})
    return rows


def _write(
    decodings: Sequence[str], records: Sequence[Record], parts: PartFiles, config: EvalConfig, opened: SamplingRun
) -> None:
    """Puts the parts together: samples.jsonl, metrics.jsonl, evaluation.json."""
    answered: dict[str, list[Answered]] = {name: [] for name in decodings}
    for row in parts.in_order():
        opened.experiment.log_samples(1, row["samples"])
        place, number = divmod(row["record"], len(records))
        answered[decodings[place]].append(Answered(records[number], tuple(map(Sample.from_row, row["samples"]))))
    results = {name: _result(found, config) for name, found in answered.items()}
    for name, result in results.items():
        opened.experiment.log_metrics(1, scalars(result), prefix=name)
    sampled = results.pop(decodings[0])
    write_atomically(Path(config.experiment.dir) / RESULT, json.dumps({**sampled, **results}, indent=2) + "\n")
    print(f"{config.model.path}: {'  '.join(_shown(sampled))}", flush=True)


def _result(answered: Sequence[Answered], config: EvalConfig) -> dict[str, Any]:
    return summarize(
        answered,
        pass_at_k=config.pass_at_k,
        category=config.category,
        bootstrap_samples=config.bootstrap_samples,
        seed=config.runtime.seed,
        benchmark=config.benchmark,
    )


def _shown(result: Mapping[str, Any]) -> Iterator[str]:
    """Each figure with its interval, for people; a benchmark's own scores behind them."""
    intervals = result.get("intervals", {})
    for name, value in scalars(dict(result)).items():
        low, high = intervals.get(name, (None, None))
        yield f"{name} {value:.4f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")
    own = result.get("benchmark", {})
    if own:
        yield f"{own['name']}:"
        yield from (f"{name} {value:.4f}" for name, value in own.items() if isinstance(value, float))


def _fingerprint_of_truth(records: Sequence[Record]) -> str:
    truth = [[record.prompt, record.answer, record.equivalent_answers, record.answer_kind, record.caption] for record in records]
    return hashlib.sha256(json.dumps(truth).encode()).hexdigest()
