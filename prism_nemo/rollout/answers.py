"""Whether what a rollout server sent can be the answer to what it was asked. Nothing of it is believed."""

from __future__ import annotations

from dataclasses import replace

import torch

from prism_nemo.rollout.base import Rollout
from prism_nemo.rollout.wire import GenerateRequest, WireError, decode_answer, digest_of

_ROUNDING = 1e-6  # by which a log-probability may exceed 0
_BYTES_PER_TOKEN = 8  # int32 and float32
_BYTES_PER_ROLLOUT, _BYTES_AROUND = 256, 1 << 16


def max_answer_bytes(request: GenerateRequest) -> int:
    """No answer to the request is longer."""
    return request.num_rollouts * (request.sampling.max_new_tokens * _BYTES_PER_TOKEN + _BYTES_PER_ROLLOUT) + _BYTES_AROUND


def read_answer(request: GenerateRequest, body: bytes, *, version: int, vocab_size: int) -> list[Rollout]:
    """The rollouts of `request`, each sampled from weights of `version`. Raises WireError, which says what is wrong with them."""
    answer = decode_answer(body)
    if answer.request_id != request.request_id:
        raise WireError(f"the answer is to request {answer.request_id[:60]!r}, not to {request.request_id!r}")
    if answer.update_id != request.update_id:
        raise WireError("the answer is of other weights")
    if answer.prompts_digest != digest_of(request.prompts):
        raise WireError("the answer is to other prompts")
    if len(answer.rollouts) != request.num_rollouts:
        raise WireError(f"there are {len(answer.rollouts)} rollouts, {request.num_rollouts} were asked for")
    banned = torch.tensor(request.sampling.banned_token_ids, dtype=torch.int64)
    checked = []
    for number, rollout in enumerate(answer.rollouts):
        problem = _problem(rollout, number, request, version, vocab_size, banned)
        if problem is not None:
            raise WireError(f"rollout {number}: {problem}")
        checked.append(replace(rollout, tokens=rollout.tokens.clone(), log_probs=rollout.log_probs.clone()))
    return checked


def _problem(
    rollout: Rollout, number: int, request: GenerateRequest, version: int, vocab_size: int, banned: torch.Tensor
) -> str | None:
    sampling, tokens, log_probs = request.sampling, rollout.tokens, rollout.log_probs
    if rollout.prompt_index != number // request.num_rollouts_per_prompt:
        return f"it is of prompt {rollout.prompt_index}"
    if rollout.weights_version != version:
        return f"it is of version {rollout.weights_version} of the weights, the server was given {version}"
    if not 1 <= tokens.numel() <= sampling.max_new_tokens:
        return f"it has {tokens.numel()} tokens, at most {sampling.max_new_tokens} were asked for"
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size:
        return f"its tokens lie between {int(tokens.min())} and {int(tokens.max())}, the vocabulary has {vocab_size}"
    if bool(torch.isin(tokens, banned).any()):
        return "it has tokens that may not be sampled"
    if not bool(log_probs.isfinite().all()) or float(log_probs.max()) > _ROUNDING:
        return "its log-probabilities are none"
    ended = int(tokens[-1]) == sampling.end_token_id
    if bool((tokens[:-1] == sampling.end_token_id).any()):
        return "it goes on behind its end"
    if rollout.finish_reason not in ("stop", "length", "timeout"):
        return f"it ended for the reason {rollout.finish_reason!r:.60}"
    by_text = rollout.finish_reason == "stop" and bool(sampling.stop_texts)
    if (rollout.finish_reason == "stop") != ended and not by_text and not (ended and tokens.numel() == sampling.max_new_tokens):
        return f"it ended for the reason {rollout.finish_reason!r}, and its last token {'is' if ended else 'is not'} the end"
    if rollout.finish_reason == "length" and tokens.numel() != sampling.max_new_tokens:
        return f"it was cut at {tokens.numel()} tokens, the limit is {sampling.max_new_tokens}"
    if rollout.finish_reason == "timeout" and sampling.time_limit_seconds is None:
        return "it ran out of time, and there is no limit"
    return None
