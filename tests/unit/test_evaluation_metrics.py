"""The figures of an evaluation, against numbers worked out by hand and against brute force."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from helpers.evaluations import answered, sample, voting

from prism_nemo.config.schema import RewardConfig
from prism_nemo.evaluation.metrics import (
    bootstrap_intervals,
    majority,
    means,
    pass_at_k,
    powers_of_two,
    prompt_figures,
    token_f1,
)
from prism_nemo.evaluation.samples import by_category, category_of
from prism_nemo.evaluation.summary import scalars, summarize
from prism_nemo.evaluation.votes import votes_of
from prism_nemo.rewards.question import Question
from prism_nemo.rewards.verifier import Verifier


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(4, 1, 1) == 0.25
    assert pass_at_k(4, 1, 2) == 0.5  # 3 of the 6 pairs hold the right one
    assert pass_at_k(4, 2, 2) == pytest.approx(5 / 6)
    assert pass_at_k(4, 4, 1) == 1.0
    assert pass_at_k(4, 0, 4) == 0.0
    assert pass_at_k(4, 1, 4) == 1.0


@pytest.mark.parametrize("num_samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_response(num_samples: int) -> None:
    for solved in range(num_samples + 1):
        outcomes = [True] * solved + [False] * (num_samples - solved)
        for k in range(1, num_samples + 1):
            subsets = list(itertools.combinations(outcomes, k))
            assert pass_at_k(num_samples, solved, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_of_many_responses_does_not_overflow() -> None:
    assert 0.99 < pass_at_k(10_000, 100, 1000) < 1


def test_powers_of_two_end_with_the_number_itself() -> None:
    assert powers_of_two(1) == [1]
    assert powers_of_two(4) == [1, 2, 4]
    assert powers_of_two(6) == [1, 2, 4, 6]


def test_the_majority_counts_votes() -> None:
    votes = voting(sample("a", 0), sample("b", 1), sample("b", 1), sample(None))
    assert majority(votes) is votes[1]


def test_of_equally_many_votes_the_answer_given_first_wins() -> None:
    first, second = sample("a", 0), sample("b", 1)
    for order in ([first, second], [first, second, second, first], [first, sample(None), second]):
        winner = majority(voting(*order))
        assert winner is not None and winner.answer == "a"
    for order in ([second, first], [sample(None), second, first, first, second]):
        winner = majority(voting(*order))
        assert winner is not None and winner.answer == "b"


def test_without_a_valid_response_there_is_no_majority() -> None:
    assert majority([sample(None), sample(None)]) is None
    assert prompt_figures([sample(None), sample(None)], [1, 2])["majority@2"] == (0.0, 1.0)


def test_votes_are_counted_by_the_equality_of_the_reward() -> None:
    """1/2, 0.5 and \\frac{1}{2} are one answer, which outvotes two 2s; 2\\sqrt{3} is \\sqrt{12}, which takes algebra to see."""
    answers = [["2", "1/2", "2", "0.5", None, r"$\frac{1}{2}$"], ["(B)", "A", "b", "B."], [r"2\sqrt{3}", "5", r"\sqrt{12}"], []]
    with Verifier(RewardConfig()) as verifier:
        found = votes_of(answers, [None, "choice", None, None], verifier.verdicts)
    assert found == [[0, 1, 0, 1, None, 1], [0, 1, 0, 0], [0, 1, 0], []]


@pytest.mark.parametrize("hostile", [".", "$", "x" * 5000, "9" * 4000, "{" * 500, "\\frac{" * 200, "\x00", "9^9^9^9^9^9"])
def test_what_is_no_answer_is_the_same_as_itself_only(hostile: str) -> None:
    with Verifier(RewardConfig()) as verifier:
        assert votes_of([["1", hostile, f" {hostile} ", "1"]], [None], verifier.verdicts) == [[0, 1, 1, 0]]


def test_all_prompts_are_decided_at_once_and_equal_texts_not_at_all() -> None:
    asked = []

    def verdicts(questions: Sequence[Question]) -> list[bool]:
        asked.append([(question.given, question.truth) for question in questions])
        return [False] * len(questions)

    assert votes_of([["a", "a ", "a"], ["a", "b", "c"]], [None, None], verdicts) == [[0, 0, 0], [0, 1, 2]]
    assert asked == [[("b", "a"), ("c", "a"), ("c", "b")]]


def test_majority_at_k_takes_the_first_k() -> None:
    one = answered("p", sample("a", 0), sample("b", 1), sample("b", 1), sample("b", 1))
    figures = prompt_figures(one.samples, [1, 2, 4])
    assert [figures[f"majority@{k}"] for k in (1, 2, 4)] == [(0.0, 1.0), (0.0, 1.0), (1.0, 1.0)]
    assert [figures[f"pass@{k}"][0] for k in (1, 2, 4)] == [0.75, 1.0, 1.0]


def test_token_f1_by_hand() -> None:
    assert token_f1("0 4 3", "0 4 3") == 1.0
    assert token_f1("0 4", "0 4 3") == pytest.approx(0.8)  # precision 1, recall 2/3
    assert token_f1("A red, RED box.", "a red box") == pytest.approx(6 / 7)  # `red` counts once
    assert token_f1("", "box") == token_f1("box", "") == token_f1("cat", "box") == 0.0
    assert token_f1("", "…") == 1.0


# Over prompts


def mixed() -> list:
    return [
        answered("a", sample(correct=1), sample(correct=0, tokens=30, truncated=True), metadata={"category": "x"}),
        answered("b", sample(correct=0), sample(None), source="y"),
        answered(
            "c", sample(correct=None), sample(correct=None, caption_correct=True, caption_f1=0.5), metadata={"category": "x"}
        ),
    ]


def test_what_is_not_known_does_not_count() -> None:
    found = summarize(mixed(), bootstrap_samples=0)
    assert found["accuracy"] == 1 / 4
    assert found["pass@1"] == 1 / 4 and found["pass@2"] == 1 / 2
    assert found["majority@2"] == 1 / 2  # the two responses to `a` are one answer
    assert found["format_rate"] == 5 / 6
    assert found["response_length"] == 80 / 6
    assert found["truncated"] == 1 / 6
    assert (found["caption_accuracy"], found["caption_f1"]) == (1.0, 0.5)
    assert (found["num_prompts"], found["num_responses"]) == (3, 6)
    assert found["categories"]["x"]["num_prompts"] == 2 and found["categories"]["x"]["accuracy"] == 1 / 2
    assert found["categories"]["y"]["accuracy"] == 0.0 and "caption_f1" not in found["categories"]["y"]
    assert "intervals" not in found and "benchmark" not in found


def test_nothing_graded_and_nothing_at_all() -> None:
    found = summarize([answered("a", sample(correct=None))])
    assert "accuracy" not in found and "accuracy" not in found["intervals"]
    assert found["intervals"]["format_rate"] == [1.0, 1.0]
    assert summarize([]) == {"num_prompts": 0, "num_responses": 0}


def test_a_category_is_metadata_or_the_source() -> None:
    one, two, three = (one.record for one in mixed())
    assert [category_of(record, "category") for record in (one, two, three)] == ["x", "y", "x"]
    assert category_of(one, "level") is None
    assert category_of(answered("d", metadata={"level": 3}).record, "level") == "3"
    assert category_of(answered("d", metadata={"level": ["a"]}, source="s").record, "level") == "s"
    assert [len(group) for group in by_category(mixed(), "category").values()] == [2, 1]


def test_means_do_not_depend_on_the_order() -> None:
    figures = [prompt_figures([sample(correct=n % 3 / 7)], []) for n in range(100)]
    shuffled = figures[:]
    random.Random(0).shuffle(shuffled)
    assert means(figures) == means(shuffled)


# Intervals


def prompts_of(values: list[float]) -> list:
    return [{"accuracy": (value, 1.0)} for value in values]


def test_intervals_are_the_same_every_time_and_change_with_the_seed() -> None:
    values = [float(n % 3 == 0) for n in range(60)]
    first = bootstrap_intervals(prompts_of(values), resamples=500, seed=1)
    assert first == bootstrap_intervals(prompts_of(values), resamples=500, seed=1)
    assert first != bootstrap_intervals(prompts_of(values), resamples=500, seed=2)
    low, high = first["accuracy"]
    assert low < 20 / 60 < high
    width = 2 * 1.96 * math.sqrt((1 / 3) * (2 / 3) / 60)  # the normal approximation
    assert high - low == pytest.approx(width, rel=0.15)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        values = (generator.random(80) < 0.4).astype(float).tolist()
        low, high = bootstrap_intervals(prompts_of(values), resamples=300, seed=trial)["accuracy"]
        covered += low <= 0.4 <= high
    assert 180 <= covered <= 199  # 0.95 of 200 is 190; a normal interval's own share is a little lower


def test_responses_to_one_prompt_are_not_taken_for_independent() -> None:
    """Four equal responses to each of 20 prompts tell no more than one does."""
    values = [float(n % 2) for n in range(20)]
    once = bootstrap_intervals([{"accuracy": (value, 1.0)} for value in values], resamples=500, seed=0)
    four = bootstrap_intervals([{"accuracy": (4 * value, 4.0)} for value in values], resamples=500, seed=0)
    assert once == four


def test_one_prompt_has_an_interval_of_no_width() -> None:
    assert bootstrap_intervals(prompts_of([1.0]), resamples=10, seed=0) == {"accuracy": [1.0, 1.0]}
    assert bootstrap_intervals([], resamples=10, seed=0) == {}


def test_a_figure_of_few_prompts_is_resampled_where_it_was_measured() -> None:
    prompts = [{"accuracy": (1.0, 1.0)}, {"accuracy": (0.0, 0.0)}, {"accuracy": (0.0, 0.0)}]
    assert bootstrap_intervals(prompts, resamples=50, seed=0) == {"accuracy": [1.0, 1.0]}


def test_scalars_are_the_figures_alone() -> None:
    found = summarize(mixed(), bootstrap_samples=10)
    assert scalars(found).keys() == found["intervals"].keys()
