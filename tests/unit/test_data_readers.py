"""Data files in every form the readers take, and every way in which a record or a file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prism_nemo.data.readers import RecordSet, read_records
from prism_nemo.data.records import ImageSource, VideoSource
from prism_nemo.data.sources import video_item, video_source
from prism_nemo.errors import DataError

USER = {"role": "user", "content": "how many?"}
ASSISTANT = {"role": "assistant", "content": "three"}


def write_lines(path: Path, *items: object) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
    return path


def read_one(tmp_path: Path, item: dict[str, Any]) -> Any:
    return read_records(write_lines(tmp_path / "d.jsonl", item), image_root=None).records[0]


def reason(tmp_path: Path, item: object) -> str:
    """Why a single record is refused."""
    found = read_records(write_lines(tmp_path / "d.jsonl", item), image_root=None, max_bad_sample_share=1.0)
    assert not found.records
    return found.bad[0].reason


def test_sharegpt_messages_with_every_field(tmp_path: Path) -> None:
    record = read_one(
        tmp_path,
        {
            "id": "a-1",
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": "<image>how <image>many?"},
                ASSISTANT,
            ],
            "images": ["x.png", "sub/y.png"],
            "answer": 3,
            "caption": "two plates",
            "probe_response": "four",
            "student_response": "five",
            "metadata": {"source": "kitchen"},
        },
    )
    assert record.id == "a-1"
    assert record.prompt == "<image>how <image>many?"
    assert record.images == (ImageSource(path=tmp_path / "x.png"), ImageSource(path=tmp_path / "sub/y.png"))
    assert (record.response, record.student_response, record.answer) == ("three", "five", "3")
    assert (record.caption, record.probe_response) == ("two plates", "four")
    assert record.metadata == {"source": "kitchen", "system": "be brief"}


def test_sharegpt_conversations(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "how many?"}, {"from": "gpt", "value": "three"}]
    record = read_one(tmp_path, {"conversations": turns, "system": "be brief"})
    assert (record.prompt, record.response, record.images, record.metadata) == ("how many?", "three", (), {"system": "be brief"})


def test_a_prompt_without_a_response(tmp_path: Path) -> None:
    record = read_one(tmp_path, {"messages": [USER], "answer": "3"})
    assert (record.response, record.answer) == (None, "3")


def test_placeholders_are_put_in_front_where_there_are_none(tmp_path: Path) -> None:
    assert read_one(tmp_path, {"messages": [USER], "images": ["x.png", "y.png"]}).prompt == "<image><image>how many?"
    assert read_one(tmp_path, {"prompt": "how many?", "image": "x.png"}).prompt == "<image>how many?"


@pytest.mark.parametrize(
    ("given", "times"),
    [
        ({"path": "clip", "fps": 4}, {"fps": 4.0}),
        ({"path": "clip", "timestamps": [0, 0.5, 0.5]}, {"timestamps": (0.0, 0.5, 0.5)}),
        ({"path": "clip.mp4", "bytes": None, "frames": None, "fps": None, "timestamps": None}, {}),
        ("clip.mp4", {}),
    ],
)
def test_videos_by_path(tmp_path: Path, given: object, times: dict[str, Any]) -> None:
    name = given if isinstance(given, str) else given["path"]  # type: ignore[index]
    expected = (VideoSource(path=tmp_path / name, **times),)
    assert read_one(tmp_path, {"messages": [USER], "videos": [given]}).videos == expected
    record = read_one(tmp_path, {"prompt": "how many?", "video": given})
    assert (record.videos, record.prompt, record.images) == (expected, "<video>how many?", ())


def test_videos_as_frames_and_bytes(tmp_path: Path) -> None:
    file = tmp_path / "d.parquet"
    frames = {"frames": [{"bytes": b"\x89PNG", "path": None}, {"bytes": None, "path": "b.png"}], "fps": 2.0}
    rows = [{"prompt": "q", "videos": [frames]}, {"prompt": "q", "videos": [{"bytes": b"mp4"}]}]
    pq.write_table(pa.Table.from_pylist(rows), file)
    first, second = read_records(file, image_root=None).records
    assert first.videos == (VideoSource(frames=(ImageSource(data=b"\x89PNG"), ImageSource(path=tmp_path / "b.png")), fps=2.0),)
    assert second.videos == (VideoSource(data=b"mp4"),)


def test_images_and_several_videos(tmp_path: Path) -> None:
    both = {"images": ["x.png"], "videos": ["a.mp4", {"frames": ["b/1.png", "b/2.png"], "timestamps": [0, 3]}]}
    record = read_one(tmp_path, {"messages": [{"role": "user", "content": "<video>or <image>or <video>?"}], **both})
    assert record.prompt == "<video>or <image>or <video>?"
    assert [video.timestamps for video in record.videos] == [None, (0.0, 3.0)]
    assert [frame.path for frame in record.videos[1].frames] == [tmp_path / "b/1.png", tmp_path / "b/2.png"]
    assert read_one(tmp_path, {"messages": [USER], **both}).prompt == "<image><video><video>how many?"
    assert read_one(tmp_path, {"prompt": "in <image>?", **both}).prompt == "<video><video>in <image>?"


def test_content_in_parts(tmp_path: Path) -> None:
    content = [
        {"type": "text", "text": "from "},
        {"type": "image", "image": "x.png"},
        {"type": "text", "text": " to "},
        {"type": "video", "video": ["1.png", "2.png"], "fps": 2},
        {"type": "video", "video": "clip", "timestamps": [1, 2]},
        {"type": "video", "video": {"path": "clip.mp4"}},
    ]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": [{"type": "text", "text": "three"}]}]
    record = read_one(tmp_path, {"messages": turns})
    assert (record.prompt, record.response) == ("from <image> to <video><video><video>", "three")
    assert record.images == (ImageSource(path=tmp_path / "x.png"),)
    frames = tuple(ImageSource(path=tmp_path / f"{number}.png") for number in (1, 2))
    assert record.videos == (
        VideoSource(frames=frames, fps=2.0),
        VideoSource(path=tmp_path / "clip", timestamps=(1.0, 2.0)),
        VideoSource(path=tmp_path / "clip.mp4"),
    )
    bare = [{"type": "video"}, {"type": "text", "text": "how many?"}]
    record = read_one(tmp_path, {"messages": [{"role": "user", "content": bare}], "videos": ["a.mp4"]})
    assert (record.prompt, record.videos) == ("<video>how many?", (VideoSource(path=tmp_path / "a.mp4"),))


def test_video_items_come_back(tmp_path: Path) -> None:
    items = [
        {"frames": ["b/1.png", "b/2.png"], "timestamps": [0.0, 3.0]},
        {"frames": ["b/1.png"], "fps": 2.0},
        {"path": "clip", "fps": 0.5},
        {"path": "clip.mp4"},
    ]
    for item in items:
        assert video_item(video_source(item, tmp_path), lambda image: str((image.path or Path()).relative_to(tmp_path))) == item


def test_image_paths_are_taken_from_the_root(tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "d.jsonl", {"messages": [USER], "images": ["x.png"]}, {"messages": [USER], "images": ["/y.png"]}
    )
    records = read_records(file, image_root=tmp_path / "pictures").records
    assert [record.images[0].path for record in records] == [tmp_path / "pictures/x.png", Path("/y.png")]


def test_pairs_of_whole_responses(tmp_path: Path) -> None:
    record = read_one(
        tmp_path, {"prompt": "q", "image": "x.png", "teacher_response": "good", "student_response": "bad", "answer": "3"}
    )
    assert (record.prompt, record.response, record.student_response, record.answer) == ("<image>q", "good", "bad", "3")


def test_pairs_of_parts_are_put_together(tmp_path: Path) -> None:
    parts = {
        "question": "q",
        "teacher_caption": " a dog ",
        "teacher_cot": "dogs bark",
        "answer": "bark",
        "student_caption": "<caption>a cat</caption>",
        "student_cot": "<think>cats mew</think> <answer>mew</answer>",
    }
    record = read_one(tmp_path, parts)
    assert record.response == "<caption> a dog </caption> <think> dogs bark </think> <answer> bark </answer>"
    assert record.student_response == "<caption>a cat</caption> <think>cats mew</think> <answer>mew</answer>"
    record = read_one(tmp_path, parts | {"student_cot": "cats mew", "student_answer": "mew", "teacher_answer": "woof"})
    assert record.response.endswith("<answer> woof </answer>")
    assert record.student_response == "<caption>a cat</caption> <think> cats mew </think> <answer> mew </answer>"


def test_a_students_answer_is_never_taken_from_the_truth(tmp_path: Path) -> None:
    assert "no `student_answer`" in reason(tmp_path, {"prompt": "q", "student_caption": "c", "student_cot": "t", "answer": "3"})


def test_json_lists_and_ids(tmp_path: Path) -> None:
    file = tmp_path / "d.json"
    file.write_text(json.dumps([{"messages": [USER]}, {"messages": [USER], "id": 7}, {"messages": [USER], "id": ""}]))
    assert [record.id for record in read_records(file, image_root=None).records] == ["d:1", "7", "d:3"]


def test_jsonl_ids_are_line_numbers_and_blank_lines_count(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    line = json.dumps({"messages": [USER]})
    file.write_text(f"{line}\n\n  \n{line}")
    assert [record.id for record in read_records(file, image_root=None).records] == ["d:1", "d:4"]


def test_parquet_with_images_as_bytes(tmp_path: Path) -> None:
    file = tmp_path / "d.parquet"
    rows = [
        {"messages": [USER, ASSISTANT], "images": [{"bytes": b"\x89PNG", "path": "x.png"}], "answer": 3},
        {"messages": [USER, ASSISTANT], "images": [{"bytes": None, "path": "y.png"}], "answer": 4},
    ]
    pq.write_table(pa.Table.from_pylist(rows), file)
    first, second = read_records(file, image_root=None).records
    assert first.images == (ImageSource(data=b"\x89PNG"),)
    assert second.images == (ImageSource(path=tmp_path / "y.png"),)
    assert (first.id, second.id, second.answer, first.response) == ("d:1", "d:2", "4", "three")


def test_parquet_with_plain_byte_images(tmp_path: Path) -> None:
    file = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": "q", "image": b"\x00\xff"}]), file)
    assert read_records(file, image_root=None).records[0].images == (ImageSource(data=b"\x00\xff"),)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ([1], "a record is an object, this is a list"),
        ({"text": "hello"}, "neither `messages`, `conversations` nor `prompt`"),
        ({"messages": "hello"}, "`messages` is text, not a list"),
        ({"messages": ["hello"]}, "a turn of `messages` is text"),
        ({"messages": []}, "the turns are none"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "the role 'tool'"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"the role \['user'\]"),
        ({"messages": [{"role": "user", "content": None}]}, "the user turn holds nothing, not text"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "the assistant's turn is empty"),
        ({"messages": [ASSISTANT]}, "the turns are assistant"),
        ({"messages": [USER, ASSISTANT, USER, ASSISTANT]}, "the turns are user, assistant, user, assistant"),
        ({"messages": [USER, {"role": "system", "content": "x"}]}, "the turns are user, system"),
        ({"messages": [{"role": "user", "content": " "}]}, "the prompt is empty"),
        ({"prompt": "<image> q"}, "1 <image> placeholders for 0 images"),
        ({"prompt": "<image> q", "images": ["a", "b"]}, "1 <image> placeholders for 2 images"),
        ({"prompt": "q", "image": "https://example.com/a.png"}, "is a URL"),
        ({"prompt": "q", "image": "file:///etc/passwd"}, "is a URL"),
        ({"prompt": "q", "image": "data:image/png;base64,AAAA"}, "is a URL"),
        ({"prompt": "q", "image": ""}, "an image is text, not a path or bytes"),
        ({"prompt": "q", "image": "a\0b"}, "not a path or bytes"),
        ({"prompt": "q", "images": [3]}, "an image is a number"),
        ({"prompt": "q", "images": [{"path": None}]}, "an image is nothing"),
        ({"prompt": "<video> q"}, "1 <video> placeholders for 0 videos"),
        ({"prompt": "<video> q", "videos": ["a", "b"]}, "1 <video> placeholders for 2 videos"),
        ({"prompt": "q", "video": "https://example.com/a.mp4"}, "the video .* is a URL"),
        ({"prompt": "q", "videos": [3]}, "a video is a number, not a path or bytes"),
        ({"prompt": "q", "videos": [{"fps": 2}]}, "a video is nothing"),
        ({"prompt": "q", "videos": [["a.png", "b.png"]]}, "the video's frames have no times"),
        ({"prompt": "q", "videos": [{"frames": [], "fps": 2}]}, "a video's frames are none"),
        ({"prompt": "q", "videos": [{"frames": "a.png", "fps": 2}]}, "a video's frames are text"),
        ({"prompt": "q", "videos": [{"frames": ["http://a/b.png"], "fps": 2}]}, "the image .* is a URL"),
        ({"prompt": "q", "videos": [{"path": "a", "fps": 0}]}, "a video's `fps` is 0"),
        ({"prompt": "q", "videos": [{"path": "a", "fps": float("inf")}]}, "the line is not JSON: Infinity is no number"),
        ({"prompt": "q", "videos": [{"path": "a", "fps": 10**400}]}, "a video's `fps` is 1000"),
        ({"prompt": "q", "videos": [{"path": "a", "fps": 1e-300}]}, "a video's `fps` is 1e-300"),
        ({"prompt": "q", "videos": [{"path": "a", "timestamps": [0, 1e300]}]}, "`timestamps` are not seconds in order"),
        ({"prompt": "q", "videos": [{"path": "a", "fps": "24"}]}, "a video's `fps` is '24'"),
        ({"prompt": "q", "videos": [{"path": "a", "fps": True}]}, "a video's `fps` is True"),
        ({"prompt": "q", "videos": [{"path": "a", "fps": 2, "timestamps": [0]}]}, "both `fps` and `timestamps`"),
        ({"prompt": "q", "videos": [{"path": "a", "timestamps": [1, 0.5]}]}, "`timestamps` are not seconds in order"),
        ({"prompt": "q", "videos": [{"path": "a", "timestamps": [-1, 0]}]}, "`timestamps` are not seconds in order"),
        ({"prompt": "q", "videos": [{"path": "a", "timestamps": [0, None]}]}, "`timestamps` are not seconds in order"),
        ({"prompt": "q", "videos": [{"path": "a", "timestamps": 3}]}, "`timestamps` are not seconds in order"),
        ({"prompt": "q", "videos": [{"frames": ["a", "b"], "timestamps": [0]}]}, "1 timestamps for 2 frames"),
        ({"messages": [{"role": "user", "content": [{"type": "sound"}]}]}, "a part of the user turn is of type 'sound'"),
        ({"messages": [{"role": "user", "content": ["text"]}]}, "a part of the user turn is text"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]}, "of type 'text'"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "image", "image": "a"}]}]}, "holds images or videos"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "a"}]}], "images": ["b"]},
            "images are both in the turn and in the record's own field",
        ),
        ({"prompt": "q", "audios": ["a.wav"]}, "audios are not supported"),
        ({"prompt": 3}, "`prompt` is a number"),
        ({"prompt": "q", "answer": True}, "`answer` is true or false"),
        ({"prompt": "q", "caption": ["c"]}, "`caption` is a list"),
        ({"prompt": "q", "metadata": "m"}, "`metadata` is text"),
        ({"prompt": "q", "teacher_caption": "c"}, "only one of `teacher_caption` and `teacher_cot`"),
        ({"prompt": "q", "teacher_caption": "c", "teacher_cot": "t"}, "no `teacher_answer`"),
    ],
)
def test_records_that_cannot_be_used(tmp_path: Path, item: object, message: str) -> None:
    import re

    assert re.search(message, reason(tmp_path, item))


def test_bad_records_are_listed_with_their_line(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    good = json.dumps({"messages": [USER]})
    deep = "[" * 100_000
    file.write_bytes(f'{good}\n{{"messages": \n'.encode() + b'"\xff"\n' + f"{deep}\n{good}\n".encode())
    found = read_records(file, image_root=None, max_bad_sample_share=0.6)
    assert [record.id for record in found.records] == ["d:1", "d:5"]
    assert [(bad.id, bad.where) for bad in found.bad] == [("d:2", f"{file}:2"), ("d:3", f"{file}:3"), ("d:4", f"{file}:4")]
    assert all("not JSON" in bad.reason for bad in found.bad)


def test_too_large_a_share_of_bad_records_is_an_error(tmp_path: Path) -> None:
    items: list[object] = [{"messages": [USER]}] * 98 + ["x", "y"]
    file = write_lines(tmp_path / "d.jsonl", *items)
    assert len(read_records(file, image_root=None, max_bad_sample_share=0.02).bad) == 2
    with pytest.raises(DataError) as error:
        read_records(file, image_root=None)  # the configuration's default is one in a hundred
    text = str(error.value)
    assert "2 of 100 records cannot be used" in text
    assert f"d:99 [{file}:99]: a record is an object" in text
    assert "data.max_bad_sample_share" in text


def test_a_long_list_of_bad_records_is_cut_in_the_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)d:5 .*and 3 more") as error:
        read_records(write_lines(tmp_path / "d.jsonl", *range(8)), image_root=None)
    assert "d:6" not in str(error.value)


def fails(file: Path, content: bytes | None = None) -> str:
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_records(file, image_root=None)
    assert error.value.where == str(file)
    return error.value.what


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "does not exist" in fails(tmp_path / "missing.jsonl")
    assert "does not exist" in fails(tmp_path)
    assert "is not a data file" in fails(tmp_path / "d.csv", b"a,b")
    assert "holds no records" in fails(tmp_path / "d.jsonl", b"\n")
    assert "holds no records" in fails(tmp_path / "d.json", b"[]")
    assert "not JSON" in fails(tmp_path / "d.json", b'[{"messages": ')
    assert "holds an object, not a list" in fails(tmp_path / "d.json", b"{}")
    assert "not readable parquet" in fails(tmp_path / "d.parquet", b"PAR1 but not really PAR1")


def test_a_truncated_parquet_file(tmp_path: Path) -> None:
    file = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_pylist([{"prompt": "q"}] * 100), file)
    assert "not readable parquet" in fails(file, file.read_bytes()[:-20])


def test_require_names_the_record_and_the_field(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "d.jsonl", {"id": "a", "messages": [USER, ASSISTANT]}, {"id": "b", "messages": [USER]})
    found: RecordSet = read_records(file, image_root=None)
    with pytest.raises(DataError, match="record b has no response"):
        found.require("response")
    with pytest.raises(DataError, match="record a has no answer and no caption"):
        found.require("response", "answer", "caption")
    assert found.require() is found


def test_image_paths_stay_right_when_the_data_file_is_named_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    line = {"messages": [{"role": "user", "content": "<image> largest"}], "images": ["images/a.png"]}
    (tmp_path / "runs" / "data.jsonl").write_text(json.dumps(line) + "\n")
    monkeypatch.chdir(tmp_path)
    (record,) = read_records(Path("runs/data.jsonl"), image_root=None).records
    assert record.images[0].path == tmp_path / "runs" / "images" / "a.png"
