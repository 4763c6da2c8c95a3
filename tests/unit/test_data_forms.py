"""The RL form, other column names, paths that name several files, and WebDataset shards."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_nemo.config.schema import DataConfig
from prism_nemo.data.columns import check_columns
from prism_nemo.data.forms import Reading, form_of, to_record
from prism_nemo.data.open import open_file
from prism_nemo.data.paths import expand_paths
from prism_nemo.data.readers import RecordSet, read_records
from prism_nemo.data.records import ImageSource, Record
from prism_nemo.errors import ConfigError, DataError

TURNS = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "<image>how many?"}]
RL = {
    "prompt": TURNS,
    "images": [{"bytes": b"\x89PNG", "path": None}],
    "reward_model": {"style": "rule", "ground_truth": "3"},
    "data_source": "kitchen",
    "extra_info": {"index": 7},
    "teacher_caption": "plates",
    "teacher_cot": "one two three",
    "teacher_response": None,
    "equivalent_answers": ["three", "3.0"],
    "answer_kind": "number",
}


def record_of(item: dict[str, Any], **columns: str) -> Record:
    return to_record(item, "a", Reading(Path("/root"), columns))


# The RL form


def check_rl(record: Record) -> None:
    assert (record.prompt, record.answer, record.source, record.answer_kind) == ("<image>how many?", "3", "kitchen", "number")
    assert record.equivalent_answers == ("three", "3.0")
    assert record.metadata == {"index": 7, "system": "be brief"}
    assert record.images == (ImageSource(data=b"\x89PNG"),)
    assert record.response == "<caption> plates </caption> <think> one two three </think> <answer> 3 </answer>"


def test_rl_records_from_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([RL, RL]), tmp_path / "rl.parquet")
    records = read_records(tmp_path / "rl.parquet", image_root=None).records
    assert [record.id for record in records] == ["rl:1", "rl:2"]
    for record in records:
        check_rl(record)


def test_rl_records_with_json_text_in_their_columns() -> None:
    texts = {name: json.dumps(RL[name]) for name in ("reward_model", "extra_info", "equivalent_answers")}
    check_rl(record_of(RL | texts))


def test_prompts_of_the_rl_form_may_be_text_and_images_paths() -> None:
    record = record_of({"prompt": "how many?", "images": ["x.png"], "reward_model": {"ground_truth": 3}})
    assert (record.prompt, record.answer, record.images) == ("<image>how many?", "3", (ImageSource(Path("/root/x.png")),))


def test_a_teacher_response_and_an_answer_of_its_own_come_first() -> None:
    record = record_of(RL | {"teacher_response": "whole", "answer": "4"})
    assert (record.response, record.answer) == ("whole", "4")


def test_forms_are_told_by_their_fields() -> None:
    items: list[dict[str, Any]] = [{"messages": []}, {"conversations": []}, RL, {"prompt": "q"}, {"question": "q"}, {"text": ""}]
    assert [form_of(item) for item in items] == ["sharegpt", "sharegpt", "rl", "pairwise", "pairwise", None]


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (RL | {"reward_model": "3"}, "`reward_model` is text"),
        (RL | {"reward_model": '{"ground_truth"'}, "`reward_model` is not JSON"),
        (RL | {"reward_model": {"ground_truth": ["3"]}}, "`ground_truth` is a list"),
        (RL | {"extra_info": 3}, "`extra_info` is a number"),
        (RL | {"equivalent_answers": [[]]}, "`equivalent_answers` is a list"),
        (RL | {"equivalent_answers": '["'}, "`equivalent_answers` is not JSON"),
        (RL | {"data_source": 3}, "`data_source` is a number"),
        (RL | {"prompt": {"role": "user"}}, "`prompt` is an object"),
        (RL | {"prompt": [*TURNS, {"role": "user", "content": "again"}]}, "the turns are system, user, user"),
    ],
)
def test_rl_records_that_cannot_be_used(item: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        record_of(item)


# Other names


def test_columns_and_tags() -> None:
    turns = [{"speaker": "bot", "text": "three"}]
    item = {"no": 7, "dialog": [{"speaker": "USER", "text": "how many?"}, *turns], "pics": ["x.png"], "truth": "3"}
    columns = {"messages": "dialog", "images": "pics", "answer": "truth", "role_tag": "speaker", "content_tag": "text"}
    record = record_of(item, **columns, user_tag="USER", assistant_tag="bot")
    assert (record.prompt, record.response, record.answer) == ("<image>how many?", "three", "3")


def test_a_file_with_the_usual_names_is_read_all_the_same() -> None:
    record = record_of({"messages": TURNS, "images": ["x.png"]}, messages="dialog", user_tag="USER")
    assert record.prompt == "<image>how many?"


def test_unknown_columns() -> None:
    with pytest.raises(ConfigError, match="mesages: no field of a record"):
        check_columns({"mesages": "dialog"}, "data.columns")


def test_columns_rename_ids(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"uid": "x7", "prompt": "q"}\n{"uid": "x8"}\n')
    data = DataConfig(columns={"id": "uid"}, max_bad_sample_share=0.5)
    found = open_file(str(tmp_path / "d.jsonl"), data, required=())
    assert ([one.id for one in found.records], [one.id for one in found.bad]) == (["x7"], ["x8"])


# Paths


def test_paths(tmp_path: Path) -> None:
    names = ["a.jsonl", "b.json", "part-08.tar", "part-09.tar", "part-10.tar", "notes.txt", ".hidden.jsonl", "odd[1].jsonl"]
    for name in names:
        (tmp_path / name).write_text("")
    (tmp_path / "empty.jsonl").mkdir()

    def found(spec: str) -> list[str]:
        return [path.name for path in expand_paths(str(tmp_path / spec))]

    assert found("a.jsonl") == ["a.jsonl"]
    assert found("odd[1].jsonl") == ["odd[1].jsonl"]
    assert found("part-{08..10}.tar") == ["part-08.tar", "part-09.tar", "part-10.tar"]
    assert found("{b.json,a.jsonl}") == ["b.json", "a.jsonl"]
    assert found("part-*.tar") == ["part-08.tar", "part-09.tar", "part-10.tar"]
    assert found("part-{0,1}[89].tar".replace("{0,1}", "0")) == ["part-08.tar", "part-09.tar"]
    assert found("") == ["a.jsonl", "b.json", "odd[1].jsonl", "part-08.tar", "part-09.tar", "part-10.tar"]
    for spec, message in {
        "none.jsonl": "does not exist",
        "part-{08..11}.tar": "does not exist",
        "*.parquet": "no data file has a name of this pattern",
        "empty.jsonl": "the folder holds no data files",
        "notes.txt": "is not a data file",
        "a.tar.gz": "is compressed",
        "x-{9..1}.tar": "counts down",
        "x-{0..999999999}.tar": "more than 100000 files",
    }.items():
        with pytest.raises(DataError, match=message):
            found(spec)


def test_a_folder_is_read_as_one(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"prompt": "2"}\n')
    (tmp_path / "a.json").write_text('[{"prompt": "0"}, {"prompt": "1"}]')
    found = open_file(str(tmp_path), DataConfig(), required=())
    assert [(one.id, one.prompt) for one in found.records] == [("a:1", "0"), ("a:2", "1"), ("b:1", "2")]


# WebDataset


def write_tar(path: Path, members: dict[str, bytes | dict[str, Any] | tarfile.TarInfo], **options: Any) -> Path:
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def read_tar(tmp_path: Path, members: dict[str, Any], **options: Any) -> RecordSet:
    path = write_tar(tmp_path / "s.tar", members, **options)
    return read_records(path, image_root=None, max_bad_sample_share=1.0)


QUESTION = {"prompt": "how many?", "answer": "3"}


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_shards(tmp_path: Path, format: int) -> None:
    long = "x" * 90 + "/" + "y" * 80
    found = read_tar(
        tmp_path,
        {
            "000.json": QUESTION,
            "000.jpg": b"one",
            "001.10.png": b"eleventh",
            "001.2.png": b"third",
            "001.json": QUESTION | {"id": "own"},
            "002.txt": b"what is it?",
            "002.webp": b"w",
            f"{long}.json": QUESTION,
            f"{long}.0.jpg": b"long",
            "dir/004.json": QUESTION | {"images": ["b.jpg", "a.jpg"]},
            "dir/004.a.jpg": b"a",
            "dir/004.b.jpg": b"b",
            "005.json": QUESTION | {"images": ["beside.png"]},
        },
        format=format,
    )
    assert not found.bad
    told = [(one.id, one.prompt, [image.data for image in one.images]) for one in found.records]
    assert told == [
        ("000", "<image>how many?", [b"one"]),
        ("own", "<image><image>how many?", [b"third", b"eleventh"]),
        ("002", "<image>what is it?", [b"w"]),
        (long, "<image>how many?", [b"long"]),
        ("dir/004", "<image><image>how many?", [b"b", b"a"]),
        ("005", "<image>how many?", [None]),
    ]
    assert found.records[-1].images[0].path == tmp_path / "beside.png"


def link(kind: bytes, target: str) -> tarfile.TarInfo:
    member = tarfile.TarInfo("b.jpg")
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"b.jpg": b"x"}, "neither .json nor .txt"),
        ({"b.json": b"{", "b.jpg": b"x"}, "Expecting property name"),
        ({"b.txt": b"\xff"}, "not UTF-8"),
        ({"../b.json": QUESTION}, "leads out of the shard"),
        ({"/etc/b.json": QUESTION}, "leads out of the shard"),
        ({"b.json": QUESTION, "b.jpg": link(tarfile.SYMTYPE, "/etc/passwd")}, "not a plain file"),
        ({"b.json": QUESTION, "b.jpg": link(tarfile.LNKTYPE, "a.jpg")}, "not a plain file"),
        ({"b.json": QUESTION, "b.fifo": link(tarfile.FIFOTYPE, "")}, "not a plain file"),
        ({"b.json": QUESTION | {"images": ["c.jpg"]}, "b.jpg": b"x"}, "no image 'c.jpg'"),
        ({"b.json": QUESTION | {"images": [3]}, "b.jpg": b"x"}, "no image 3"),
        ({"b.json": b"[1]"}, "a record is an object"),
    ],
)
def test_samples_that_cannot_be_used(tmp_path: Path, members: dict[str, Any], message: str) -> None:
    """Nothing is written anywhere, and the samples around them are read."""
    found = read_tar(tmp_path, {"a.json": QUESTION, "a.jpg": b"x", **members, "c.json": QUESTION, "c.jpg": b"y"})
    assert [one.id for one in found.records] == ["a", "c"]
    assert message in found.bad[0].reason
    assert found.bad[0].where == f"{tmp_path / 's.tar'}:2"
    assert [path.name for path in tmp_path.iterdir()] == ["s.tar"]


def test_a_shard_that_was_cut(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "w.tar", {f"{n}.{kind}": QUESTION for n in range(4) for kind in ("json", "x")}).read_bytes()
    (tmp_path / "s.tar").write_bytes(whole[: 7 * 1024 + 600])  # within the last member's content
    found = read_records(tmp_path / "s.tar", image_root=None, max_bad_sample_share=1.0)
    assert [one.id for one in found.records] == ["0", "1", "2"]
    assert [one.reason.partition(" (")[0] for one in found.bad] == ["the shard ends within this sample"]


def test_a_shard_with_a_hole(tmp_path: Path) -> None:
    """What lies behind a damaged header cannot be found; that it is lost is told."""
    data = bytearray(write_tar(tmp_path / "s.tar", {f"{n}.json": QUESTION for n in range(4)}).read_bytes())
    data[2 * 1024 : 2 * 1024 + 512] = b"\xa5" * 512
    (tmp_path / "s.tar").write_bytes(data)
    found = read_records(tmp_path / "s.tar", image_root=None, max_bad_sample_share=1.0)
    assert [one.id for one in found.records] == ["0", "1"]
    assert "the shard is damaged here" in found.bad[0].reason


def test_what_is_no_shard(tmp_path: Path) -> None:
    for content, message in {b"": "not a tar archive", b"x" * 2000: "not a tar archive", b"\x1f\x8b1234": "gzip"}.items():
        (tmp_path / "s.tar").write_bytes(content)
        with pytest.raises(DataError, match=message):
            read_records(tmp_path / "s.tar", image_root=None)
