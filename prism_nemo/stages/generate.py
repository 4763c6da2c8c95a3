"""A policy's responses to the prompts of a data set, as lines of JSON, for whatever reads them next.

    prism-nemo generate model.path=runs/rlvr data.train=prompts.jsonl experiment.dir=runs/responses

What a prompt gave is on the disk before the next ones are sampled; a run that was stopped goes on there, on any number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prism_nemo.config.rollout import GenerateSettings
from prism_nemo.config.schema import GenerateConfig
from prism_nemo.config.validate import validate
from prism_nemo.curate.comparing import contents_digest
from prism_nemo.curate.pass_rates import PassRate, pass_rate_lines
from prism_nemo.data.open import open_file
from prism_nemo.data.records import Record
from prism_nemo.errors import DataError
from prism_nemo.packing.groups import EncodedPrompt
from prism_nemo.rewards.grader import Grader, check_answer
from prism_nemo.rollout.batch import RolloutBatch, prompts_at_once
from prism_nemo.rollout.sampler import Sampler
from prism_nemo.run_directory import write_atomically
from prism_nemo.stages.parts import PartFiles
from prism_nemo.stages.sampled_records import EncodedRecords, sample_records
from prism_nemo.stages.sampling_run import SamplingRun, open_sampling_run

RESULT = "responses.jsonl"
PASS_RATES = "pass_rates.jsonl"
PARTS = "parts"


def run(config: GenerateConfig) -> None:
    """The `generate` command: writes responses.jsonl, one line a usable record, in the records' order.

    Where answers are graded, pass_rates.jsonl says how often each record was solved, as `curate.pass_rates` reads it. Unusable
    records are left out and listed in bad_samples.jsonl. Told to stop, it ends with status 75; the same command goes on.
    """
    validate(config)
    assert config.data.train is not None, "validated"
    with ExitStack() as stack:
        grader = stack.enter_context(Grader(config.reward)) if config.generate.grade else None
        opened = stack.enter_context(open_sampling_run("generate", config, grader=grader))
        found = open_file(config.data.train, config.data, required=())
        opened.experiment.record_bad_samples([asdict(bad) for bad in found.bad])
        records = found.records[: config.limit_samples]
        if not records:
            raise DataError("the data holds no usable record", where=config.data.train)
        made_of = {"set of records": contents_digest(records), "policy": str(opened.policy_directory)}
        parts = PartFiles(Path(config.experiment.dir) / PARTS, made_of, opened.runtime)
        sample_records(
            range(len(records)),
            parts,
            lambda numbers: _rows(numbers, records, config, opened.sampler),
            at_once=prompts_at_once(config.rollout),
            max_bad_share=config.data.max_bad_sample_share,
            experiment=opened.experiment,
            name="generate",
            stop_if_told=opened.stop_if_told,
        )
        if opened.runtime.is_main:
            _write(records, parts, config, opened)
        parts.remove()


def _rows(numbers: Sequence[int], records: Sequence[Record], config: GenerateConfig, sampler: Sampler) -> list[dict[str, Any]]:
    """The responses to each record, or why it cannot be used."""

    def encode(record: Record) -> tuple[EncodedPrompt, dict[str, Any]]:
        if config.generate.grade and record.answer is not None:
            check_answer(record)
        return sampler.encoder.encode_prompt(record), {"responses": []}

    encoded = EncodedRecords.of(numbers, records, encode)
    rollouts = sampler.sample(encoded.batch, config.rollout, step=0)
    for index, rollout in enumerate(rollouts.rollouts):
        encoded.usable[rollout.prompt_index]["responses"].append(_response(rollouts, index, config.generate))
    return encoded.rows


def _response(rollouts: RolloutBatch, index: int, settings: GenerateSettings) -> dict[str, Any]:
    rollout, parsed, reward = rollouts.rollouts[index], rollouts.parsed[index], rollouts.rewards[index]
    row: dict[str, Any] = {
        "text": rollouts.texts[index],
        "finish_reason": rollout.finish_reason,
        "tokens": rollout.tokens.numel(),
        "valid": parsed is not None,
        "extracted": None if parsed is None else parsed.answer,
    }
    if settings.grade:
        row["correct"] = None if reward is None else reward.accuracy
        row["reward"] = None if reward is None else reward.score
    if settings.token_ids:
        row["token_ids"] = rollout.tokens.tolist()
    if settings.log_probs:
        row["log_probs"] = [float(f"{value:.9g}") for value in rollout.log_probs.tolist()]  # as many digits as fp32 has
    return row


def _write(records: Sequence[Record], parts: PartFiles, config: GenerateConfig, opened: SamplingRun) -> None:
    """Puts the parts together: responses.jsonl, pass_rates.jsonl and the figures in metrics.jsonl."""
    folder = Path(config.experiment.dir)
    tally = _Figures()
    temporary = folder / f".{RESULT}.new"
    with temporary.open("w", encoding="ascii") as file:
        for row in parts.in_order():
            if "bad" in row:
                tally.bad_records += 1
                continue
            record = records[row["record"]]
            line = {"id": record.id, "prompt": record.prompt, "answer": record.answer, "responses": row["responses"]}
            file.write(json.dumps(line) + "\n")
            tally.add(row["record"], row["responses"])
    temporary.replace(folder / RESULT)
    if tally.rates:
        write_atomically(folder / PASS_RATES, pass_rate_lines(records, tally.rates))
    figures = tally.figures()
    opened.experiment.log_metrics(1, figures)
    shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    print(f"{folder / RESULT}: {shown}", flush=True)


class _Figures:
    """What is counted of all responses. `rates`: how often each record with a verified answer was solved."""

    def __init__(self) -> None:
        self.rates: dict[int, PassRate] = {}
        self.prompts = self.bad_records = 0
        self._responses = self._tokens = self._valid = 0
        self._ends = {"stop": 0, "length": 0, "timeout": 0}

    def add(self, number: int, responses: Sequence[dict[str, Any]]) -> None:
        self.prompts += 1
        for response in responses:
            self._responses += 1
            self._tokens += response["tokens"]
            self._valid += response["valid"]
            self._ends[response["finish_reason"]] += 1
        graded = [response["correct"] for response in responses if response.get("correct") is not None]
        if graded:
            self.rates[number] = PassRate(sum(correct >= 1.0 for correct in graded), len(graded))

    def figures(self) -> dict[str, float]:
        """Counts, and means over the responses; `solved` over those that were graded."""
        shares = {
            "format_rate": self._valid,
            "response_length": self._tokens,
            "truncated": self._ends["length"],
            "timeouts": self._ends["timeout"],
        }
        figures: dict[str, float] = {"prompts": self.prompts, "responses": self._responses, "bad_records": self.bad_records}
        figures |= {name: count / self._responses for name, count in shares.items()}
        if self.rates:
            figures["solved"] = sum(rate.solved for rate in self.rates.values()) / sum(rate.of for rate in self.rates.values())
        return figures
