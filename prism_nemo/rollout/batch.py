"""Rollouts of a batch of prompts: sampled, read as text, measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from prism_nemo.algorithms.metrics import MetricSums, mean_of
from prism_nemo.config.rollout import RolloutConfig
from prism_nemo.data.chat import ChatEncoder
from prism_nemo.data.records import Record
from prism_nemo.packing.groups import EncodedPrompt
from prism_nemo.rewards.format import ParsedResponse, parse_response
from prism_nemo.rewards.registry import Reward
from prism_nemo.rollout.base import FinishReason, Rollout, SamplingParams

_ENDS: dict[str, FinishReason] = {"truncated": "length", "timed_out": "timeout"}


@dataclass(frozen=True, eq=False)
class RolloutBatch:
    """B rollouts, those of a prompt together, prompts in order; a reward is None where there is no verified answer.

    grading   how the answers were decided, as the grader counts it
    """

    records: Sequence[Record]
    prompts: Sequence[EncodedPrompt]
    rollouts: Sequence[Rollout]
    texts: Sequence[str]
    rewards: Sequence[Reward | None]
    grading: MetricSums = field(default_factory=dict)

    @cached_property
    def group_ids(self) -> Tensor:
        """The prompt of every rollout, int64 [B]."""
        return torch.tensor([rollout.prompt_index for rollout in self.rollouts], dtype=torch.int64)

    @cached_property
    def parsed(self) -> list[ParsedResponse | None]:
        """None where the format is invalid."""
        return [parse_response(text) for text in self.texts]

    @cached_property
    def lengths(self) -> Tensor:
        """Tokens, int64 [B]."""
        return torch.tensor([rollout.tokens.numel() for rollout in self.rollouts], dtype=torch.int64)

    def record_of(self, index: int) -> Record:
        return self.records[self.rollouts[index].prompt_index]

    @cached_property
    def correct(self) -> list[float | None]:
        """The share of the verified answer that was found, mostly 0 or 1; None where there is none to match."""
        return [None if reward is None else reward.accuracy for reward in self.rewards]

    @cached_property
    def caption_correct(self) -> list[bool | None]:
        """Whether the caption is the true one, up to white space; None where it is not known."""
        result: list[bool | None] = []
        for index, parsed in enumerate(self.parsed):
            truth = self.record_of(index).caption
            result.append(None if truth is None else parsed is not None and parsed.caption.split() == truth.split())
        return result

    def select(self, prompts: Sequence[int]) -> RolloutBatch:
        """The batch of these prompts alone, in the order given."""
        members = [[index for index, r in enumerate(self.rollouts) if r.prompt_index == prompt] for prompt in prompts]
        order = [index for group in members for index in group]
        place = {prompt: new for new, prompt in enumerate(prompts)}
        return RolloutBatch(
            records=[self.records[prompt] for prompt in prompts],
            prompts=[self.prompts[prompt] for prompt in prompts],
            rollouts=[replace(self.rollouts[i], prompt_index=place[self.rollouts[i].prompt_index]) for i in order],
            texts=[self.texts[i] for i in order],
            rewards=[self.rewards[i] for i in order],
        )

    def metrics(self) -> MetricSums:
        """Accuracy, caption accuracy and format rate, lengths, and how responses ended."""
        known = [value for value in self.correct if value is not None]
        captions = [value for value in self.caption_correct if value is not None]
        valid = [parsed is not None for parsed in self.parsed]
        return {
            "accuracy": (float(sum(known)), float(len(known))),
            "caption_accuracy": (float(sum(captions)), float(len(captions))),
            "format_rate": (float(sum(valid)), float(len(valid))),
            "response_length": mean_of(self.lengths),
            **{name: mean_of(torch.tensor([r.finish_reason == reason for r in self.rollouts])) for name, reason in _ENDS.items()},
        }

    def staleness(self, step: int) -> MetricSums:
        """How many steps the weights that sampled them were behind those that step `step` (from 0) starts from."""
        return {"staleness": mean_of(torch.tensor([step - rollout.weights_version for rollout in self.rollouts]))}

    def samples(self, count: int, columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        """The first rollouts as rows for samples.jsonl, with one value of each column beside the text."""
        return [
            {
                "id": self.record_of(index).id,
                "response": self.texts[index],
                "answer": self.record_of(index).answer,
                "correct": self.correct[index],
                "caption_correct": self.caption_correct[index],
                "valid": self.parsed[index] is not None,
                "tokens": int(self.lengths[index]),
                **{name: values[index] for name, values in columns.items()},
            }
            for index in range(min(count, len(self.texts)))
        ]


def join(batches: Sequence[RolloutBatch]) -> RolloutBatch:
    """The batches' prompts with their rollouts, one batch behind the other."""
    offsets = list(accumulate((len(batch.prompts) for batch in batches), initial=0))
    return RolloutBatch(
        records=[record for batch in batches for record in batch.records],
        prompts=[prompt for batch in batches for prompt in batch.prompts],
        rollouts=[
            replace(rollout, prompt_index=rollout.prompt_index + offset)
            for batch, offset in zip(batches, offsets, strict=False)
            for rollout in batch.rollouts
        ],
        texts=[text for batch in batches for text in batch.texts],
        rewards=[reward for batch in batches for reward in batch.rewards],
    )


def sampling_params(config: RolloutConfig, encoder: ChatEncoder) -> SamplingParams:
    """What the engine needs to know, from the configuration and the tokenizer."""
    return SamplingParams(
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        max_new_tokens=encoder.data.max_response_length,
        end_token_id=encoder.end_token_id,
        banned_token_ids=encoder.banned_token_ids,
        stop_texts=tuple(config.stop),
        time_limit_seconds=config.time_limit_seconds,
    )


def prompts_at_once(config: RolloutConfig) -> int:
    """Prompts whose rollouts are decoded together: to sample so many at a time gives what sampling all in one call gives."""
    return max(1, config.max_batch_size // config.num_rollouts_per_prompt)
