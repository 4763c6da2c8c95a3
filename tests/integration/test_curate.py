"""The `curate` command: which prompts it asks a teacher about, what it keeps, and that no stop and no kill makes it pay twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.chat_server import KEY, VARIABLE, Answer, ChatServer, Seen, chat_server, until
from helpers.digits_teacher import teacher
from helpers.stages import run_stage, settings, tiny_task
from PIL import Image

from prism_nemo.data.readers import read_records
from prism_nemo.endpoint.errors import BudgetExhausted, EndpointError
from prism_nemo.errors import ConfigError, DataError
from prism_nemo.rewards.format import parse_response
from prism_nemo.stages.parts import PartFiles

FEW = "limit_samples=20"
ALL = ("curate.unsolved_only=false", "model.path=''")
TRIES = ("rollout.num_rollouts_per_prompt=4", "rollout.max_batch_size=24")


def curate(run: Path, server: ChatServer, *overrides: str) -> Path:
    return run_stage("curate", run, f"teacher.base_url={server.base_url}", *overrides)


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def report(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


def state(run: Path) -> str:
    return json.loads((run / "status.json").read_text())["state"]


def results(run: Path) -> list[bytes]:
    return [(run / name).read_bytes() for name in ("curated.jsonl", "left_out.jsonl")]


def sometimes(record: str, attempt: int, text: str) -> str:
    """A teacher that is right at once, later, or never, and forgets the format now and then."""
    number = int(record.rpartition("-")[2])
    if number % 4 == 1 and attempt == 0:
        return text.replace("<answer>", "<answer>1")
    if number % 4 == 2 and attempt < 2:
        return "The answer is 3."
    return text.replace("<answer>", "<answer>7") if number % 8 == 3 else text


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Seen]]:
    """A run over all prompts that nobody stopped, and what it asked."""
    with chat_server(teacher(sometimes)) as server:
        return curate(tmp_path_factory.mktemp("curate") / "run", server, *ALL, FEW), server.seen


# What is asked, and what is kept


def test_what_a_run_asks_and_writes(whole: tuple[Path, list[Seen]]) -> None:
    run, seen = whole
    records = {record.id: record for record in read_records(tiny_task().data.prompts, image_root=None).records}
    found = {row["id"]: row for row in rows(run / "curated.jsonl")}
    left_out = rows(run / "left_out.jsonl")
    assert len(found) + len(left_out) == 20 and len(left_out) == 3
    assert {(row["reason"], row["detail"]) for row in left_out} == {("teacher: wrong answer", "the last of 4 answers")}
    for name, row in found.items():
        record, number = records[name], int(name.rpartition("-")[2])
        system_less, response = row["messages"]
        assert system_less == {"role": "user", "content": record.prompt}
        parsed = parse_response(response["content"])
        assert parsed is not None and parsed.answer == row["answer"] == record.answer and parsed.caption == record.caption
        assert row["metadata"]["teacher_answers"] == {1: 2, 2: 3}.get(number % 4, 1)
        assert row["metadata"]["teacher"] == "teacher" and row["metadata"]["digits"] == record.metadata["digits"]
        assert tiny_task().data.root / row["images"][0] == record.images[0].path
    assert list(found) == sorted(found), "the records' own order"
    assert seen[0].body["messages"][0] == {"role": "system", "content": "<caption> <think> <answer>"}
    assert len({json.dumps(request.body) for request in seen}) == len(seen) == 5 + 5 * 2 + 5 * 3 + 2 + 3 * 4
    about = report(run)
    assert about["complete"] and about["counts"] == {"records": 20, "accepted": 17, "teacher: wrong answer": 3}
    assert about["usage"]["requests"] == about["usage"]["answers"] == len(seen)
    assert about["usage"]["prompt_tokens"] == 100 * len(seen) and about["image_root"] == str(tiny_task().data.root)
    assert state(run) == "finished"
    assert not list(run.glob("*_parts"))


def test_only_what_the_policy_fails_at_is_asked_and_the_stages_take_it(tmp_path: Path) -> None:
    with chat_server(teacher()) as server:
        run = curate(tmp_path / "run", server, *TRIES)
        rates = {row["id"]: row for row in rows(run / "pass_rates.jsonl")}
        found = {row["id"]: row for row in rows(run / "curated.jsonl")}
        solved = {row["id"]: row["detail"] for row in rows(run / "left_out.jsonl")}
        assert len(rates) == 64 and all(rate["of"] == 4 for rate in rates.values())
        assert found.keys() == {name for name, rate in rates.items() if rate["solved"] == 0}
        assert solved == {name: f"{rate['solved']} of 4 tries" for name, rate in rates.items() if rate["solved"]}
        assert 5 < len(found) < 60 and len(server.seen) == len(found)
        assert all((row["metadata"]["pass_rate"], row["metadata"]["tries"]) == (0.0, 4) for row in found.values())
        again = curate(
            tmp_path / "again",
            server,
            f"curate.pass_rates={run / 'pass_rates.jsonl'}",
            "model.path=''",
            "curate.max_solved_share=0.3",
        )
        some = {row["id"]: row["metadata"]["pass_rate"] for row in rows(again / "curated.jsonl")}
        assert some == {name: rate["solved"] / 4 for name, rate in rates.items() if rate["solved"] < 2}
    taken = (f"data.train={run / 'curated.jsonl'}", f"data.image_root={tiny_task().data.root}", "trainer.max_steps=1")
    for stage in ("sft", "align"):
        run_stage(stage, tmp_path / stage, *taken)
        assert (tmp_path / stage / "checkpoints" / "latest").exists()


def test_pass_rates_must_be_those_of_the_records(tmp_path: Path) -> None:
    file = tmp_path / "rates.jsonl"
    with chat_server(teacher()) as server:
        for text, what in (
            (
                '{"id": "prompts-00000", "solved": 0, "of": 4}\n',
                "19 of 20 records have no pass rate, the first of them is prompts-00001",
            ),
            ('{"id": "a", "solved": 0, "of": 4}\n{"id": "a", "solved": 1, "of": 4}\n', "a second, other pass rate of a"),
            ('{"id": "a", "solved": 5, "of": 4}\n', "no pass rate"),
            ("nonsense\n", "no pass rate"),
        ):
            file.write_text(text)
            with pytest.raises(DataError, match=what):
                curate(tmp_path / f"run {abs(hash(text))}", server, f"curate.pass_rates={file}", "model.path=''", FEW)
        assert server.seen == []


# Duplicates and benchmarks


def altered(tmp_path: Path, name: str, change: Any, count: int = 20) -> Path:
    """The prompts, changed, with their images beside them."""
    lines = rows(tiny_task().data.prompts)[:count]
    shutil.copytree(tiny_task().data.root / "images", tmp_path / "images")
    path = tmp_path / name
    path.write_text("".join(json.dumps(line) + "\n" for line in change(lines)))
    return path


def test_duplicates_and_benchmark_records_are_not_asked_about(tmp_path: Path, whole: tuple[Path, list[Seen]]) -> None:
    """A repeated record under another name, one written otherwise, and a benchmark's image that is stored and asked otherwise."""

    def change(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
        copies = [lines[4] | {"id": "again"}, lines[4] | {"id": "the next question", "messages": lines[5]["messages"]}]
        shouted = lines[7] | {"id": "shouted", "messages": [{"role": "user", "content": "<image>  LARGEST"}]}
        return [*lines, *copies, shouted]

    Image.open(tiny_task().data.root / rows(tiny_task().data.prompts)[0]["images"][0]).convert("RGB").save(tmp_path / "b.webp")
    benchmark = tmp_path / "benchmark.jsonl"
    benchmark.write_text(json.dumps({"id": "7", "messages": [{"role": "user", "content": "<image>Why?"}], "images": ["b.webp"]}))
    data = altered(tmp_path, "train.jsonl", change)
    with chat_server(teacher(sometimes)) as server:
        run = curate(tmp_path / "run", server, *ALL, f"data.train={data}", f"curate.exclude=[{benchmark}]")
    left_out = {row["id"]: (row["reason"], row["detail"]) for row in rows(run / "left_out.jsonl")}
    of_benchmark = {name for name, why in left_out.items() if why == ("benchmark image", "benchmark.jsonl: 7")}
    first = rows(tiny_task().data.prompts)[:20]
    assert of_benchmark == {line["id"] for line in first if line["images"] == first[0]["images"]} and len(of_benchmark) >= 2
    assert left_out["again"] == ("duplicate", first[4]["id"])
    assert left_out["the next question"] == ("duplicate", first[5]["id"]) and left_out["shouted"] == ("duplicate", first[7]["id"])
    expected = [row for row in rows(whole[0] / "curated.jsonl") if row["id"] not in of_benchmark]
    assert rows(run / "curated.jsonl") == expected
    with pytest.raises(DataError, match=r"benchmark record benchmark.jsonl: 7 cannot be used"), chat_server(teacher()) as server:
        (tmp_path / "b.webp").write_bytes(b"no image")
        curate(tmp_path / "broken", server, *ALL, f"data.train={data}", f"curate.exclude=[{benchmark}]")


def test_a_published_benchmark_is_kept_out(tmp_path: Path, whole: tuple[Path, list[Seen]]) -> None:
    (tmp_path / "mathvision").mkdir()
    first = rows(tiny_task().data.prompts)[0]["images"]
    image = {"bytes": (tiny_task().data.root / first[0]).read_bytes(), "path": None}
    row = {"id": "1", "question": "<image1> how many?", "options": ["A"], "answer": "A", "decoded_image": image, "level": 1}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "mathvision" / "test-00000-of-00001.parquet")
    with chat_server(teacher(sometimes)) as server:
        run = curate(tmp_path / "run", server, *ALL, FEW, f"curate.exclude=['mathvision:{tmp_path / 'mathvision'}']")
    kept_out = [row for row in rows(run / "left_out.jsonl") if row["reason"] == "benchmark image"]
    assert len(kept_out) == sum(line["images"] == first for line in rows(tiny_task().data.prompts)) >= 2
    assert {row["detail"] for row in kept_out} == {"mathvision: 1"}
    assert report(run)["counts"]["records"] == 20


def test_images_inside_the_data_file_and_unusable_records(tmp_path: Path, whole: tuple[Path, list[Seen]]) -> None:
    lines = rows(tiny_task().data.prompts)[:20]
    for line in lines:
        line["images"] = [{"bytes": (tiny_task().data.root / image).read_bytes(), "path": None} for image in line["images"]]
    lines[5]["images"][0]["bytes"] = b"no image"
    lines[6]["answer"] = " "
    names = ("id", "messages", "images", "answer", "caption")
    pq.write_table(pa.Table.from_pylist([{name: line[name] for name in names} for line in lines]), tmp_path / "train.parquet")
    given = (*ALL, f"data.train={tmp_path / 'train.parquet'}", "data.max_bad_sample_share=0.2")
    with chat_server(teacher(sometimes)) as server:
        run = curate(tmp_path / "run", server, *given)
    expected = [row for row in rows(whole[0] / "curated.jsonl") if row["id"] not in (lines[5]["id"], lines[6]["id"])]
    found = rows(run / "curated.jsonl")
    assert [(row["id"], row["messages"]) for row in found] == [(row["id"], row["messages"]) for row in expected]
    assert all((run / row["images"][0]).is_file() for row in found)
    assert report(run)["counts"]["unusable"] == 2 and len(rows(run / "bad_samples.jsonl")) == 2
    assert len(read_records(run / "curated.jsonl", image_root=None).require("response", "answer").records) == len(found)


# Budgets, stops and kills


def test_a_used_up_budget_ends_the_run_with_what_there_is_and_a_larger_one_goes_on(
    tmp_path: Path, whole: tuple[Path, list[Seen]]
) -> None:
    with chat_server(teacher(sometimes)) as server:
        for limit in (0, 11, 20):
            with pytest.raises(BudgetExhausted, match=f"max_requests|requests {limit} of {limit}"):
                curate(tmp_path / "run", server, *ALL, FEW, f"teacher.max_requests={limit}")
            assert len(server.seen) == limit and state(tmp_path / "run") == "interrupted"
            about = report(tmp_path / "run")
            assert not about["complete"] and about["usage"]["requests"] == limit and about["counts"]["not asked yet"] > 0
            so_far = rows(tmp_path / "run" / "curated.jsonl")
            assert len(so_far) == about["counts"].get("accepted", 0) and (so_far or limit == 0)
        curate(tmp_path / "run", server, *ALL, FEW)
        assert len(server.seen) == len(whole[1])
    assert results(tmp_path / "run") == results(whole[0]) and report(tmp_path / "run") == report(whole[0])


def test_a_signal_ends_the_run_and_it_goes_on(tmp_path: Path, whole: tuple[Path, list[Seen]]) -> None:
    answer = teacher(sometimes)

    def stop_at_ten(seen: Seen, number: int) -> Answer:
        if number == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1 if number >= 10 else 0)  # so that there is something left when the signal arrives
        return answer(seen, number)

    with chat_server(stop_at_ten) as server:
        with pytest.raises(SystemExit) as caught:
            curate(tmp_path / "run", server, *ALL, FEW)
        assert caught.value.code == 75 and state(tmp_path / "run") == "interrupted"
        assert 10 <= len(server.seen) < len(whole[1])  # what was under way
        curate(tmp_path / "run", server, *ALL, FEW)
        assert len(server.seen) == len(whole[1])
    assert results(tmp_path / "run") == results(whole[0])


def test_stops_while_comparing_and_while_the_policy_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind each of the first six writes of results: the one comparison, then batches of six prompts."""
    append = PartFiles.append

    def append_and_stop(self: PartFiles, rows: Any) -> None:
        append(self, rows)
        os.kill(os.getpid(), signal.SIGTERM)

    run, tried = tmp_path / "run", []
    with chat_server(teacher()) as server:
        with monkeypatch.context() as patch:
            patch.setattr(PartFiles, "append", append_and_stop)
            for _ in range(6):
                with pytest.raises(SystemExit):
                    curate(run, server, *TRIES)
                tried.append(sum(1 for path in (run / "tried_parts").glob("rank_*") for _ in path.open()))
        assert tried == [0, 6, 12, 18, 24, 30] and server.seen == []
        curate(run, server, *TRIES)
        unbroken = curate(tmp_path / "unbroken", server, *TRIES, f"teacher.cache_dir={run / 'teacher'}")
        assert len(server.seen) == len(rows(run / "curated.jsonl"))
    assert results(run) == results(unbroken)
    assert (run / "pass_rates.jsonl").read_bytes() == (unbroken / "pass_rates.jsonl").read_bytes()


def test_a_killed_run_pays_for_nothing_twice(tmp_path: Path, whole: tuple[Path, list[Seen]]) -> None:
    """kill -9 with requests under way, twice; of what had been answered nothing is asked again, and the result is the same."""
    answer, lock = teacher(sometimes), threading.Lock()
    paid: list[str] = []
    running: list[subprocess.Popen[bytes]] = []
    kills = [7, 23]  # when so many answers are paid for
    run = tmp_path / "run"

    def hang_up(handler: Any) -> None:
        handler.close_connection = True

    def answer_or_kill(seen: Seen, number: int) -> Answer:
        with lock:
            process = running[-1]
            if process.poll() is not None:
                return Answer(write=hang_up)
            if not kills or len(paid) < kills[0]:
                paid.append(json.dumps(seen.body))
                return answer(seen, number)
            del kills[0]
            until(lambda: len(list((run / "teacher").glob("*/*.json"))) == len(paid))  # all that was sent has arrived
            process.send_signal(signal.SIGKILL)
            process.wait()
            return Answer(write=hang_up)

    with chat_server(answer_or_kill) as server:
        given = settings("curate", run, f"teacher.base_url={server.base_url}", "teacher.max_concurrency=3", *ALL, FEW)
        codes = []
        for _ in range(3):
            running.append(subprocess.Popen([sys.executable, "-m", "prism_nemo", "curate", *given]))
            codes.append(running[-1].wait(300))
        assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert max(Counter(paid).values()) == 1 and len(paid) == len(whole[1])
    assert results(run) == results(whole[0]) and report(run)["counts"] == report(whole[0])["counts"]


def test_the_keyboard_ends_a_run_that_keeps_what_is_under_way(tmp_path: Path, whole: tuple[Path, list[Seen]]) -> None:
    answer, run = teacher(sometimes), tmp_path / "run"
    running: list[subprocess.Popen[bytes]] = []

    def answer_or_interrupt(seen: Seen, number: int) -> Answer:
        if number == 9:
            running[0].send_signal(signal.SIGINT)
        time.sleep(0.1 if number >= 9 else 0)
        return answer(seen, number)

    with chat_server(answer_or_interrupt) as server:
        given = settings("curate", run, f"teacher.base_url={server.base_url}", "teacher.max_concurrency=3", *ALL, FEW)
        running.append(subprocess.Popen([sys.executable, "-m", "prism_nemo", "curate", *given], stderr=subprocess.PIPE))
        _, shown = running[0].communicate(timeout=300)
        assert running[0].returncode == 130 and b"Traceback" not in shown and state(run) == "interrupted"
        assert 9 <= len(server.seen) < len(whole[1])
        curate(run, server, *ALL, FEW)  # how many are asked at a time makes no other run of it
        assert max(Counter(json.dumps(seen.body) for seen in server.seen).values()) == 1
    assert len(server.seen) == len(whole[1]) and results(run) == results(whole[0])


def test_a_failing_endpoint_ends_the_run_and_it_goes_on(tmp_path: Path, whole: tuple[Path, list[Seen]]) -> None:
    answer = teacher(sometimes)
    with chat_server(lambda seen, number: Answer(status=503) if 5 < number < 25 else answer(seen, number)) as server:
        with pytest.raises(EndpointError, match="2 attempts failed"):
            curate(tmp_path / "run", server, *ALL, FEW, "teacher.max_attempts=2")
        until(lambda: server.under_way == 0)
        server.answer = answer
        curate(tmp_path / "run", server, *ALL, FEW)
    assert results(tmp_path / "run") == results(whole[0])


def test_other_records_make_another_run(tmp_path: Path) -> None:
    data = altered(tmp_path, "train.jsonl", list)
    given = (*ALL, f"data.train={data}")
    with chat_server(teacher()) as server:
        with pytest.raises(BudgetExhausted):
            curate(tmp_path / "run", server, *given, "teacher.max_requests=3")
        data.write_text(data.read_text().replace("largest", "biggest"))
        with pytest.raises(Exception, match="another set of records"):
            curate(tmp_path / "run", server, *given)


# The key, and settings


def test_the_key_is_in_no_file_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, KEY)
    answer = teacher()

    def telling(seen: Seen, number: int) -> Answer:
        assert seen.headers["Authorization"] == f"Bearer {KEY}"
        return Answer(status=401, body=f"no {KEY}".encode()) if number > 4 else answer(seen, number)

    with chat_server(telling) as server, pytest.raises(EndpointError) as caught:
        curate(tmp_path / "run", server, *ALL, FEW, f"teacher.api_key_env={VARIABLE}")
    shown = capfd.readouterr()
    written = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(written) > 6 and not any(KEY.encode() in text for text in written)
    assert KEY not in shown.out + shown.err + str(caught.value) and VARIABLE in (tmp_path / "run" / "config.yaml").read_text()


def test_settings_that_cannot_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with chat_server(teacher()) as server:
        for given, where in (
            (["model.path=''"], "model.path"),
            ([*ALL, "curate.exclude=[none.jsonl]"], "curate.exclude: none.jsonl"),
            (["curate.pass_rates=none.jsonl"], "curate.pass_rates: none.jsonl"),
            ([*ALL, f"teacher.api_key_env={VARIABLE}"], f"teacher.api_key_env: {VARIABLE}"),
            ([*ALL, "teacher.base_url=http://me:hunter2@host/v1"], "teacher.base_url"),
        ):
            with pytest.raises(ConfigError) as caught:
                curate(tmp_path / "run", server, *given)
            assert caught.value.where == where and "hunter2" not in str(caught.value)
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
        assert server.seen == []
