"""What responses earn: `score`, the Grader, rewards of one's own."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from prism_nemo.config.schema import RewardConfig
from prism_nemo.data.records import Record
from prism_nemo.errors import ConfigError, DataError
from prism_nemo.rewards import AnswerKind, Reward, score
from prism_nemo.rewards.grader import Grader
from prism_nemo.rewards.registry import REWARDS

ROOT_12, ROOT_3 = r"$\sqrt{12}$", r"2\sqrt{3}"  # the same, which the rules cannot see
RIGHT, WRONG, INVALID = Reward(1.0, 1.0, 1.0), Reward(0.2, 0.0, 1.0), Reward(0.0, 0.0, 0.0)


def response(answer: str) -> str:
    return f"<caption>c</caption> <think>t</think> <answer>{answer}</answer>"


def record(answer: str | None, *equivalent_answers: str, kind: str | None = None) -> Record:
    return Record(id="r7", prompt="How many?", answer=answer, equivalent_answers=equivalent_answers, answer_kind=kind)


def test_the_score() -> None:
    assert score(response("1,000"), "1000") == RIGHT
    assert score(response("999"), "1000") == WRONG
    assert score("1000", "1000") == INVALID
    assert score(response("1000") + " and more", "1000") == INVALID
    assert score(response(ROOT_12), ROOT_3) == RIGHT
    assert score(response("four"), "5", equivalent_answers=["4"]) == RIGHT
    assert score(response("3, 1"), "1, 3") == WRONG
    assert score(response("3, 1"), "1, 3", kind="set") == score(response("3, 1"), "1, 3", kind=AnswerKind.SET) == RIGHT
    with pytest.raises(ValueError, match="'sett'"):
        score(response("3"), "3", kind="sett")
    with pytest.raises(DataError, match="empty"):
        score("of no valid format", " ")


def test_a_grader_keeps_order_weighs_and_counts() -> None:
    records = [record("7"), record(None), record(ROOT_3), record("7"), record("8"), record("7", "8"), record(ROOT_3)]
    answers = ["7", "7", ROOT_12, "8", None, "8", ROOT_12]
    texts = ["?" if answer is None else response(answer) for answer in answers]
    with Grader(RewardConfig(accuracy_weight=3.0, format_weight=0.5)) as grader:
        right, wrong = Reward(3.5, 1.0, 1.0), Reward(0.5, 0.0, 1.0)
        assert grader.grade(texts, records) == [right, None, right, wrong, INVALID, right, right]
        assert grader.metrics() == {
            "rewards/symbolic": (2.0, 5.0),
            "rewards/cache_hits": (1.0, 5.0),
            "rewards/timeouts": (0.0, 5.0),
            "rewards/crashes": (0.0, 5.0),
        }
        assert set(grader.metrics().values()) == {(0.0, 0.0)}  # since the last call
        assert grader.grade(texts[2:3], records[2:3]) == [right]
        assert grader.metrics()["rewards/cache_hits"] == (1.0, 1.0)
        assert grader.grade([], []) == []


def test_a_forgotten_decision_is_made_again() -> None:
    with Grader(RewardConfig(cache_size=1, num_workers=1)) as grader:
        other = response(r"$\sqrt{27}$")
        for text, truth in ((response(ROOT_12), ROOT_3), (other, r"3\sqrt{3}"), (response(ROOT_12), ROOT_3)):
            assert grader.grade([text], [record(truth)]) == [RIGHT]
        assert grader.metrics()["rewards/cache_hits"] == (0.0, 3.0)


def test_plain_answers_start_no_process() -> None:
    with Grader(RewardConfig()) as grader:
        texts = [response(str(number % 9)) for number in range(256)]
        rewards = grader.grade(texts, [record("3")] * len(texts))
        assert [reward is not None and reward.accuracy for reward in rewards] == [number % 9 == 3 for number in range(256)]
        assert grader._verifier._pool.process_ids == []
        assert grader.metrics()["rewards/symbolic"] == (0.0, 256.0)


def test_two_graders_at_once_from_other_threads() -> None:
    roots = range(2, 12)
    texts = [response(rf"$\sqrt{{{8 * root * root}}}$") for root in roots]
    truths = [record(rf"{2 * root if root % 2 else 7}\sqrt{{2}}") for root in roots]
    expected = [RIGHT if root % 2 else WRONG for root in roots]
    config = RewardConfig(num_workers=1)
    with Grader(config) as one, Grader(config) as other, ThreadPoolExecutor(4) as threads:
        assert threading.current_thread() is threading.main_thread()
        graded = [threads.submit(grader.grade, texts, truths) for grader in (one, other, one, other)]
        assert [future.result() for future in graded] == [expected] * 4


def test_an_unknown_kind_names_the_record() -> None:
    with Grader(RewardConfig()) as grader, pytest.raises(DataError, match="'numbr'") as failure:
        grader.grade([response("3")], [record("3", kind="numbr")])
    assert failure.value.where == "record r7"


@pytest.mark.parametrize("separator", [":", "."])
def test_a_reward_of_ones_own(separator: str) -> None:
    text, missing = response("3"), record(None)
    with Grader(RewardConfig(name=f"helpers.custom_rewards{separator}half")) as grader:
        assert grader.grade([text, text], [record("3"), missing]) == [Reward(0.5, 0.25, 1.0), None]
    with Grader(RewardConfig(name=f"helpers.custom_rewards{separator}brevity")) as grader:
        brief = 1.0 / len(text)
        assert grader.grade([text], [record("3")]) == [Reward(brief, 1.0, 1.0)]
        assert grader.grade([text], [record("4")]) == [Reward(brief, 0.0, 1.0)]
        assert grader.grade(["?"], [record("4")]) == [Reward(1.0, 0.0, 0.0)]


def test_a_registered_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REWARDS, "length", lambda response, record: len(response))
    with Grader(RewardConfig(name="length")) as grader:
        assert grader.grade(["1234"], [record("3")]) == [Reward(4.0, 0.0, 0.0)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exakt", "no reward named 'exakt'"),
        ("helpers.absent:function", "No module named 'helpers.absent'"),
        ("helpers.custom_rewards:absent", "no attribute 'absent'"),
        ("helpers.custom_rewards:NOT_A_FUNCTION", "is no function"),
        (":half", "cannot be imported"),
        (".half", "cannot be imported"),
    ],
)
def test_a_reward_that_cannot_be_used_is_an_error_of_the_configuration(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as failure:
        Grader(RewardConfig(name=name))
    assert failure.value.where == "reward.name"
    assert failure.value.remedy


@pytest.mark.parametrize(
    ("name", "message"), [("failing", "KeyError: 'absent'"), ("infinite", "gave inf"), ("nothing", "gave None")]
)
def test_a_failing_reward_names_the_record(name: str, message: str) -> None:
    with Grader(RewardConfig(name=f"helpers.custom_rewards:{name}")) as grader:
        with pytest.raises(DataError, match=message) as failure:
            grader.grade([response("3")], [record("3")])
        assert failure.value.where is not None and "record r7" in failure.value.where


def test_the_package_loads_nothing_heavy() -> None:
    code = (
        "import sys, prism_nemo.config.schema, prism_nemo.rewards.grader, prism_nemo.rewards.scoring\n"
        "print([name for name in ('torch', 'sympy', 'math_verify', 'transformers', 'megatron') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip() == "[]"
