"""Prompts and sampling in vLLM's own words, and what it says in ours."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import vllm
from vllm.inputs.engine import mm_input, tokens_input
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange
from vllm.sampling_params import RequestOutputKind

from prism_nemo.packing.groups import EncodedPrompt
from prism_nemo.rollout.base import FinishReason, Rollout, RolloutError, SamplingParams
from prism_nemo.rollout.vllm.worker import DRAW

_LEAST_BIAS = -100.0  # vLLM's; a token with it has a probability below 1e-40


@dataclass(eq=False)
class Request:
    """One response that is being generated."""

    number: int  # of the rollout in the call
    prompt_index: int
    prompt: EncodedPrompt
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def take(self, output: Any) -> bool:
        """Adds what a step of the engine gave; whether the response has ended. Raises RolloutError for what cannot be one."""
        if output.prompt_token_ids is not None and list(output.prompt_token_ids) != self.prompt.input_ids.tolist():
            raise RolloutError(
                f"vLLM sampled after other tokens than those of prompt {self.prompt_index}", where="rollout.engine"
            )
        (completion,) = output.outputs
        tokens = list(completion.token_ids)
        self.tokens += tokens
        if completion.logprobs is not None:
            self.log_probs += [found[token].logprob for token, found in zip(tokens, completion.logprobs, strict=True)]
            check_finite(self.log_probs[-len(tokens) :])
        if not output.finished:
            return False
        if completion.finish_reason not in ("stop", "length"):
            raise RolloutError(f"vLLM ended a response for the reason {completion.finish_reason!r}", where="rollout.engine")
        self.finish_reason = completion.finish_reason
        return True

    def rollout(self, weights_version: int) -> Rollout:
        log_probs = torch.tensor(self.log_probs, dtype=torch.float32)
        assert self.finish_reason is not None and len(log_probs) == len(self.tokens)
        tokens = torch.tensor(self.tokens, dtype=torch.int64)
        return Rollout(self.prompt_index, tokens, log_probs, self.finish_reason, weights_version)


def check_finite(log_probs: Sequence[float]) -> None:
    """Raises RolloutError where one is not."""
    if not all(map(math.isfinite, log_probs)):
        raise RolloutError(
            "the policy's logits are not finite: there is nothing to sample from",
            where="rollout",
            remedy="look at the loss and gradient norm of the steps before; a lower optimizer.lr or clip_grad helps",
        )


def request_parameters(sampling: SamplingParams, seed: int, draw: int | None) -> Any:
    """A request's sampling in vLLM's own words; `draw`: the key by which `SharedDraws` knows it."""
    common: dict[str, Any] = {
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": [sampling.end_token_id],
        "ignore_eos": True,
        "detokenize": bool(sampling.stop_texts),
        "stop": list(sampling.stop_texts) or None,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "output_kind": RequestOutputKind.DELTA,
    }
    if draw is not None:
        alike = replace(sampling, time_limit_seconds=None)  # what is sampled in one way is drawn in one go
        return vllm.SamplingParams(temperature=0.0, extra_args={DRAW: (draw, seed, alike)}, **common)
    return vllm.SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=seed,
        logprobs=0,
        logit_bias=dict.fromkeys(sampling.banned_token_ids, _LEAST_BIAS) or None,
        **common,
    )


def engine_input(prompt: EncodedPrompt, patches_per_token: int) -> Any:
    """A prompt in vLLM's own words. Videos are their frames: what makes one patch in time is an image.

    Raises RolloutError for image tokens that are not those of the images, and for pixels that are not finite.
    """
    ids = prompt.input_ids.tolist()
    patches = prompt.image_grid_thw.prod(dim=1).tolist()
    ranges = _image_ranges(prompt, [count // patches_per_token for count in patches])
    if not ranges:
        return tokens_input(ids)
    if not bool(prompt.pixel_values.isfinite().all()):
        raise RolloutError("a prompt's pixels are not finite", where="rollout", remedy="look at its images")
    fields = {
        "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", torch.tensor(patches)),
        "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
    }
    data = {"pixel_values": prompt.pixel_values, "image_grid_thw": prompt.image_grid_thw}
    hashes = [
        hashlib.blake2b(f"{grid} {pixels.numel()}".encode() + pixels.numpy().tobytes(), digest_size=16).hexdigest()
        for grid, pixels in zip(prompt.image_grid_thw.tolist(), prompt.pixel_values.split(patches), strict=True)
    ]
    return mm_input(ids, MultiModalKwargsItems.from_hf_inputs(data, fields), {"image": hashes}, {"image": ranges})


def _image_ranges(prompt: EncodedPrompt, lengths: Sequence[int]) -> list[Any]:
    """Where the tokens of every image stand.

    Raises RolloutError when there are more or fewer than its patches make: vLLM would take them without a word.
    """
    places = prompt.image_mask.nonzero().flatten().tolist()
    ranges, first = [], 0
    for length in lengths:
        own = places[first : first + length]
        if len(own) != length or own[-1] - own[0] != length - 1:
            break
        ranges.append(PlaceholderRange(offset=own[0], length=length))
        first += length
    if first != len(places) or len(ranges) != len(lengths):
        raise RolloutError(
            f"the prompt has {len(places)} image tokens, its images make {', '.join(map(str, lengths)) or 'none'}",
            where="rollout",
            remedy="expand every image token exactly once (data/chat.py does)",
        )
    return ranges
