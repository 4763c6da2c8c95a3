"""Rotary embeddings from explicit positions: interleaved MRoPE for text, two axes for vision."""

from __future__ import annotations

import torch
from torch import Tensor


def mrope_cos_sin(position_ids: Tensor, *, head_dim: int, theta: float, section: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Cosine and sine [T, head_dim], fp32, of int64 positions [3, T].

    Frequencies start from the temporal axis; height overwrites every third from 1, width every third from 2, up to three times
    their section (transformers, `Qwen3VLTextRotaryEmbedding`).
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
    inverse_frequency = 1.0 / theta**exponent
    angle = position_ids[..., None].float() * inverse_frequency  # [3, T, head_dim / 2]
    mixed = angle[0].clone()
    for axis in (1, 2):
        columns = slice(axis, section[axis] * 3, 3)
        mixed[:, columns] = angle[axis][:, columns]
    doubled = torch.cat([mixed, mixed], dim=-1)
    return doubled.cos(), doubled.sin()


def vision_cos_sin(rows: Tensor, columns: Tensor, *, head_dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine [P, head_dim], fp32, of P patches at int64 rows and columns."""
    half = head_dim // 2
    inverse_frequency = 1.0 / theta ** (torch.arange(0, half, 2, dtype=torch.float32, device=rows.device) / half)
    angle = torch.cat([rows[:, None] * inverse_frequency, columns[:, None] * inverse_frequency], dim=-1)
    doubled = torch.cat([angle, angle], dim=-1)
    return doubled.cos(), doubled.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates heads [T, heads, D] by cos, sin [T, D], in the precision of cos; the result has x's dtype."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)
