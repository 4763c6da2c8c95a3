"""What travels between a run and its rollout servers: requests for rollouts, and the rollouts.

A body is four bytes of length, a JSON header of that length, and tensors as safetensors; nothing is ever unpickled. What cannot
be read raises WireError. Answers are checked against their request by `rollout/answers.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from prism_nemo.packing.groups import EncodedPrompt
from prism_nemo.rollout.base import Rollout, SamplingParams
from prism_nemo.rollout.pixels import pack_pixels, unpack_pixels

LENGTH_BYTES = 4
MAX_HEADER_BYTES = 16 << 20


class WireError(Exception):
    """A body that is not what it should be."""


@dataclass(frozen=True, eq=False)
class GenerateRequest:
    """`num_rollouts_per_prompt` responses to every prompt, sampled from the weights of one update.

    request_id   comes back with the answer
    update_id    of the weights (see `rollout/weight_sync.py`): versions of two runs may be equal, this is not
    seeds        one for every rollout, those of a prompt together, each of 64 bits without a sign
    """

    request_id: str
    update_id: str
    prompts: Sequence[EncodedPrompt]
    sampling: SamplingParams
    num_rollouts_per_prompt: int
    seeds: Sequence[int]

    @property
    def num_rollouts(self) -> int:
        return len(self.prompts) * self.num_rollouts_per_prompt


@dataclass(frozen=True, eq=False)
class GenerateAnswer:
    """Rollouts as a server sent them, not checked but for their form.

    prompts_digest   `digest_of` the prompts that the server sampled after
    """

    request_id: str
    update_id: str
    prompts_digest: str
    rollouts: list[Rollout]


def pack(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """A body."""
    return pack_header(header) + safetensors.torch.save(dict(tensors))


def unpack(body: bytes | bytearray) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a body. Raises WireError."""
    header, rest = unpack_header(body)
    try:
        return header, safetensors.torch.load(bytes(rest))
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise WireError(f"the tensors cannot be read: {error}") from error


def pack_header(header: Mapping[str, Any]) -> bytes:
    """The start of a body whose rest is raw bytes."""
    text = json.dumps(header, allow_nan=False).encode()
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def unpack_header(body: bytes | bytearray) -> tuple[dict[str, Any], memoryview]:
    """The header of a body and the rest of its bytes, in place. Raises WireError."""
    length = int.from_bytes(body[:LENGTH_BYTES], "little")
    if len(body) < LENGTH_BYTES or length > min(len(body) - LENGTH_BYTES, MAX_HEADER_BYTES):
        raise WireError(f"a body of {len(body)} bytes is cut short")
    header = parse_header(bytes(body[LENGTH_BYTES : LENGTH_BYTES + length]))
    return header, memoryview(body)[LENGTH_BYTES + length :]


def parse_header(text: bytes) -> dict[str, Any]:
    """A header's object. Raises WireError."""
    try:
        header = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the header is no JSON: {error}") from error
    if not isinstance(header, dict):
        raise WireError("the header is no JSON object")
    return header


def encode_request(request: GenerateRequest) -> bytes:
    tensors: dict[str, Tensor] = {}
    for index, prompt in enumerate(request.prompts):
        parts = {
            "input_ids": prompt.input_ids,
            "position_ids": prompt.position_ids,
            "image_mask": prompt.image_mask,
            "image_grid_thw": prompt.image_grid_thw,
            **pack_pixels(prompt.pixel_values),
        }
        tensors |= {f"{index}.{name}": tensor.contiguous() for name, tensor in parts.items()}
    header = {
        "request_id": request.request_id,
        "update_id": request.update_id,
        "sampling": asdict(request.sampling),
        "num_prompts": len(request.prompts),
        "num_rollouts_per_prompt": request.num_rollouts_per_prompt,
        "seeds": list(request.seeds),
    }
    return pack(header, tensors)


def decode_request(body: bytes | bytearray) -> GenerateRequest:
    """Raises WireError for what no run sends."""
    header, tensors = unpack(body)
    try:
        sampling = dict(header["sampling"])
        sampling["banned_token_ids"] = tuple(map(int, sampling["banned_token_ids"]))
        sampling["stop_texts"] = tuple(map(str, sampling["stop_texts"]))
        request = GenerateRequest(
            request_id=str(header["request_id"]),
            update_id=str(header["update_id"]),
            prompts=[_prompt(tensors, index) for index in range(header["num_prompts"])],
            sampling=SamplingParams(**sampling),
            num_rollouts_per_prompt=int(header["num_rollouts_per_prompt"]),
            seeds=[int(seed) for seed in header["seeds"]],
        )
    except (KeyError, TypeError, ValueError, ArithmeticError, RuntimeError, AssertionError) as error:
        raise WireError(f"not a request for rollouts: {error!r}") from error
    in_range = all(0 <= seed < 2**64 for seed in request.seeds)
    if not request.prompts or request.num_rollouts_per_prompt < 1 or len(request.seeds) != request.num_rollouts or not in_range:
        raise WireError("there are not as many seeds as rollouts, or they are out of range")
    return request


def _prompt(tensors: Mapping[str, Tensor], index: int) -> EncodedPrompt:
    own = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.startswith(f"{index}.")}
    prompt = EncodedPrompt(own["input_ids"], own["position_ids"], own["image_mask"], unpack_pixels(own), own["image_grid_thw"])
    length = prompt.input_ids.numel()
    shapes = {
        "input_ids": (prompt.input_ids, torch.int64, (length,)),
        "position_ids": (prompt.position_ids, torch.int64, (3, length)),
        "image_mask": (prompt.image_mask, torch.bool, (length,)),
        "image_grid_thw": (prompt.image_grid_thw, torch.int64, (prompt.image_grid_thw.shape[0], 3)),
    }
    wrong = [name for name, (tensor, dtype, shape) in shapes.items() if tensor.dtype != dtype or tuple(tensor.shape) != shape]
    if wrong or length == 0 or prompt.image_grid_thw.prod(dim=1).sum() != prompt.pixel_values.shape[0]:
        raise ValueError(f"prompt {index} has wrong {', '.join(wrong) or 'sizes'}")
    return prompt


def digest_of(prompts: Sequence[EncodedPrompt]) -> str:
    """Tells prompts apart by their tokens, positions and grids. (Their pixels are long, and cost as much again to read.)"""
    digest = hashlib.blake2b(digest_size=16)
    for prompt in prompts:
        for tensor in (prompt.input_ids, prompt.position_ids, prompt.image_grid_thw):
            digest.update(f"{tuple(tensor.shape)}".encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def encode_answer(request: GenerateRequest, rollouts: Sequence[Rollout]) -> bytes:
    """The rollouts of a request, as they are: it is the run that judges them."""
    header = {
        "request_id": request.request_id,
        "update_id": request.update_id,
        "prompts_digest": digest_of(request.prompts),
        "prompt_index": [rollout.prompt_index for rollout in rollouts],
        "weights_version": [rollout.weights_version for rollout in rollouts],
        "finish_reason": [rollout.finish_reason for rollout in rollouts],
    }
    tensors = {
        "tokens": torch.cat([torch.zeros(0, dtype=torch.int32), *(rollout.tokens.to(torch.int32) for rollout in rollouts)]),
        "log_probs": torch.cat([torch.zeros(0), *(rollout.log_probs for rollout in rollouts)]),
        "lengths": torch.tensor([rollout.tokens.numel() for rollout in rollouts], dtype=torch.int64),
    }
    return pack(header, tensors)


def decode_answer(body: bytes | bytearray) -> GenerateAnswer:
    """Raises WireError for what is no answer at all."""
    header, tensors = unpack(body)
    try:
        lengths = tensors["lengths"].tolist()
        if min(lengths, default=0) < 0:
            raise ValueError("a length below 0")
        columns = [header[name] for name in ("prompt_index", "finish_reason", "weights_version")]
        tokens, log_probs = tensors["tokens"], tensors["log_probs"]
        if (tokens.dtype, log_probs.dtype) != (torch.int32, torch.float32) or tokens.dim() != 1 or log_probs.dim() != 1:
            raise ValueError("tokens or log-probabilities of a wrong type")
        parts = zip(*columns, tokens.long().split(lengths), log_probs.split(lengths), strict=True)
        return GenerateAnswer(
            request_id=str(header["request_id"]),
            update_id=str(header["update_id"]),
            prompts_digest=str(header["prompts_digest"]),
            rollouts=[
                Rollout(_whole(index), own_tokens, own_log_probs, reason, _whole(version))
                for index, reason, version, own_tokens, own_log_probs in parts
            ],
        )
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise WireError(f"not rollouts: {error!r}") from error


def _whole(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
