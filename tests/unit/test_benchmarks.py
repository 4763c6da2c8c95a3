"""The published benchmarks: files made here in their published forms, read and scored; every score is worked out by hand."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.evaluations import sample
from PIL import Image

from prism_nemo.config.enums import Benchmark
from prism_nemo.config.schema import RewardConfig
from prism_nemo.data.images import load_image
from prism_nemo.data.records import IMAGE_PLACEHOLDER, Record
from prism_nemo.errors import DataError
from prism_nemo.evaluation.benchmarks import read_benchmark, score_benchmark
from prism_nemo.evaluation.benchmarks.files import option_answers
from prism_nemo.evaluation.benchmarks.mathvista import right as mathvista_right
from prism_nemo.evaluation.benchmarks.mmmu import named_option
from prism_nemo.evaluation.benchmarks.scores import Result, edit_distance
from prism_nemo.evaluation.samples import Answered
from prism_nemo.rewards.answer import check_truth
from prism_nemo.rewards.format import response_text
from prism_nemo.rewards.grader import Grader


def png(shade: int = 0) -> bytes:
    data = io.BytesIO()
    Image.new("L", (4, 4), shade).save(data, "PNG")
    return data.getvalue()


def picture(shade: int = 0) -> dict[str, Any]:
    """As the Hub's parquet files hold an image."""
    return {"bytes": png(shade), "path": "picture.png"}


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)
    return path


def write_json(path: Path, rows: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return path


def answers_to(records: Sequence[Record], answers: Mapping[str, str | Sequence[str | None] | None]) -> list[Answered]:
    """Each record with these answers, graded as an evaluation grades them; None is a response of invalid format."""
    found = []
    with Grader(RewardConfig()) as grader:
        for record in records:
            given = answers[record.id]
            texts = [given] if given is None or isinstance(given, str) else list(given)
            responses = ["" if text is None else response_text("c", "t", text) for text in texts]
            rewards = grader.grade(responses, [record] * len(responses))
            samples = [sample(text, reward and reward.accuracy) for text, reward in zip(texts, rewards, strict=True)]
            found.append(Answered(record, samples))
    return found


def check_usable(records: Sequence[Record]) -> None:
    """Ids are different, placeholders fit the images, images load, truths can be verified, and the truth itself is right."""
    assert len({record.id for record in records}) == len(records)
    for record in records:
        assert record.prompt.count(IMAGE_PLACEHOLDER) == len(record.images)
        assert "<video>" not in record.prompt
        for image in record.images:
            load_image(image, record.image_root)
        assert record.answer is not None
        check_truth(record.answer)
    for one in answers_to(records, {record.id: [record.answer, *record.equivalent_answers] for record in records}):
        assert all(response.solved for response in one.samples), one.record


# MathVista

MATHVISTA = [
    {
        "pid": "1",
        "question": "Which is larger?",
        "image": "images/1.jpg",
        "decoded_image": picture(),
        "choices": ["left bar", "right bar"],
        "unit": None,
        "precision": None,
        "answer": "right bar",
        "question_type": "multi_choice",
        "answer_type": "text",
        "metadata": {"category": "general-vqa", "task": "figure question answering", "skills": ["statistical reasoning"]},
        "query": "Hint: Please answer the question and provide the correct option letter.\nQuestion: Which is larger?",
    },
    {
        "pid": "2",
        "question": "How long?",
        "image": "images/2.jpg",
        "decoded_image": picture(),
        "choices": None,
        "unit": "cm",
        "precision": 1.0,
        "answer": "1.2",
        "question_type": "free_form",
        "answer_type": "float",
        "metadata": {"category": "math-targeted-vqa", "task": "geometry problem solving", "skills": ["a", "b"]},
        "query": "",
    },
    {
        "pid": "3",
        "question": "How many?",
        "image": "images/3.jpg",
        "decoded_image": picture(),
        "choices": None,
        "unit": "",
        "precision": None,
        "answer": "4",
        "question_type": "free_form",
        "answer_type": "integer",
        "metadata": {"category": "general-vqa", "task": "figure question answering", "skills": ["a"]},
        "query": "Question: How many?",
    },
]


def test_mathvista(tmp_path: Path) -> None:
    write_parquet(tmp_path / "data" / "testmini-00000-of-00001.parquet", MATHVISTA)
    write_parquet(tmp_path / "data" / "test-00000-of-00002.parquet", [{**MATHVISTA[0], "answer": ""}])  # the hidden split
    records = list(read_benchmark(Benchmark.mathvista, tmp_path))
    check_usable(records)
    choice, length, count = records
    assert (
        choice.prompt
        == "<image>\nHint: Please answer the question and provide the correct option letter.\nQuestion: Which is larger?"
    )
    assert (choice.answer, choice.equivalent_answers, choice.answer_kind) == ("B", ("right bar",), "choice")
    assert length.prompt == "<image>\nHow long? (Unit: cm)\nGive a number with 1 decimal places as the answer."
    assert (length.answer, count.answer, count.metadata["task"]) == ("1.2", "4", "figure question answering")
    found = score_benchmark("mathvista", answers_to(records, {"1": "(B)", "2": "1.23", "3": "4.9"}))
    assert found["accuracy"] == 1.0  # rounded, cut
    assert found["accuracy_by_reward"] == pytest.approx(1 / 3)
    assert found["by"]["category"] == {
        "general-vqa": {"accuracy": 1.0, "count": 2},
        "math-targeted-vqa": {"accuracy": 1.0, "count": 1},
    }
    assert found["by"]["skills"]["a"] == {"accuracy": 1.0, "count": 2}
    found = score_benchmark("mathvista", answers_to(records, {"1": "left", "2": "1.26", "3": None}))
    assert found["accuracy"] == 0.0


@pytest.mark.parametrize(
    ("row", "given", "expected"),
    [
        (0, "B", True),
        (0, "the answer is (b), surely", True),
        (0, "right ber", True),  # the nearest choice
        (0, "A", False),
        (1, "1.249", True),
        (1, "1.25", True),  # Python rounds half to even, as the published rule does
        (1, "1.3", False),
        (1, "1.2 cm", False),  # its language model would have taken the unit off
        (1, "inf", False),
        (1, "1e999", False),
        (2, "4.0", True),
        (2, "nan", False),
        (2, "four", False),
    ],
)
def test_mathvistas_rule(row: int, given: str, expected: bool, tmp_path: Path) -> None:
    records = list(read_benchmark("mathvista", write_parquet(tmp_path / "testmini.parquet", MATHVISTA)))
    assert mathvista_right(Result(records[row], sample(given))) is expected


def test_mathvista_as_one_object_with_images_in_files(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(png())
    row = {name: value for name, value in MATHVISTA[0].items() if name not in ("decoded_image", "query")}
    records = list(read_benchmark("mathvista", write_json(tmp_path / "testmini.json", {"1": row})))
    check_usable(records)
    assert (
        records[0].prompt
        == "<image>\nWhich is larger?\n(A) left bar\n(B) right bar\nGive the letter of the right option as the answer."
    )


def test_edit_distance() -> None:
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    assert edit_distance("same", "same") == 0


# MATH-Vision

MATHVISION = [
    {"id": "4", "question": "How many?\n<image1>", "options": [], "answer": "6", "level": 1, "subject": "counting"},
    {"id": "6", "question": "Which picture?\n<image1>", "options": list("ABCDE"), "answer": "D", "level": 3, "subject": "logic"},
    {
        "id": "91",
        "question": "How long is the room? <image1>",
        "options": ["$6 \\mathrm{~m}$", "$8 \\mathrm{~m}$"],
        "answer": "B",
        "level": 3,
        "subject": "metric geometry - length",
    },
    {"id": "7", "question": "What share?\n<image1>", "options": [], "answer": "0.33", "level": 1, "subject": "arithmetic"},
]


def test_mathvision(tmp_path: Path) -> None:
    rows = [{**row, "image": f"images/{row['id']}.jpg", "decoded_image": picture(), "solution": None} for row in MATHVISION]
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows)
    mini = write_parquet(tmp_path / "data" / "testmini-00000-of-00001.parquet", rows[:1])
    records = list(read_benchmark("mathvision", tmp_path))
    assert len(list(read_benchmark("mathvision", mini))) == 1
    check_usable(records)
    assert records[0].prompt == "<image>\nHow many?\n<image1>"
    assert "(A)" not in records[1].prompt and records[1].equivalent_answers == ()
    assert "(B) $8 \\mathrm{~m}$" in records[2].prompt
    found = score_benchmark("mathvision", answers_to(records, {"4": "6", "6": "(D)", "91": "$8 \\mathrm{~m}$", "7": "0.334"}))
    assert found["accuracy"] == 1.0  # 0.334 is 0.33 rounded to two decimals
    assert found["accuracy_by_reward"] == 0.75
    assert found["by"]["level"] == {"1": {"accuracy": 1.0, "count": 2}, "3": {"accuracy": 1.0, "count": 2}}
    found = score_benchmark("mathvision", answers_to(records, {"4": "7", "6": "d", "91": "A", "7": None}))
    assert found["accuracy"] == 0.25 and found["by"]["subject"]["logic"]["accuracy"] == 1.0


def test_mathvision_as_lines_with_images_in_files(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for row in MATHVISION:
        (tmp_path / "images" / f"{row['id']}.jpg").write_bytes(png())
    (tmp_path / "data").mkdir()
    lines = [json.dumps({**row, "image": f"images/{row['id']}.jpg", "solution": None}) for row in MATHVISION]
    (tmp_path / "data" / "test.jsonl").write_text("\n".join(lines) + "\n")
    check_usable(list(read_benchmark("mathvision", tmp_path / "data", tmp_path)))


# MathVerse

QUESTION = "AB is parallel to CD, angle 1 = 50, then angle 2 is ()\nChoices:\nA:50°\nB:60°\nC:130°"


def mathverse_row(index: int, version: str, **fields: Any) -> dict[str, Any]:
    return {
        "sample_index": str(index),
        "problem_index": "1",
        "problem_version": version,
        "question": "" if version == "Vision Only" else QUESTION,
        "image": picture(),
        "answer": "C",
        "question_type": "multi-choice",
        "metadata": {"split": "testmini", "source": "GeoQA", "subject": "Plane Geometry", "subfield": "Angle"},
        "query_wo": "Please directly answer the question.",
        "query_cot": f"Please first conduct reasoning.\nQuestion: {'' if version == 'Vision Only' else QUESTION}",
        **fields,
    }


def test_mathverse(tmp_path: Path) -> None:
    versions = ["Text Dominant", "Text Lite", "Vision Intensive", "Vision Dominant", "Vision Only"]
    rows = [mathverse_row(index, version) for index, version in enumerate(versions, start=1)]
    free = mathverse_row(6, "Text Lite", question="Find x.", query_cot="Find x.", answer="14", question_type="free-form")
    free["metadata"] = {**free["metadata"], "subject": "Solid Geometry", "subfield": "Length"}
    write_parquet(tmp_path / "testmini.parquet", [*rows, free])
    write_json(tmp_path / "testmini_text_only.json", [mathverse_row(1, "Text Only", image="")])
    records = list(read_benchmark("mathverse", tmp_path))
    check_usable(records)
    assert [record.metadata["problem_version"] for record in records] == [*versions, "Text Lite"]
    assert records[0].prompt == f"<image>\nPlease first conduct reasoning.\nQuestion: {QUESTION}"
    assert (records[0].answer, records[0].equivalent_answers) == ("C", ("130°",))
    assert records[4].equivalent_answers == ()  # the image says what the options are
    given = {"1": "C", "2": "130°", "3": "A", "4": "C. 130°", "5": "C", "6": "14"}
    found = score_benchmark("mathverse", answers_to(records, given))
    assert found["accuracy"] == pytest.approx(5 / 6)
    assert found["mean_of_versions"] == pytest.approx(4 / 5)
    assert found["by"]["problem_version"]["Vision Intensive"] == {"accuracy": 0.0, "count": 1}
    assert found["by"]["problem_version"]["Text Lite"] == {"accuracy": 1.0, "count": 2}
    assert found["by"]["subject"]["Solid Geometry"] == {"accuracy": 1.0, "count": 1}
    (text_only,) = read_benchmark("mathverse", tmp_path / "testmini_text_only.json")
    assert text_only.images == () and not text_only.prompt.startswith("<image>")


# We-Math


def wemath_rows() -> list[dict[str, Any]]:
    rows = []
    for problem, steps in (("2steps_1", 2), ("2steps_2", 2), ("2steps_3", 2), ("3steps_1", 3), ("3steps_2", 3), ("2steps_4", 2)):
        for part in (*map(str, range(1, steps + 1)), "multi"):
            row = {
                "ID": problem,
                "split": "testmini",
                "knowledge concept": "Circumference of Circles",
                "question": "The radius is ( ) cm.",
                "option": "A. 1 cm;B. 1, 5 cm; C. 3.14 cm;D. C; E. No correct answer",
                "answer": "A",
                "image_path": picture(),
                "key": f"{steps}steps_{part}",
                "question number": 1,
                "knowledge concept description": "…",
            }
            rows.append(row)
    return rows


def test_wemaths_four_dimensions(tmp_path: Path) -> None:
    """Six problems, one of which is missing a step: two right steps and a wrong whole (IG), and so on."""
    rows = [row for row in wemath_rows() if not (row["ID"] == "2steps_4" and row["key"] == "2steps_2")]
    records = list(read_benchmark("wemath", write_parquet(tmp_path / "testmini-0.parquet", rows)))
    check_usable(records)
    assert records[0].prompt.endswith("D. C; E. No correct answer\nGive the letter of the right option as the answer.")
    assert (records[0].id, records[0].equivalent_answers) == ("2steps_1/2steps_1", ("1 cm",))
    outcomes = {  # steps, then the whole
        "2steps_1": "AA B",  # inadequate generalization
        "2steps_2": "AB B",  # insufficient knowledge
        "2steps_3": "AA A",  # complete mastery
        "3steps_1": "ABA A",  # rote memorization; loosely, mastery
        "3steps_2": "BBB A",  # rote memorization
        "2steps_4": "A  A",  # not whole
    }
    given = {}
    for record in records:
        letters = outcomes[record.metadata["problem"]]
        part = record.metadata["part"]
        given[record.id] = letters[-1] if part == "multi" else letters[int(part) - 1]
    found = score_benchmark("wemath", answers_to(records, given))
    assert (found["problems"], found["incomplete_problems"]) == (5, 1)
    assert found["strict"] == {
        "score": pytest.approx((5 - 0.5 - 2 - 1) / 5),
        "IK": pytest.approx(1 / 5),
        "IG": pytest.approx(1 / 5),
        "CM": pytest.approx(1 / 5),
        "RM": pytest.approx(2 / 3),
    }
    assert found["loose"] == {
        "score": pytest.approx((5 - 0.5 - 1 - 1) / 5),
        "IK": pytest.approx(1 / 5),
        "IG": pytest.approx(1 / 5),
        "CM": pytest.approx(2 / 5),
        "RM": pytest.approx(1 / 3),
    }
    assert found["one_step"] == pytest.approx((2 + 1 + 2 + 2 + 0) / 12)
    assert found["two_step"] == pytest.approx(1 / 3)
    assert found["three_step"] == 1.0
    assert found["accuracy"] == pytest.approx((7 + 3 + 2) / 19)


def test_wemaths_answer_is_its_first_letter(tmp_path: Path) -> None:
    records = list(read_benchmark("wemath", write_parquet(tmp_path / "testmini.parquet", wemath_rows()[:1])))
    for given, expected in (("A", 1.0), ("<A>.", 1.0), ("A. 1 cm", 1.0), ("1 cm", 0.0), ("B", 0.0), ("a", 0.0), (None, 0.0)):
        assert score_benchmark("wemath", answers_to(records, {records[0].id: given}))["accuracy"] == expected, given
    assert score_benchmark("wemath", answers_to(records, {records[0].id: "1 cm"}))["accuracy_by_reward"] == 1.0


def test_wemath_with_images_in_files(tmp_path: Path) -> None:
    (tmp_path / "2steps" / "image").mkdir(parents=True)
    (tmp_path / "2steps" / "image" / "1-1.png").write_bytes(png())
    rows = [{**wemath_rows()[0], "image_path": "2steps/image/1-1.png"}]
    check_usable(list(read_benchmark("wemath", write_json(tmp_path / "testmini.json", rows))))


# MMMU and MMMU-Pro


def mmmu_row(name: str, **fields: Any) -> dict[str, Any]:
    images: dict[str, Any] = {f"image_{n}": None for n in range(1, 8)}
    return {
        "id": name,
        "question": "<image 1> What is shown? Compare <image 1> with the others.",
        "options": "['An oboe', 'A flute', \"Bach's horn\", 'A']",
        "explanation": "",
        **images,
        "image_1": picture(),
        "img_type": "['Photographs']",
        "answer": "B",
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice",
        "subfield": "Music",
        **fields,
    }


def test_mmmu(tmp_path: Path) -> None:
    music = [
        mmmu_row("validation_Music_1"),
        mmmu_row("validation_Music_2", question="Which?", options="['<image 2>', '<image 1>']", image_2=picture(9), answer="A"),
    ]
    opened = {"options": "[]", "question_type": "open"}
    accounting = [
        mmmu_row("validation_Accounting_1", question="How much? <image 1>", answer="1,234.50", **opened),
        mmmu_row("validation_Accounting_2", question="Who?", answer="['Smith', 'J. Smith']", **opened),
    ]
    write_parquet(tmp_path / "Music" / "validation-00000-of-00001.parquet", music)
    write_parquet(tmp_path / "Music" / "dev-00000-of-00001.parquet", [mmmu_row("dev_Music_1")])
    write_parquet(tmp_path / "Accounting" / "validation-00000-of-00001.parquet", accounting)
    records = list(read_benchmark("mmmu", tmp_path))
    check_usable(records)
    by_id = {record.id: record for record in records}
    assert len(by_id) == 4
    first, second = by_id["validation_Music_1"], by_id["validation_Music_2"]
    assert first.prompt.startswith("<image> What is shown? Compare image 1 with the others.\n(A) An oboe\n")
    assert (first.answer, first.equivalent_answers) == ("B", ("A flute",))
    assert "(A) <image>\n(B) <image>" in second.prompt
    assert [image.data for image in second.images] == [png(9), png(0)], "in the order of the text"
    unnamed = by_id["validation_Accounting_2"]
    assert unnamed.prompt == "<image>\nWho?" and unnamed.equivalent_answers == ("J. Smith",)
    given = {
        "validation_Music_1": "I would say (A), or rather (B)",
        "validation_Music_2": "a tune",
        "validation_Accounting_1": "$1234.5",
        "validation_Accounting_2": "it was j. smith who did it",
    }
    found = score_benchmark("mmmu", answers_to(records, given))
    assert found["accuracy"] == 0.75
    assert found["by"]["subject"] == {"Accounting": {"accuracy": 1.0, "count": 2}, "Music": {"accuracy": 0.5, "count": 2}}
    assert found["by"]["discipline"]["Art and Design"]["accuracy"] == 0.5
    assert found["mean_of_subjects"] == found["mean_of_disciplines"] == 0.75
    assert found["by_question_type"]["open"]["accuracy"] == 1.0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(C)", "C"),
        ("A or B", "B"),  # the last
        ("(A) is wrong, B is right", "A"),  # brackets come first
        ("flute", None),  # too short to be searched for texts
        ("what I see there is a flute, isn't it", "B"),
        ("", None),
        ("(Z)", None),
    ],
)
def test_the_option_that_an_answer_names(given: str, expected: str | None) -> None:
    assert named_option(given, ["An oboe", "A flute", "A horn"]) == expected


def test_an_open_answer_of_one_letter_is_a_word() -> None:
    record = Record(id="x", prompt="?", answer="C", metadata={"question_type": "open", "published_answers": ["C"]})
    found = [score_benchmark("mmmu", [Answered(record, [sample(text, 0)])])["accuracy"] for text in ("C", "it is c", "cat")]
    assert found == [1.0, 1.0, 0.0]


def test_mmmu_pro(tmp_path: Path) -> None:
    options = str([f"option {n}" for n in range(10)])
    standard = {**mmmu_row("test_Music_1", options=options, answer="J"), "subject": "Music"}
    other = {**mmmu_row("test_Finance_2", options=options, answer="A"), "subject": "Finance"}
    vision = {"id": "test_Music_1", "image": picture(), "options": options, "answer": "J", "subject": "Music"}
    write_parquet(tmp_path / "standard (10 options)" / "test-00000-of-00002.parquet", [standard])
    write_parquet(tmp_path / "standard (10 options)" / "test-00001-of-00002.parquet", [other])
    write_parquet(tmp_path / "standard (4 options)" / "test-00000-of-00001.parquet", [{**standard, "answer": "Q"}])
    write_parquet(tmp_path / "vision" / "test-00000-of-00001.parquet", [vision])
    records = list(read_benchmark("mmmu_pro", tmp_path))
    check_usable(records)
    assert [record.id for record in records] == ["standard/test_Music_1", "standard/test_Finance_2", "vision/test_Music_1"]
    assert "(J) option 9" in records[0].prompt
    assert records[2].prompt == "<image>\nAnswer the question in the image. Give the letter of the right option as the answer."
    given = {"standard/test_Music_1": "J.", "standard/test_Finance_2": "B", "vision/test_Music_1": "J"}
    found = score_benchmark("mmmu_pro", answers_to(records, given))
    assert (found["standard"]["accuracy"], found["vision"]["accuracy"], found["accuracy"]) == (0.5, 1.0, 0.75)
    assert found["accuracy_by_reward"] == pytest.approx(2 / 3)
    assert found["standard"]["by"]["discipline"] == {
        "Art and Design": {"accuracy": 1.0, "count": 1},
        "Business": {"accuracy": 0.0, "count": 1},
    }
    only = list(read_benchmark("mmmu_pro", tmp_path / "vision"))
    assert score_benchmark("mmmu_pro", answers_to(only, {"vision/test_Music_1": "A"}))["accuracy"] == 0.0


# HallusionBench


def hallusion_row(place: str, truth: str, visual_input: str = "1", **fields: Any) -> dict[str, Any]:
    category, subcategory, set_id, figure, question = place.split("/")
    return {
        "category": category,
        "subcategory": subcategory,
        "visual_input": visual_input,
        "set_id": set_id,
        "figure_id": figure,
        "sample_note": "circle",
        "question_id": question,
        "question": "Are they the same size?",
        "gt_answer_details": "…",
        "gt_answer": truth,
        "filename": f"./hallusion_bench/{category}/{subcategory}/{set_id}_{figure}.png",
        **fields,
    }


HALLUSION = {
    "VD/illusion/0/0/0": "1",
    "VD/illusion/0/0/1": "0",
    "VD/illusion/0/1/0": "0",
    "VD/illusion/0/1/1": "1",
    "VS/chart/1/0/0": "1",  # without its figure
    "VS/chart/1/1/0": "1",
    "VS/chart/1/2/0": "0",
}


def test_hallusionbench(tmp_path: Path) -> None:
    rows = [hallusion_row(place, truth, "0" if place == "VS/chart/1/0/0" else "1") for place, truth in HALLUSION.items()]
    for row in rows:
        (tmp_path / row["filename"]).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / row["filename"]).write_bytes(png())
    write_json(tmp_path / "HallusionBench.json", rows)
    records = list(read_benchmark("hallusionbench", tmp_path))
    check_usable(records)
    assert records[0].prompt == "<image>\nAre they the same size?\nGive yes or no as the answer."
    assert [record.answer for record in records] == ["Yes", "No", "No", "Yes", "Yes", "Yes", "No"]
    assert records[4].images == ()
    given = {
        "VD/illusion/0/0/0": "Yes, the same",
        "VD/illusion/0/0/1": "no.",
        "VD/illusion/0/1/0": "yes",  # wrong
        "VD/illusion/0/1/1": "Yes",
        "VS/chart/1/0/0": "It cannot be told",  # unclear, and there is no figure: right
        "VS/chart/1/1/0": "uncertain",  # unclear, with a figure: wrong
        "VS/chart/1/2/0": "No",
    }
    found = score_benchmark("hallusionbench", answers_to(records, given))
    assert found["aAcc"] == pytest.approx(5 / 7)
    assert found["fAcc"] == pytest.approx(2 / 4)  # VD 0 right, VD 1 not, VS 1 not, VS 2 right; VS 0 is none
    assert found["qAcc"] == pytest.approx(1 / 3)  # VD question 1
    assert found["easy"] == 1.0 and found["hard"] == pytest.approx(1 / 3)
    assert found["by"]["VD"] == {"aAcc": 0.75, "fAcc": 0.5, "qAcc": 0.5, "easy": 1.0, "hard": 0.5}
    assert found["by"]["VS"] == {"aAcc": pytest.approx(2 / 3), "fAcc": 0.5, "qAcc": 0.0, "easy": 1.0, "hard": 0.0}
    invalid = answers_to(records, dict.fromkeys(given))
    assert score_benchmark("hallusionbench", invalid)["aAcc"] == 0.0


def test_hallusionbench_from_the_hub(tmp_path: Path) -> None:
    rows = [hallusion_row(place, truth, image=picture()) for place, truth in HALLUSION.items() if place != "VS/chart/1/0/0"]
    bare = hallusion_row("VS/chart/1/0/0", "1", "0", image=None)
    write_parquet(tmp_path / "data" / "image-00000-of-00001.parquet", rows)
    write_parquet(tmp_path / "data" / "non_image-00000-of-00001.parquet", [bare])
    records = list(read_benchmark("hallusionbench", tmp_path))
    check_usable(records)
    assert len(records) == 7 and sum(len(record.images) for record in records) == 6


# All of them


def test_several_responses_are_averaged(tmp_path: Path) -> None:
    records = list(read_benchmark("mathvista", write_parquet(tmp_path / "testmini.parquet", MATHVISTA)))
    given = {"1": ["B", "B"], "2": ["1.2", "7"], "3": ["4", "7"]}
    found = score_benchmark("mathvista", answers_to(records, given))
    assert found["accuracy"] == pytest.approx((1 + 1 / 3) / 2)
    assert found["by"]["category"]["general-vqa"] == {"accuracy": 0.75, "count": 2}


@pytest.mark.parametrize("name", Benchmark)
def test_no_responses_make_no_scores(name: Benchmark) -> None:
    assert score_benchmark(name, []) == {}


def test_option_texts_that_could_be_letters_do_not_count() -> None:
    assert option_answers("A", ["B", "C"]) == ()
    assert option_answers("A", ["(b).", "C"]) == ()
    assert option_answers("A", ["option B", "C"]) == ()
    assert option_answers("B", ["5", "6"]) == ("6",)
    assert option_answers("A", ["same", "Same "]) == ()
    assert option_answers("C", ["5", "6"]) == () == option_answers("AB", ["5", "6"])


BROKEN = [
    ("mathvista", {"answer": "neither"}, "is none of the choices"),
    ("mathvista", {"pid": None}, "the row has no `pid`"),
    ("mathvista", {"decoded_image": None, "image": "http://x/y.png"}, "is a URL"),
]


@pytest.mark.parametrize(("name", "change", "message"), BROKEN)
def test_a_row_that_is_not_as_published_is_named(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "testmini.parquet", [MATHVISTA[1], {**MATHVISTA[0], **change}])
    with pytest.raises(DataError, match=message) as caught:
        list(read_benchmark(name, path))
    assert caught.value.where == f"{path}:2"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (mmmu_row("validation_Music_1", answer="E"), "is no letter of the 4 options"),
        (mmmu_row("validation_Music_1", options="__import__('os')"), "`options` is not a list"),
        (mmmu_row("validation_Music_1", options="[" * 300), "`options` is not a list"),
        (mmmu_row("validation_Music_1", question="<image 3>"), "names image 3, and the row has none"),
        (mmmu_row("validation_Music_1", question_type="open", answer="[]"), "there is no answer"),
    ],
)
def test_hostile_mmmu_rows(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message):
        list(read_benchmark("mmmu", write_parquet(tmp_path / "validation.parquet", [row])))


def test_files_that_are_not_there_or_not_readable(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a" / "train.parquet", MATHVISTA)
    with pytest.raises(DataError, match=r"no file below this folder is one of .*testmini"):
        list(read_benchmark("mathvista", tmp_path / "a"))
    (tmp_path / "testmini.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(DataError, match="not readable parquet"):
        list(read_benchmark("mathvista", tmp_path / "testmini.parquet"))
    (tmp_path / "testmini.json").write_text("[1]")
    with pytest.raises(DataError, match="a row is not an object"):
        list(read_benchmark("mathvista", tmp_path / "testmini.json"))
    (tmp_path / "testmini.json").write_text("3")
    with pytest.raises(DataError, match="not JSON"):
        list(read_benchmark("mathvista", tmp_path / "testmini.json"))
    with pytest.raises(DataError, match=r"holds files of \.json and \.parquet"):
        list(read_benchmark("mathvista", tmp_path))
    (tmp_path / "testmini.tsv").write_text("")
    with pytest.raises(DataError, match="a benchmark's file ends in"):
        list(read_benchmark("mathvista", tmp_path / "testmini.tsv"))


JUNK = (
    None,
    "",
    "x",
    0,
    -1,
    3.5,
    True,
    [],
    ["a"],
    {},
    {"a": 1},
    "[1,",
    "['a', 'b']",
    "<image>",
    "../../etc/passwd",
    "\0",
    10**400,
)
GIVEN = (None, "A", "(B)", "yes", "1e999", "[1,2]", "\0", "(" * 300, "9" * 500, "nan", "", ".")


def test_rows_of_junk_are_data_errors_or_records_that_can_be_scored(tmp_path: Path) -> None:
    published = {
        "mathvista": MATHVISTA,
        "mathvision": [{**row, "image": "a.png"} for row in MATHVISION],
        "mathverse": [mathverse_row(1, "Text Lite")],
        "wemath": wemath_rows()[:7],
        "mmmu": [mmmu_row("validation_Music_1")],
        "mmmu_pro": [{**mmmu_row("test_Music_1"), "subject": "Music"}],
        "hallusionbench": [hallusion_row(place, truth) for place, truth in HALLUSION.items()],
    }
    generator, outcomes = random.Random(0), {"records": 0, "errors": 0}
    for _ in range(700):
        name = generator.choice(list(published))
        rows = [{column: value for column, value in row.items() if "bytes" not in str(value)} for row in published[name]]
        row = generator.choice(rows)
        row[generator.choice(list(row))] = generator.choice(JUNK)
        path = write_json(tmp_path / f"{name}.json", rows)
        try:
            records = list(read_benchmark(name, path))
        except DataError as error:
            outcomes["errors"] += 1
            assert error.where is not None and error.where.startswith(str(path))
            continue
        outcomes["records"] += 1
        json.dumps(score_benchmark(name, [Answered(record, [sample(generator.choice(GIVEN), 0.0)]) for record in records]))
    assert min(outcomes.values()) > 100, outcomes
