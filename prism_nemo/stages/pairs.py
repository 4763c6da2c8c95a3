"""Teacher/student pairs for the discriminator's warm-up: the policy's own responses beside the teacher's.

    prism-nemo pairs model.path=runs/sft data.train=teacher.jsonl experiment.dir=runs/pairs

What a record gave is on the disk before the next ones are sampled; a run that was stopped goes on there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prism_nemo.config.schema import PairsConfig
from prism_nemo.config.validate import validate
from prism_nemo.curate.pictures import Pictures
from prism_nemo.data.open import open_file
from prism_nemo.data.record_files import fingerprint
from prism_nemo.data.records import Record
from prism_nemo.errors import ConfigError, DataError
from prism_nemo.packing.groups import EncodedPrompt
from prism_nemo.rollout.batch import prompts_at_once
from prism_nemo.rollout.sampler import Sampler
from prism_nemo.stages.parts import PartFiles
from prism_nemo.stages.sampled_records import EncodedRecords, sample_records
from prism_nemo.stages.sampling_run import SamplingRun, open_sampling_run

RESULT = "pairs.jsonl"
PARTS = "parts"


def run(config: PairsConfig) -> None:
    """The `pairs` command: writes pairs.jsonl, one line per teacher response and student rollout of valid format.

    A rollout of invalid format makes no pair; how many there were is in metrics.jsonl. Unusable records are left out and listed
    in bad_samples.jsonl. Told to stop, it ends with status 75; the same command goes on.
    """
    validate(config)
    with open_sampling_run("pairs", config) as opened:
        if config.data.train is None:
            raise ConfigError("there is no data", where="data.train", remedy="name a file of records with teacher responses")
        found = open_file(config.data.train, config.data, required=("response",))
        opened.experiment.record_bad_samples([asdict(bad) for bad in found.bad])
        records = found.records[: config.limit_samples]
        made_of = {"list of records": fingerprint(records), "policy": str(opened.policy_directory)}
        parts = PartFiles(Path(config.experiment.dir) / PARTS, made_of, opened.runtime)
        pictures = Pictures(records, Path(config.experiment.dir))
        sample_records(
            range(len(records)),
            parts,
            lambda numbers: _rows(numbers, records, pictures, config, opened.sampler),
            at_once=prompts_at_once(config.rollout),
            max_bad_share=config.data.max_bad_sample_share,
            experiment=opened.experiment,
            name="pairs",
            stop_if_told=opened.stop_if_told,
        )
        _finish(pictures, config, opened, parts)


def _rows(
    numbers: Sequence[int], records: Sequence[Record], pictures: Pictures, config: PairsConfig, sampler: Sampler
) -> list[dict[str, Any]]:
    """What each record gives: its pairs and how many rollouts made none, or why it cannot be used."""
    shared: list[dict[str, Any]] = []  # of the usable records

    def encode(record: Record) -> tuple[EncodedPrompt, dict[str, Any]]:
        prompt = sampler.encoder.encode_prompt(record)
        shared.append(_shared_fields(record, pictures))
        return prompt, {"pairs": [], "invalid": 0}

    encoded = EncodedRecords.of(numbers, records, encode)
    rollouts = sampler.sample(encoded.batch, config.rollout, step=0)
    for index, (text, parsed) in enumerate(zip(rollouts.texts, rollouts.parsed, strict=True)):
        number = rollouts.rollouts[index].prompt_index
        row, fields = encoded.usable[number], shared[number]
        if parsed is None:
            row["invalid"] += 1
            continue
        name = f"{fields['id']}/{index % config.rollout.num_rollouts_per_prompt}"
        row["pairs"].append({**fields, "id": name, "student_response": text})
    return encoded.rows


def _shared_fields(record: Record, pictures: Pictures) -> dict[str, Any]:
    """What the pairs of a record have in common, in the pairwise form that the readers take."""
    system = {"system": record.metadata["system"]} if "system" in record.metadata else {}
    return {
        **system,
        "id": record.id,
        "prompt": record.prompt,
        **pictures.fields(record),
        "teacher_response": record.response,
    }


def _finish(pictures: Pictures, config: PairsConfig, opened: SamplingRun, parts: PartFiles) -> None:
    """Puts the parts together and takes them away."""
    result = Path(config.experiment.dir) / RESULT
    counts = {"pairs": 0, "invalid_rollouts": 0, "bad_records": 0}
    for row in parts.in_order():
        counts["pairs"] += len(row.get("pairs", ()))
        counts["invalid_rollouts"] += row.get("invalid", 0)
        counts["bad_records"] += "bad" in row
    if opened.runtime.is_main and counts["pairs"]:
        temporary = result.with_name(f".{result.name}.new")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(_lines(parts))
        temporary.replace(result)
    parts.remove()
    if not counts["pairs"]:
        raise DataError("no rollout has a valid format", where=config.model.path, remedy="train the policy longer (sft)")
    opened.experiment.log_metrics(1, counts)
    if opened.runtime.is_main:
        left_out = (
            f"{counts['invalid_rollouts']} rollouts of invalid format and {counts['bad_records']} unusable records left out"
        )
        print(f"{counts['pairs']} pairs in {result}, {left_out}; images are below {pictures.root}", flush=True)


def _lines(parts: PartFiles) -> Iterator[str]:
    for row in parts.in_order():
        for pair in row.get("pairs", ()):
            yield json.dumps(pair) + "\n"
