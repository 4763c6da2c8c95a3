"""Accuracy on held-out prompts: sample responses, compare answers and captions with the truth."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace

from prism_nemo.algorithms.metrics import MetricSums, merge
from prism_nemo.config.enums import Benchmark
from prism_nemo.config.schema import DataConfig, RolloutConfig
from prism_nemo.data.records import Record
from prism_nemo.engine.step import reduce_metrics
from prism_nemo.evaluation.held_out import open_held_out
from prism_nemo.packing.groups import EncodedPrompt
from prism_nemo.rewards.grader import check_answer
from prism_nemo.rollout.batch import RolloutBatch, prompts_at_once
from prism_nemo.rollout.sampler import Sampler


class HeldOutPrompts:
    """The prompts of `data.validation`, at most `limit` over all ranks, and a policy's responses to them.

    Seeds depend on the run's seed and the record alone, so that two policies are compared on the same random numbers. Raises
    DataError for records that cannot be used (see `open_held_out`).
    """

    def __init__(self, sampler: Sampler, data: DataConfig, *, limit: int | None, benchmark: Benchmark | None = None) -> None:
        self.sampler = sampler
        self.runtime = sampler.runtime
        self.records = open_held_out(data, self._encode, self.runtime, limit=limit, benchmark=benchmark)

    def sample(self, rollout: RolloutConfig, *, done: Collection[int] = ()) -> Iterator[tuple[list[int], RolloutBatch]]:
        """Responses to this data-parallel rank's prompts, as many at a time as are decoded together, and the prompts' numbers.

        Numbers are those of all ranks' records; `done`, the same on every rank, are left out. Every rank gets as many batches,
        some of them without prompts perhaps. A collective.
        """
        records, at_once = self.records.all, prompts_at_once(rollout)
        left = [number for number in range(len(records)) if number not in done]
        mine = left[self.runtime.data_parallel_rank :: self.runtime.data_parallel_size]
        batches = self.runtime.max_over_data_parallel(-(-len(mine) // at_once))
        for start in range(0, batches * at_once, at_once):
            numbers = mine[start : start + at_once]
            prompts = [(records[number], self._encode(records[number])) for number in numbers]
            yield numbers, self.sampler.sample(prompts, rollout, step=0)

    def accuracy(self, rollout: RolloutConfig) -> dict[str, float]:
        """accuracy, caption_accuracy, format_rate, …: one response per prompt; empty without a validation file."""
        sums: MetricSums = {}
        if self.records.total:
            for _, batch in self.sample(replace(rollout, num_rollouts_per_prompt=1)):
                sums = merge(sums, batch.metrics())
        return reduce_metrics(sums, self.runtime)

    def _encode(self, record: Record) -> EncodedPrompt:
        if record.answer is not None:
            check_answer(record)
        return self.sampler.encoder.encode_prompt(record)
