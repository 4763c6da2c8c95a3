"""DAPO's penalty for responses that come close to the length limit."""

from __future__ import annotations

from torch import Tensor


def overlong_penalty(lengths: Tensor, *, max_response_length: int, buffer_length: int, factor: float) -> Tensor:
    """`min(-(length - (max_response_length - buffer_length)) / buffer_length, 0) * factor`, float32 [batch].

    0 up to `max_response_length - buffer_length` tokens, then falling linearly to `-factor` at the limit. Added to the reward.

    lengths integer [batch], response tokens. Raises ValueError when the buffer is not within 1 .. max_response_length.
    """
    if not 1 <= buffer_length <= max_response_length:
        raise ValueError(f"buffer_length must be within 1 .. {max_response_length}, it is {buffer_length}")
    excess = lengths.float() - (max_response_length - buffer_length)
    return (-excess / buffer_length).clamp(max=0.0) * factor
