"""Accuracy on held-out prompts: sample responses, compare answers and captions with the truth."""

from __future__ import annotations

from dataclasses import replace

from prism_nemo.config.schema import DataConfig, RolloutConfig
from prism_nemo.data.chat import ChatEncoder
from prism_nemo.data.open import open_records
from prism_nemo.engine.runtime import Runtime
from prism_nemo.engine.step import reduce_metrics
from prism_nemo.errors import ConfigError
from prism_nemo.rollout.base import RolloutEngine
from prism_nemo.rollout.batch import RolloutBatch, sample_rollouts


def sample_validation(
    engine: RolloutEngine,
    encoder: ChatEncoder,
    data: DataConfig,
    rollout: RolloutConfig,
    runtime: Runtime,
    *,
    seed: int,
    limit: int | None,
) -> RolloutBatch:
    """This data-parallel rank's share of responses to `data.validation`, at most `limit` records over all ranks.

    Seeds depend on the run's seed and the record alone, so that two policies are compared on the same random numbers. Raises
    DataError for the first record that cannot be encoded: an evaluation leaves nothing out.
    """
    if data.validation is None:
        raise ConfigError("there is no validation data", where="data.validation", remedy="name a .json, .jsonl or .parquet file")
    records = open_records(data.validation, data, required=())[:limit]
    mine = records[runtime.data_parallel_rank :: runtime.data_parallel_size]
    prompts = [(record, encoder.encode_prompt(record)) for record in mine]
    return sample_rollouts(engine, encoder, prompts, rollout, seed=seed, step=0)


def evaluate(
    engine: RolloutEngine,
    encoder: ChatEncoder,
    data: DataConfig,
    rollout: RolloutConfig,
    runtime: Runtime,
    *,
    seed: int,
    limit: int | None,
) -> dict[str, float]:
    """accuracy, caption_accuracy, format_rate, …: one response per held-out prompt; empty without a file."""
    if data.validation is None:
        return {}
    single = replace(rollout, num_rollouts_per_prompt=1)
    batch = sample_validation(engine, encoder, data, single, runtime, seed=seed, limit=limit)
    return reduce_metrics(batch.metrics(), runtime)
