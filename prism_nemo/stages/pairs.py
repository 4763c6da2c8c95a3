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
from prism_nemo.data.bad_records import BadRecord, BadTally
from prism_nemo.data.open import open_file
from prism_nemo.data.record_files import fingerprint
from prism_nemo.data.records import Record
from prism_nemo.errors import ConfigError, DataError
from prism_nemo.packing.groups import EncodedPrompt
from prism_nemo.rollout.batch import prompts_at_once
from prism_nemo.stages.bad_samples import settle_bad_records
from prism_nemo.stages.parts import PartFiles
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
        _sample(records, pictures, config, opened, parts)
        opened.runtime.barrier()
        _finish(pictures, config, opened, parts)


def _sample(records: Sequence[Record], pictures: Pictures, config: PairsConfig, opened: SamplingRun, parts: PartFiles) -> None:
    """Does the records that are in no part yet, as many at a time as are decoded together."""
    runtime = opened.runtime
    tally = BadTally(max_share=config.data.max_bad_sample_share, num_records=len(records))
    done = set()
    for row in parts.in_order():
        done.add(row["record"])
        tally.tried += 1
        tally.failed += "bad" in row
    runtime.barrier()  # all have read before any writes
    mine = [
        number for number in range(runtime.data_parallel_rank, len(records), runtime.data_parallel_size) if number not in done
    ]
    at_once = prompts_at_once(config.rollout)
    for start in range(0, runtime.max_over_data_parallel(-(-len(mine) // at_once)) * at_once, at_once):
        rows = _rows({number: records[number] for number in mine[start : start + at_once]}, pictures, config, opened)
        parts.append(rows)
        bad = [BadRecord(**row["bad"]) for row in rows if "bad" in row]
        settle_bad_records(tally, tried=len(rows), failed=len(bad), new=bad, runtime=runtime, experiment=opened.experiment)
        opened.stop_if_told()


def _rows(records: dict[int, Record], pictures: Pictures, config: PairsConfig, opened: SamplingRun) -> list[dict[str, Any]]:
    """What each record, by its number, gives: its pairs and how many rollouts made none, or why it cannot be used."""
    rows: dict[int, dict[str, Any]] = {}
    batch: list[tuple[Record, EncodedPrompt]] = []
    for number, record in records.items():
        try:
            prompt = opened.sampler.encoder.encode_prompt(record)
            shared = _shared_fields(record, pictures)
            batch.append((record, prompt))
            rows[number] = {"record": number, "shared": shared, "pairs": [], "invalid": 0}
        except DataError as error:
            rows[number] = {"record": number, "bad": asdict(BadRecord.from_error(record.id, f"record {record.id}", error))}
    rollouts = opened.sampler.sample(batch, config.rollout, step=0)
    good = [row for row in rows.values() if "bad" not in row]
    for index, (text, parsed) in enumerate(zip(rollouts.texts, rollouts.parsed, strict=True)):
        row = good[rollouts.rollouts[index].prompt_index]
        if parsed is None:
            row["invalid"] += 1
            continue
        name = f"{row['shared']['id']}/{index % config.rollout.num_rollouts_per_prompt}"
        row["pairs"].append({**row["shared"], "id": name, "student_response": text})
    for row in good:
        del row["shared"]
    return list(rows.values())


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
