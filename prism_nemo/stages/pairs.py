"""Teacher/student pairs for the discriminator's warm-up: the policy's own responses beside the teacher's.

prism-nemo pairs model.path=runs/sft data.train=teacher.jsonl experiment.dir=runs/pairs
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from prism_nemo.config.schema import PairsConfig
from prism_nemo.config.validate import validate
from prism_nemo.data.open import open_records
from prism_nemo.data.records import ImageSource, Record
from prism_nemo.errors import ConfigError, DataError
from prism_nemo.rollout.batch import sample_rollouts
from prism_nemo.run_directory import write_atomically
from prism_nemo.stages.sampling_run import SamplingRun, open_sampling_run

RESULT = "pairs.jsonl"


def run(config: PairsConfig) -> None:
    """The `pairs` command: writes pairs.jsonl, one line per teacher response and student rollout of valid format.

    A rollout of invalid format makes no pair; how many there were is in metrics.jsonl.
    """
    validate(config)
    directory = Path(config.experiment.dir)
    with open_sampling_run("pairs", config) as opened:
        runtime = opened.runtime
        if config.data.train is None:
            raise ConfigError("there is no data", where="data.train", remedy="name a file of records with teacher responses")
        records = open_records(config.data.train, config.data, required=("response",))[: config.limit_samples]
        lines = [line for part in runtime.gather_objects(list(_pairs(records, config, opened))) for line in part]
        if not lines:
            raise DataError("no rollout has a valid format", where=config.model.path, remedy="train the policy longer (sft)")
        if runtime.is_main:
            write_atomically(directory / RESULT, "".join(json.dumps(line) + "\n" for line in lines))
        rollouts = len(records) * config.rollout.num_rollouts_per_prompt
        opened.experiment.log_metrics(1, {"pairs": len(lines), "invalid_rollouts": rollouts - len(lines)})
        if runtime.is_main:
            print(
                f"{len(lines)} pairs, {rollouts - len(lines)} rollouts of invalid format left out: {directory / RESULT}",
                flush=True,
            )


def _pairs(records: list[Record], config: PairsConfig, opened: SamplingRun) -> Iterator[dict[str, object]]:
    """This data-parallel rank's pairs, as records in the pairwise form that the readers take."""
    runtime, encoder = opened.runtime, opened.encoder
    mine = records[runtime.data_parallel_rank :: runtime.data_parallel_size]
    assert config.data.train is not None
    root = (Path(config.data.image_root) if config.data.image_root else Path(config.data.train).parent).absolute()
    prompts_at_once = max(1, config.rollout.max_batch_size // config.rollout.num_rollouts_per_prompt)
    for start in range(0, len(mine), prompts_at_once):
        batch = [(record, encoder.encode_prompt(record)) for record in mine[start : start + prompts_at_once]]
        rollouts = sample_rollouts(opened.engine, encoder, batch, config.rollout, seed=config.runtime.seed, step=0)
        for index, text in enumerate(rollouts.texts):
            if rollouts.parsed[index] is None:
                continue
            record = rollouts.record_of(index)
            system = {"system": record.metadata["system"]} if "system" in record.metadata else {}
            yield {
                **system,
                "id": f"{record.id}/{index % config.rollout.num_rollouts_per_prompt}",
                "prompt": record.prompt,
                "images": [_relative(image, record, root) for image in record.images],
                "teacher_response": record.response,
                "student_response": text,
            }


def _relative(image: ImageSource, record: Record, root: Path) -> str:
    """An image's path below the image root, which the warm-up that reads the pairs is given as `data.image_root`."""
    if image.path is None:
        raise DataError(
            "the record's images are inside the data file",
            where=f"record {record.id}",
            remedy="write them to files and give paths",
        )
    return str(image.path.relative_to(root))
