"""Which groups a step trains on: dynamic sampling over scripted grades, and the batches that it cuts and joins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.rows import one_rank
from helpers.tiny import make_prompt

from prism_nemo.algorithms.metrics import finalize
from prism_nemo.config.compose import load_config
from prism_nemo.data.records import Record
from prism_nemo.errors import DataError
from prism_nemo.rewards.registry import Reward
from prism_nemo.rollout.base import Rollout
from prism_nemo.rollout.batch import RolloutBatch, join
from prism_nemo.rollout.groups import GroupSampler, has_signal
from prism_nemo.rollout.sampler import PendingRollouts

RIGHT, WRONG, SIGNAL = (1.0, 1.0), (0.0, 0.0), (1.0, 0.0)


def batch_of(groups: Sequence[tuple[str, tuple[float, ...]]]) -> RolloutBatch:
    """One prompt a group, named; every rollout has as many tokens as it has predecessors in the batch, and one more."""
    rollouts, rewards = [], []
    for number, (_, accuracies) in enumerate(groups):
        for accuracy in accuracies:
            tokens = torch.arange(len(rollouts) + 1)
            rollouts.append(Rollout(number, tokens, -tokens.float(), "stop", 0))
            rewards.append(Reward(0.8 * accuracy + 0.2, accuracy, 1.0))
    records = [Record(name, "", answer="1") for name, _ in groups]
    prompts = [make_prompt((), seed=number, text_length=3) for number in range(len(groups))]
    return RolloutBatch(records, prompts, rollouts, [f"text {index}" for index in range(len(rollouts))], rewards)


class Script:
    """A sampler that gives what is written down, and writes down what is asked of it."""

    def __init__(self, batches: Sequence[Sequence[tuple[str, tuple[float, ...]]]]) -> None:
        self.batches = [batch_of(groups) for groups in batches]
        self.runtime = one_rank()
        self.events: list[str] = []

    def draw(self) -> tuple[list[Any], list[int]]:
        return [], []

    def begin(self, batch: Any, config: Any, *, step: int, attempt: int = 0, given: None = None) -> PendingRollouts:
        self.events.append(f"sample {attempt}")
        script = self

        class Pending:
            def result(self) -> RolloutBatch:
                script.events.append(f"grades {attempt}")
                return script.batches[attempt]

        return Pending()  # type: ignore[return-value]


def sampler_of(script: Script, *overrides: str) -> GroupSampler:
    config = load_config(
        "rlvr",
        [
            "model.path=x",
            "data.train=x",
            "experiment.dir=x",
            "algorithm=dapo",
            "trainer.max_steps=1",
            "trainer.global_batch_size=4",
            *overrides,
        ],
    )
    return GroupSampler(script, config)  # type: ignore[arg-type]


def names(batch: RolloutBatch) -> list[str]:
    return [record.id for record in batch.records]


def test_groups_without_signal_are_replaced() -> None:
    script = Script(
        [
            [("a", SIGNAL), ("b", RIGHT), ("c", WRONG), ("d", SIGNAL)],
            [("e", WRONG), ("f", SIGNAL), ("g", SIGNAL), ("h", SIGNAL)],
        ]
    )
    sampled = sampler_of(script).sample(script.draw, step=0)
    assert script.events == ["sample 0", "grades 0", "sample 1", "grades 1"]
    assert set(names(sampled.rollouts)[:2]) == {"a", "d"}  # those of the first generation batch come first
    assert set(names(sampled.rollouts)[2:]) < {"f", "g", "h"}
    assert all(has_signal(sampled.rollouts, prompt) for prompt in range(4))
    metrics = finalize(sampled.metrics)
    assert metrics["groups_with_signal"] == 5 / 8
    assert metrics["dynamic_sampling/generation_batches"] == 2
    assert metrics["dynamic_sampling/surplus_groups"] == 1
    assert metrics["dynamic_sampling/all_right"] == 1 / 8
    assert metrics["accuracy"] == (2 * 1 + 2 + 3 * 1) / 16  # of all that was sampled: not of the groups that were kept


def test_the_next_batch_is_sampled_while_the_last_is_graded() -> None:
    """With one signal in four more than one batch will be needed: the next is sampled before the last one's grades are taken."""
    one, full = [("a", SIGNAL), ("b", RIGHT), ("c", WRONG), ("d", WRONG)], [(name, SIGNAL) for name in "efgh"]
    script = Script([one, one, full, full])
    sampled = sampler_of(script).sample(script.draw, step=0)
    assert script.events == ["sample 0", "grades 0", "sample 1", "sample 2", "grades 1", "sample 3", "grades 2", "grades 3"]
    assert len(sampled.rollouts.prompts) == 4
    assert names(sampled.rollouts)[:2] == ["a", "a"]


def test_smaller_generation_batches() -> None:
    script = Script(
        [
            [("a", SIGNAL), ("b", RIGHT)],
            [("c", SIGNAL), ("d", SIGNAL)],
            [("e", SIGNAL), ("f", WRONG)],
        ]
    )
    sampled = sampler_of(script, "algorithm.generation_batch_size=2").sample(script.draw, step=0)
    assert sorted(names(sampled.rollouts)) == ["a", "c", "d", "e"]
    assert script.events == ["sample 0", "sample 1", "grades 0", "sample 2", "grades 1", "grades 2"]


def test_a_bad_beginning_does_not_draw_everything() -> None:
    """No signal in the first batch says that none will do; two are under way at most, and the third is full."""
    script = Script([[(name, WRONG) for name in "abcd"], *([(name, SIGNAL) for name in "efgh"] for _ in range(9))])
    sampled = sampler_of(script).sample(script.draw, step=0)
    assert script.events == ["sample 0", "grades 0", "sample 1", "sample 2", "grades 1", "grades 2"]
    assert sampled.positions == range(4)


@pytest.mark.parametrize(("accuracies", "remedy"), [(RIGHT, "harder"), (WRONG, "easier")])
def test_exhaustion_says_what_to_change(accuracies: tuple[float, ...], remedy: str) -> None:
    script = Script([[(name, accuracies) for name in "abcd"]] * 3)
    with pytest.raises(DataError, match="3 generation batches of 4 prompts gave 0 groups") as caught:
        sampler_of(script, "algorithm.max_generation_batches=3").sample(script.draw, step=0)
    assert caught.value.remedy is not None
    assert f"train on {remedy} prompts" in caught.value.remedy
    assert "algorithm.max_generation_batches" in caught.value.remedy


def test_the_order_of_groups_does_not_depend_on_the_order_of_prompts() -> None:
    groups = [(name, SIGNAL) for name in "abcdef"]
    found = []
    for order in (groups, groups[::-1]):
        script = Script([order])
        found.append(names(sampler_of(script, "algorithm.generation_batch_size=6").sample(script.draw, step=3).rollouts))
    assert found[0] == found[1]
    assert len(found[0]) == 4


def test_select_and_join() -> None:
    batch = batch_of([("a", (1.0, 0.0)), ("b", (0.0,)), ("c", (1.0, 1.0, 0.0))])
    assert [float(value) for value in batch.lengths] == [1, 2, 3, 4, 5, 6]
    picked = batch.select([2, 0])
    assert names(picked) == ["c", "a"]
    assert picked.lengths.tolist() == [4, 5, 6, 1, 2]
    assert picked.group_ids.tolist() == [0, 0, 0, 1, 1]
    assert picked.texts == ["text 3", "text 4", "text 5", "text 0", "text 1"]
    assert [reward.accuracy for reward in picked.rewards if reward] == [1.0, 1.0, 0.0, 1.0, 0.0]
    assert torch.equal(picked.prompts[0].input_ids, batch.prompts[2].input_ids)
    whole = join([batch.select([0]), batch.select([]), batch.select([1, 2])])
    assert (names(whole), whole.group_ids.tolist()) == (names(batch), batch.group_ids.tolist())
    assert whole.texts == batch.texts
    assert join([]).prompts == []
