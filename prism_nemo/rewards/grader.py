"""What a run's responses earn, by the reward that its configuration names."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

from prism_nemo.config.schema import RewardConfig
from prism_nemo.data.records import Record
from prism_nemo.errors import DataError
from prism_nemo.rewards.answer import check_truth
from prism_nemo.rewards.format import parse_response
from prism_nemo.rewards.judge import Judge
from prism_nemo.rewards.question import AnswerKind, Question
from prism_nemo.rewards.registry import Reward, custom_reward, reward_function
from prism_nemo.rewards.verifier import Verifier


class Grader:
    """Grades responses; open while a run lasts.

    Raises ConfigError for a reward that does not exist, and for a judge without a key.
    """

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self._custom = reward_function(config.name)
        self._verifier = Verifier(config)
        self._judge = Judge(config.judge) if config.judge.enabled else None

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._verifier.__exit__(kind, error, traceback)

    def grade(self, responses: Sequence[str], records: Sequence[Record]) -> list[Reward | None]:
        """What each response earns against its record's verified answer; None where the record has none.

        Raises DataError, naming the record, for an unverifiable answer, an unknown kind, and a custom reward that fails;
        EndpointError for a judge that cannot be asked.
        """
        questions: dict[int, Question] = {}  # by response, where there is something to decide
        for index, (response, record) in enumerate(zip(responses, records, strict=True)):
            parsed = parse_response(response)
            if record.answer is not None and parsed is not None:
                questions[index] = _question(parsed.answer, record)
        verdicts = dict(zip(questions, self._verifier.verdicts(list(questions.values())), strict=True))
        verdicts |= self._judged({index: questions[index] for index, right in verdicts.items() if not right}, records)
        return [
            None if record.answer is None else self._reward(response, record, verdicts.get(index))
            for index, (response, record) in enumerate(zip(responses, records, strict=True))
        ]

    def metrics(self) -> dict[str, tuple[float, float]]:
        """Sum and count of each metric, as shares of the answers graded since the last call; the names never change."""
        counts = self._verifier.take_counts()
        shares = {
            "symbolic": counts.symbolic,
            "cache_hits": counts.cache_hits,
            "timeouts": counts.timeouts,
            "crashes": counts.crashes,
        }
        if self._judge is not None:
            judged = self._judge.take_counts()
            asked = judged.pop("CORRECT"), judged.pop("WRONG")
            shares |= {"judged": sum(asked), "judged_correct": asked[0], "without_verdict": sum(judged.values())}
        return {f"rewards/{name}": (float(share), float(counts.graded)) for name, share in shares.items()}

    def _judged(self, questions: dict[int, Question], records: Sequence[Record]) -> dict[int, bool]:
        """What the judge says of answers that the rules call wrong; where it says nothing, they stay wrong."""
        if self._judge is None or not questions:
            return {}
        truths = [" or: ".join([question.truth, *question.equivalent_answers]) for question in questions.values()]
        given = [question.given for question in questions.values()]
        verdicts = self._judge.verdicts([records[index].prompt for index in questions], truths, given)
        return {index: verdict is True for index, verdict in zip(questions, verdicts, strict=True)}

    def _reward(self, response: str, record: Record, correct: bool | None) -> Reward:
        """`correct` is None when the format is invalid."""
        if correct is None:
            measured = Reward(score=0.0, accuracy=0.0, format=0.0)
        else:
            measured = measured_reward(correct, self.config)
        if self._custom is None:
            return measured
        return custom_reward(self.config.name, self._custom, response, record, measured)


def measured_reward(correct: bool, config: RewardConfig) -> Reward:
    """What a response of valid format earns: `accuracy_weight * accuracy + format_weight`."""
    accuracy = float(correct)
    return Reward(score=config.accuracy_weight * accuracy + config.format_weight, accuracy=accuracy, format=1.0)


def check_answer(record: Record) -> AnswerKind | None:
    """The kind of a record's verified answer, None where its text tells.

    Raises DataError for an unknown kind, and where the answer or one of its equivalents cannot be verified. Stages ask when they
    read a record, so that a run does not find out by its first valid response.
    """
    try:
        kind = None if record.answer_kind is None else AnswerKind(record.answer_kind)
    except ValueError:
        raise DataError(
            f"there is no kind of answer named {record.answer_kind!r}",
            where=f"record {record.id}",
            remedy="choose one of " + ", ".join(kind.value for kind in AnswerKind),
        ) from None
    try:
        for answer in (record.answer or "", *record.equivalent_answers):
            check_truth(answer)
    except DataError as error:
        raise DataError(error.what, where=f"record {record.id}", remedy=error.remedy) from None
    return kind


def _question(given: str, record: Record) -> Question:
    kind = check_answer(record)
    return Question(given=given, truth=record.answer or "", equivalent_answers=record.equivalent_answers, kind=kind)
