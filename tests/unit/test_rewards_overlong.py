"""DAPO's overlong penalty, by hand and against the formula."""

from __future__ import annotations

import pytest
import torch

from prism_nemo.rewards.overlong import overlong_penalty


def test_by_hand() -> None:
    lengths = torch.tensor([1, 4096, 4097, 6144, 8192])
    penalty = overlong_penalty(lengths, max_response_length=8192, buffer_length=4096, factor=1.0)
    assert penalty.dtype == torch.float32
    assert penalty.tolist() == [0.0, 0.0, -1 / 4096, -0.5, -1.0]
    assert torch.equal(overlong_penalty(lengths, max_response_length=8192, buffer_length=4096, factor=0.5), penalty / 2)


def test_against_the_formula() -> None:
    for length in range(1, 101):
        expected = min(-(length - (100 - 30)) / 30, 0) * 2.0
        penalty = overlong_penalty(torch.tensor([length]), max_response_length=100, buffer_length=30, factor=2.0)
        assert penalty.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("buffer", [0, -1, 101])
def test_the_buffer_must_fit(buffer: int) -> None:
    with pytest.raises(ValueError, match="buffer_length"):
        overlong_penalty(torch.tensor([1]), max_response_length=100, buffer_length=buffer, factor=1.0)
