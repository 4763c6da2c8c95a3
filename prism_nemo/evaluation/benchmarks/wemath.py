"""We-Math (Qiao et al. 2024, arXiv 2407.01284), testmini: composite problems of two or three steps, with a problem for each step.

Columns (the project's own data/testmini.json, where `image_path` is a path; Hub: We-Math/We-Math, where it is an image): ID,
split, knowledge concept, question, option ("A. …; B. …"), answer (a letter), image_path, key ("2steps_1", …, "3steps_multi"),
question number, knowledge concept description. Rows with one ID are one composite problem.

Its rule (`evaluation/four_dimensional_metrics.py` of We-Math/We-Math): a composite problem is, with its steps,

    wrong, and a step wrong:             insufficient knowledge      IK
    wrong, and every step right:         inadequate generalization   IG
    right, and every step right:         complete mastery            CM   (loose: right, and any step right)
    right, and a step wrong:             rote memorization           RM   (loose: right, and every step wrong)

score = (N - 0.5 IG - RM - IK) / N over N composite problems. The rates of IK, IG and CM are of N, that of RM is of CM + RM. An
answer is right when its first letter, with `<`, `>`, `:` and `.` taken off, is the option's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prism_nemo.data.records import Record
from prism_nemo.errors import DataError
from prism_nemo.evaluation.benchmarks.files import LETTERS, Row, option_answers, rows, with_images
from prism_nemo.evaluation.benchmarks.scores import Result, Rule, accuracy, by_reward

_KEY = re.compile(r"([23])steps_([123]|multi)")
_OPTION = re.compile(r"(?:^|;)\s*([A-H])\s*[.．]\s*(.*?)\s*(?=;\s*[A-H]\s*[.．]|$)", re.DOTALL)
_ANSWERS = "ABCDEFGH"


def read(path: Path, image_root: Path | None = None) -> Iterator[Record]:
    for row in rows(path, r"(^|/)testmini", image_root=image_root):
        yield _record(row)


def _record(row: Row) -> Record:
    key, answer, option = row.text("key"), row.text("answer").strip(), row.text("option")
    found = _KEY.fullmatch(key)
    if found is None or (found[2] != "multi" and found[2] > found[1]):
        raise DataError(f"`key` is {key!r}", where=row.where, remedy="2steps_1, 2steps_2, 2steps_multi, 3steps_1, …")
    image = row.image("image_path")
    images = (image,) if image is not None else ()
    question = f"{row.text('question')}\n{option}\nGive the letter of the right option as the answer."
    return Record(
        id=f"{row.text('ID')}/{key}",
        prompt=with_images(question, images),
        images=images,
        answer=answer,
        equivalent_answers=option_answers(answer, _options(option)),
        answer_kind="choice",
        source="wemath",
        image_root=row.root,
        metadata={
            "category": row.text("knowledge concept", ""),
            "problem": row.text("ID"),
            "steps": int(found[1]),
            "part": found[2],
        },
    )


def _options(text: str) -> list[str]:
    found = _OPTION.findall(text.strip())
    return [option for _, option in found] if [letter for letter, _ in found] == list(LETTERS[: len(found)]) else []


def right(result: Result) -> bool:
    """By the published rule."""
    bare = re.sub(r"[<>:.]", "", (result.answer or "").strip()).strip()
    return bare[:1] in _ANSWERS and bare[:1] == result.record.answer


def score(results: Sequence[Result]) -> dict[str, Any]:
    return {**four_dimensions(results, right), "accuracy_by_reward": accuracy(results, by_reward)}


def four_dimensions(results: Sequence[Result], right: Rule) -> dict[str, Any]:
    """The scores, over the composite problems of which every step is there; how many are not is told."""
    problems: dict[tuple[str, int], dict[str, bool]] = {}
    for result in results:
        key = (result.field("problem"), result.field("steps"))
        problems.setdefault(key, {})[result.field("part")] = right(result)
    whole = {key: parts for key, parts in problems.items() if len(parts) == key[1] + 1}
    scores: dict[str, Any] = {
        "accuracy": accuracy(results, right),
        "problems": len(whole),
        "incomplete_problems": len(problems) - len(whole),
    }
    if not whole:
        return scores
    one_step = [answer for parts in whole.values() for part, answer in parts.items() if part != "multi"]
    scores["one_step"] = sum(one_step) / len(one_step)
    for steps, name in ((2, "two_step"), (3, "three_step")):
        composite = [parts["multi"] for (_, count), parts in whole.items() if count == steps]
        if composite:
            scores[name] = sum(composite) / len(composite)
    return {**scores, "strict": _rates(whole.values(), loose=False), "loose": _rates(whole.values(), loose=True)}


def _rates(problems: Any, *, loose: bool) -> dict[str, float]:
    counts = {"IK": 0, "IG": 0, "CM": 0, "RM": 0}
    for parts in problems:
        counts[_condition(parts, loose=loose)] += 1
    total, solved = sum(counts.values()), counts["CM"] + counts["RM"]
    rates = {name: counts[name] / total for name in ("IK", "IG", "CM")}
    if solved:
        rates["RM"] = counts["RM"] / solved
    return {"score": (total - 0.5 * counts["IG"] - counts["RM"] - counts["IK"]) / total, **rates}


def _condition(parts: Mapping[str, bool], *, loose: bool) -> str:
    steps = [answer for part, answer in parts.items() if part != "multi"]
    if not parts["multi"]:
        return "IG" if all(steps) else "IK"
    return "CM" if (any(steps) if loose else all(steps)) else "RM"
