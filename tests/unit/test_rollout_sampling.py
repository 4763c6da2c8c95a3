"""Seeds, uniform numbers and the sampler, against whole-number arithmetic, hand-made distributions and transformers' warpers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from prism_nemo.config.enums import RolloutEngineKind
from prism_nemo.config.rollout import RolloutConfig
from prism_nemo.errors import ConfigError
from prism_nemo.rollout.base import SamplingParams, rollout_seed, with_engine
from prism_nemo.rollout.sampling import Sampler, uniforms

CPU = torch.device("cpu")
PROBABILITIES = (0.15, 0.5, 0.05, 0.3)


def params(*, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, banned: Sequence[int] = ()) -> SamplingParams:
    return SamplingParams(temperature, top_p, top_k, max_new_tokens=1, end_token_id=0, banned_token_ids=tuple(banned))


def draw(probabilities: Sequence[float], uniform: Sequence[float] | Tensor, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
    """One draw for every uniform number, from logits that are log-probabilities plus a constant."""
    uniform = torch.as_tensor(uniform, dtype=torch.float64)
    logits = torch.tensor(probabilities).log() + 7.0
    return Sampler(sampling, CPU)(logits.repeat(len(uniform), 1), uniform)


def shares(sampling: SamplingParams) -> list[float]:
    """How often each of PROBABILITIES' tokens is drawn when the uniform numbers are spread evenly; exact to 1e-4."""
    uniform = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    token, log_prob = draw(PROBABILITIES, uniform, sampling)
    counts = token.bincount(minlength=4) / 10_000
    if sampling.temperature > 0:  # the log-probabilities are those of the distribution that was drawn from
        torch.testing.assert_close(log_prob.exp(), counts[token], atol=2e-4, rtol=0)
    return counts.tolist()


class SplitMix64:
    """The published generator, in unbounded integers."""

    def __init__(self, seed: int) -> None:
        self.state = seed

    def next(self) -> int:
        self.state = (self.state + 0x9E3779B97F4A7C15) % 2**64
        z = self.state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)


def test_uniforms_are_split_mix_streams() -> None:
    published = SplitMix64(1234567)
    assert [published.next() for _ in range(3)] == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    seeds = [0, 1, 2**63 - 1, 0x123456789ABCDEF]
    expected = []
    for seed in seeds:
        stream = SplitMix64(SplitMix64(seed).next())
        expected.append([(stream.next() >> 11) / 2**53 for _ in range(5)])
    found = np.stack([uniforms(np.array(seeds, dtype=np.uint64), position) for position in range(5)], axis=1)
    assert found.tolist() == expected


def test_uniforms_far_into_a_stream_and_without_warnings() -> None:
    seed = 99
    stream = SplitMix64(SplitMix64(seed).next())
    values = [stream.next() for _ in range(3001)]
    with np.errstate(all="raise"):
        assert uniforms(np.array([seed], dtype=np.uint64), 3000)[0] == (values[3000] >> 11) / 2**53


def test_uniforms_of_neighbouring_seeds_are_uniform_and_unrelated() -> None:
    seeds = np.arange(20_000, dtype=np.uint64)
    first, second = uniforms(seeds, 0), uniforms(seeds, 1)
    for values in (first, second):
        counts = np.histogram(values, bins=20, range=(0, 1))[0]
        assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001
    for left, right in ((first, second), (first[1:], first[:-1]), (first[1:], second[:-1])):
        assert abs(np.corrcoef(left, right)[0, 1]) < 5 / math.sqrt(len(left))


def test_rollout_seed_is_fixed_and_tells_everything_apart() -> None:
    assert rollout_seed(1234, 0, "a", 0) == 0x4D283B759946FC9D >> 1  # `printf "1234 0 0 a" | b2sum -l 64`
    seeds = [
        rollout_seed(run, step, key, index)
        for run in (0, 1)
        for step in (0, 1, 10)
        for key in ("0", "1 0", "a")
        for index in range(12)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_inverse_of_the_cumulative_sum_on_known_numbers() -> None:
    # cumulative sums .15, .65, .70, 1
    token, log_prob = draw(PROBABILITIES, [0.0, 0.1499, 0.1501, 0.6499, 0.6501, 0.6999, 0.7001, 1 - 2**-53], params())
    assert token.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    expected = torch.tensor([math.log(PROBABILITIES[index]) for index in token.tolist()])
    torch.testing.assert_close(log_prob, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (params(), [0.15, 0.5, 0.05, 0.3]),
        # p^(1/2) / sum: .3873, .7071, .2236, .5477, sum 1.8657
        (params(temperature=2.0), [0.2076, 0.3790, 0.1198, 0.2936]),
        # p^2 / sum: .0225, .25, .0025, .09, sum .365
        (params(temperature=0.5), [0.0616, 0.6849, 0.0068, 0.2466]),
        (params(banned=[1]), [0.3, 0.0, 0.1, 0.6]),
        (params(top_k=2), [0.0, 0.625, 0.0, 0.375]),
        (params(top_k=9), [0.15, 0.5, 0.05, 0.3]),
        (params(top_p=0.3), [0.0, 1.0, 0.0, 0.0]),
        (params(top_p=0.79), [0.0, 0.625, 0.0, 0.375]),
        (params(top_p=0.81), [0.1579, 0.5263, 0.0, 0.3158]),
        # top-p looks at what top-k leaves (.625, .375), so .6 is reached by the first
        (params(top_k=2, top_p=0.6), [0.0, 1.0, 0.0, 0.0]),
        (params(top_p=0.6), [0.0, 0.625, 0.0, 0.375]),
        # top-p looks at tempered probabilities: at temperature 2 the first two have .6726
        (params(temperature=2.0, top_p=0.7), [0.2358, 0.4306, 0.0, 0.3336]),
        (params(banned=[1], top_k=2), [0.3333, 0.0, 0.0, 0.6667]),
    ],
)
def test_shares_worked_out_by_hand(sampling: SamplingParams, expected: list[float]) -> None:
    assert shares(sampling) == pytest.approx(expected, abs=2e-4)


def test_greedy_takes_the_likeliest_that_is_allowed_and_says_its_untempered_probability() -> None:
    token, log_prob = draw(PROBABILITIES, [0.99], params(temperature=0.0, top_p=0.5, top_k=1))
    assert token.tolist() == [1]
    assert log_prob.item() == pytest.approx(math.log(0.5), abs=1e-6)
    token, log_prob = draw(PROBABILITIES, [0.0], params(temperature=0.0, banned=[1]))
    assert token.tolist() == [3]
    assert log_prob.item() == pytest.approx(math.log(0.6), abs=1e-6)


def test_no_uniform_number_reaches_a_token_without_probability() -> None:
    """Neither end of the vocabulary, nor the rounding of a sum over many tokens."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 1000, generator=generator) * 4
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64).repeat(100)
    banned = [0, 1, 998, 999]
    token, log_prob = Sampler(params(banned=banned), CPU)(logits, uniform)
    assert not torch.isin(token, torch.tensor(banned)).any()
    assert log_prob.isfinite().all()
    assert set(token.tolist()) >= {2, 997}  # the ends of what is allowed are reached


def test_top_k_and_top_p_leave_what_transformers_leaves() -> None:
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(1)) * 3
    for temperature, top_k, top_p in ((1.0, 20, 1.0), (1.3, 0, 0.9), (0.6, 40, 0.8), (2.0, 100, 0.5)):
        expected = TemperatureLogitsWarper(temperature)(None, logits)
        expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
        expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
        sampler = Sampler(params(temperature=temperature, top_k=top_k, top_p=top_p), CPU)
        uniform = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        token, log_prob = sampler(logits.clone(), uniform)
        probability = expected.double().softmax(dim=-1)
        below = probability.cumsum(dim=-1).gather(1, token[:, None]).squeeze(1)
        drawn = probability.gather(1, token[:, None]).squeeze(1)
        assert ((below - drawn - 1e-6 <= uniform) & (uniform <= below + 1e-6)).all()
        torch.testing.assert_close(log_prob.double(), drawn.log(), atol=1e-5, rtol=0)
        assert (expected.isinf().sum(dim=-1) > 0).all()  # something was cut


def test_nan_logits_give_nan_and_a_token_of_the_vocabulary() -> None:
    logits = torch.full((1, 5), float("nan"))
    token, log_prob = Sampler(params(), CPU)(logits, torch.tensor([0.5], dtype=torch.float64))
    assert 0 <= token.item() < 5
    assert log_prob.isnan().all()


@pytest.mark.parametrize(
    ("device", "installed", "expected"),
    [("cuda", True, "vllm"), ("cuda", False, "megatron"), ("cpu", True, "megatron"), ("cpu", False, "megatron")],
)
def test_the_engine_that_auto_stands_for(device: str, installed: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed and name == "vllm" else None)
    assert with_engine(RolloutConfig(), torch.device(device), 1).engine.value == expected
    for named in (RolloutEngineKind.megatron, RolloutEngineKind.vllm):
        assert with_engine(RolloutConfig(engine=named), torch.device(device), 1).engine is named


def test_auto_is_checked_for_what_it_stands_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    for temperature in (2.5, 0.005):
        config = RolloutConfig(temperature=temperature)
        assert with_engine(config, torch.device("cpu"), 1).temperature == temperature
        with pytest.raises(ConfigError, match=r"vLLM samples at 0 and at temperatures from 0\.01 to 2"):
            with_engine(config, torch.device("cuda"), 1)
    for temperature in (0.0, 0.01, 2.0):
        assert with_engine(RolloutConfig(temperature=temperature), torch.device("cuda"), 1).engine is RolloutEngineKind.vllm
