"""Faults of every kind in real runs of two ranks, and what becomes of them; docs/reliability.md has the table.

The page's table is what these tests saw:

    PRISM_NEMO_FAULTS=20 python -m pytest tests/integration/test_faults.py

does it all with the time limits that are the defaults, with so many kills, and writes the table anew. Without the variable there
are fewer kills and shorter limits, and the table is compared, but for its numbers.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers.chat_server import Answer, Seen, chat_server, completion
from helpers.faults import SECONDS, STUCK, Row, Slow, at_step, children_of, page_rows, seconds_to_end, wait_until_met, write_table
from helpers.jobs import Job, Launcher
from helpers.stages import assert_same_metrics, settings, tiny_task, trained_policy, written

KILLS = int(os.environ.get("PRISM_NEMO_FAULTS", "0"))
MEASURED = KILLS > 0
LIMITS = () if MEASURED else ("runtime.lost_rank_seconds=4", "runtime.stuck_rank_seconds=4")
CHAINS = 2 if MEASURED else 1  # runs at a time that are killed again and again
STEPS = 8
RUN = (f"trainer.max_steps={STEPS}", "trainer.save_interval=1", *LIMITS)
rows: dict[str, Row] = {}


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    trained_policy()
    with Launcher() as found:
        yield found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


def start(launcher: Launcher, run: Path, *overrides: str, before: Path | None = None) -> Job:
    return launcher.start(2, ["rlvr", *settings("rlvr", run, *RUN, *overrides)], run.with_name(f"{run.name}.logs"), before=before)


def finish(launcher: Launcher, run: Path, *overrides: str) -> None:
    job = start(launcher, run, *overrides)
    assert job.wait(SECONDS) == [0, 0], job.output()


_unbroken: list[Path] = []


def unbroken(launcher: Launcher, folder: Path) -> Path:
    if not _unbroken:
        finish(launcher, folder / "unbroken", "trainer.keep_last_k=9")
        _unbroken.append(folder / "unbroken")
    return _unbroken[0]


def same(run: Path, whole: Path) -> bool:
    """Metrics and samples to the last digit, but for what is told of rollout servers."""
    (metrics, samples), (expected_metrics, expected_samples) = written(run), written(whole)
    kept = [{name: value for name, value in row.items() if not name.startswith("servers/")} for row in metrics]
    return kept == expected_metrics and samples == expected_samples and status(run)["state"] == "finished"


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def latest(run: Path) -> Path:
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text()


def test_killed_ranks(launcher: Launcher, folder: Path) -> None:
    """kill -9 of either rank at any moment from where they have met; the same command goes on to the unbroken run's end."""
    whole = unbroken(launcher, folder)
    with ThreadPoolExecutor(CHAINS) as chains:
        longest = max(chains.map(lambda seed: chain_of_kills(folder / f"killed{seed}", seed, whole), range(CHAINS)))
    assert longest < 60
    rows["`kill -9` of a rank at a random moment"] = Row(
        KILLS or 2,
        "the other rank names it and ends with status 1; restarted, the run goes on from its checkpoint",
        seconds=longest,
    )


def chain_of_kills(run: Path, seed: int, whole: Path) -> float:
    """One run, killed again and again and then let through; the longest that a rank has lived on."""
    chance, longest, kills = random.Random(seed), 0.0, 0
    wanted = (KILLS or 2) // CHAINS + (seed < (KILLS or 2) % CHAINS)
    with Launcher() as launcher:
        while kills < wanted:
            job = start(launcher, run)
            wait_until_met(job)
            deadline = time.monotonic() + chance.uniform(0.0, 5.0)
            while time.monotonic() < deadline and not job.poll():
                time.sleep(0.01)
            if job.poll():  # it was at its end already
                assert job.statuses == {0: 0, 1: 0}, job.output()
                assert same(run, whole)
                shutil.rmtree(run)
                continue
            hurt = chance.randrange(2)
            longest = max(longest, seconds_to_end(job, hurt, signal.SIGKILL))
            statuses = job.wait(SECONDS)
            if statuses[1 - hurt] == 0:  # it had nothing to do any more that needed the other
                continue
            kills += 1
            assert statuses[1 - hurt] == 1, job.output()
            assert re.search(rf"the run ends: .*rank {hurt} on ", job.output(1 - hurt)), job.output()
        finish(launcher, run)
    assert same(run, whole)
    return longest


@pytest.mark.parametrize("hurt", [0, 1] if MEASURED else [0])
def test_a_stopped_rank(hurt: int, launcher: Launcher, folder: Path) -> None:
    """SIGSTOP: the process is there, its connections are open, and it does nothing any more."""
    run = folder / f"stopped{hurt}"
    job = start(launcher, run)
    job.wait_for_step(run, 2)
    seconds = seconds_to_end(job, hurt, signal.SIGSTOP)
    job.signal(hurt, signal.SIGKILL)
    assert job.wait(SECONDS)[1 - hurt] == 1
    said = job.output(1 - hurt)
    # What it was at, as it said so last: up to two seconds before, by when a quick run is two steps further.
    assert re.search(rf"the run ends: .*rank {hurt} on \S+, which was at: (starting|rlvr, )", said), said
    assert "Thread" in (run / "stacks" / f"rank_{1 - hurt}.txt").read_text()
    finish(launcher, run)
    assert same(run, unbroken(launcher, folder))
    assert seconds < 60
    name = "the main rank hangs (SIGSTOP)" if hurt == 0 else "another rank hangs (SIGSTOP)"
    rows[name] = Row(1, "the other names it and ends with status 1; restarted, the run goes on", seconds=seconds)


def test_stuck_ranks(launcher: Launcher, folder: Path) -> None:
    """They live, their connections are open, their threads give signs of life, and a main thread waits for what never comes."""
    began: dict[str, float] = {}
    jobs = {how: start_stuck(how, launcher, folder) for how in (STUCK if MEASURED else ["file"])}
    deadline = time.monotonic() + SECONDS
    while [job for job in jobs.values() if not job.poll()]:
        assert time.monotonic() < deadline, [job.output() for job in jobs.values()]
        began |= {how: time.monotonic() for how in jobs if how not in began and (folder / f"stuck_{how}.began").exists()}
        time.sleep(0.02)
    for how, job in jobs.items():
        run, hurt = folder / f"stuck_{how}", list(STUCK).index(how) % 2
        assert job.statuses == {0: 1, 1: 1}, job.output()
        for rank in (0, 1):
            words = rf"the run ends: rank {hurt} on \S+, which was at: rlvr, step 4.* has done nothing for"
            found = re.search(words, job.output(rank))
            assert found, job.output(rank)
            assert f"rank {1 - hurt} on" not in found[0]
        stacks = (run / "stacks" / f"rank_{hurt}.txt").read_text()
        assert re.search(r"line \d+ in stuck", stacks), "its own stack shows where"
        finish(launcher, run)
        assert same(run, unbroken(launcher, folder))
    longest = max(max(job.ended.values()) - began[how] for how, job in jobs.items())
    assert longest < 60
    rows["a rank is stuck (a lock, a sleep, a read that never ends)"] = Row(
        len(jobs), "all ranks name it and end with status 1; restarted, the run goes on", seconds=longest
    )


def start_stuck(how: str, launcher: Launcher, folder: Path) -> Job:
    """`stuck_HOW.began` appears when the rank gets stuck."""
    run, before, pipe = folder / f"stuck_{how}", folder / f"stuck_{how}.py", folder / f"{how}.pipe"
    os.mkfifo(pipe)
    lines = (f"pipe = {str(pipe)!r}", f"open({str(run) + '.began'!r}, 'w').close()", STUCK[how])
    before.write_text(at_step(3, list(STUCK).index(how) % 2, "\n        ".join(lines)))
    return start(launcher, run, before=before)


def test_ranks_that_take_long_are_left_alone(launcher: Launcher, folder: Path) -> None:
    """The others wait while one computes in one call, and while it waits for a server that is slow."""
    run, before = folder / "slow", folder / "slow.py"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    before.write_text(
        "import hashlib, os, time\n"
        "from prism_nemo.rollout.exchange import Address\n"
        "from prism_nemo.stages.rlvr import RLVRTrainer\n"
        "scores = RLVRTrainer.scores\n"
        "def rounds(seconds):\n"
        "    began = time.process_time()\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 200_000)\n"
        "    return int(200_000 * seconds / (time.process_time() - began))\n"
        "def slow(self, rollouts):\n"
        "    if os.environ['RANK'] == '1' and self.loop.done == 2:\n"
        f"        hashlib.pbkdf2_hmac('sha256', b'', b'', rounds({Slow.seconds}))\n"
        "    if os.environ['RANK'] == '1' and self.loop.done == 4:\n"
        f"        Address('http://127.0.0.1:{server.server_port}', None).get('/', timeout_seconds=600)\n"
        "    return scores(self, rollouts)\n"
        "RLVRTrainer.scores = slow\n"
    )
    job = start(launcher, run, "runtime.stuck_rank_seconds=4", before=before)
    assert job.wait(3 * SECONDS) == [0, 0], job.output()
    server.shutdown()
    assert same(run, unbroken(launcher, folder))


def test_a_rank_that_fails_by_itself(launcher: Launcher, folder: Path) -> None:
    """The other one, which waits for it in a collective, says whose fault it was."""
    run, before = folder / "failing", folder / "failing.py"
    before.write_text(
        "import os\nfrom prism_nemo.stages.rlvr import RLVRTrainer\n"
        "scores = RLVRTrainer.scores\n"
        "def failing(self, rollouts):\n"
        "    if os.environ['RANK'] == '1' and self.loop.done == 3:\n"
        "        raise MemoryError('no memory left for the scores')\n"
        "    return scores(self, rollouts)\n"
        "RLVRTrainer.scores = failing\n"
    )
    job = start(launcher, run, before=before)
    assert job.wait(SECONDS) == [1, 1], job.output()
    seconds = abs(job.ended[0] - job.ended[1])
    assert re.search(r"rank 1 on \S+, which was at: .*has failed: MemoryError: no memory left for the scores", job.output(0))
    assert "no memory left" in status(run)["error"]
    finish(launcher, run)
    assert same(run, unbroken(launcher, folder))
    rows["an error on one rank"] = Row(
        1, "the other ends too and names rank and error; restarted, the run goes on", seconds=seconds
    )


@pytest.mark.parametrize("fault", ["truncated", "flipped"] if MEASURED else ["flipped"])
def test_a_damaged_checkpoint(fault: str, launcher: Launcher, folder: Path) -> None:
    """One bit of the weights, or half of the file: the run goes on from the checkpoint before, and says so."""
    whole = unbroken(launcher, folder)
    run = folder / fault
    shutil.copytree(whole, run)
    weights = max((latest(run) / "policy").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(weights.read_bytes())
    if fault == "flipped":
        content[len(content) // 2] ^= 1
    weights.write_bytes(content if fault == "flipped" else content[: len(content) // 2])
    strict = start(launcher, run, "experiment.resume_from_older=false")
    assert strict.wait(SECONDS) == [2, 2], strict.output()
    assert weights.name in strict.output(0)
    finish(launcher, run)
    assert same(run, whole)
    notices = status(run)["notices"]
    assert any("resumed from step_00000007, not from step_00000008: 1 steps are done again" in notice for notice in notices)
    name = "a checkpoint's file truncated" if fault == "truncated" else "one bit of a checkpoint flipped"
    rows[name] = Row(1, "found before loading; resumed from the one before, and said so in log and status")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """A file system of its own, of so many KiB; called again, with another size."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(kib: int) -> Path:
        how = "remount," if place.is_mount() else ""
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"{how}size={kib}k", "tmpfs", place], check=True, capture_output=True)
        return place

    try:
        mount(64)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small file system takes root")
    yield mount
    subprocess.run(["umount", place], check=True)


def test_a_full_disk(launcher: Launcher, folder: Path, small_disk: Callable[[int], Path]) -> None:
    """It has room for some of the checkpoints. Saves that fail are told, the third ends the run; with room it goes on exactly."""
    whole = unbroken(launcher, folder)
    size = sum(path.stat().st_size for path in (whole / "checkpoints" / "step_00000001").rglob("*") if path.is_file())
    run = small_disk(4 * size // 1024) / "run"
    keep = "trainer.keep_last_k=9"
    job = launcher.start(2, ["rlvr", *settings("rlvr", run, *RUN, keep)], folder / "full.logs")
    assert job.wait(SECONDS) == [1, 1], job.output()  # a job script starts it again
    assert "No space left on device" in job.output() or "could not be written" in job.output()
    saved = int(latest(run).name.removeprefix("step_"))
    assert 1 <= saved <= 4
    found = status(run)
    assert found["state"] == "failed"
    assert "SaveError" in found["error"]
    assert sum("tried again" in notice for notice in found["notices"]) == 2
    assert not list((run / "checkpoints").glob(".*.partial"))
    small_disk(64 * size // 1024)
    again = launcher.start(2, ["rlvr", *settings("rlvr", run, *RUN, keep)], folder / "full.logs")
    assert again.wait(SECONDS) == [0, 0], again.output()
    assert same(run, whole)
    rows["the disk is full while saving"] = Row(
        1, "earlier checkpoints stay; said, tried again, and after three in a row an error; with room, the run goes on"
    )


def test_nan(launcher: Launcher, folder: Path) -> None:
    """A gradient with NaN on one rank: no rank steps, its samples are listed, and training goes on."""
    run, before = folder / "nan", folder / "nan.py"
    before.write_text(
        "import os\nfrom prism_nemo.models.policy import PolicyModel\n"
        "finish, calls = PolicyModel.finish_training_step, []\n"
        "def poisoned(self, *arguments):\n"
        "    calls.append(1)\n"
        "    if os.environ['RANK'] == '1' and len(calls) == 3:\n"
        "        next(self.module.parameters()).main_grad.fill_(float('nan'))\n"
        "    return finish(self, *arguments)\n"
        "PolicyModel.finish_training_step = poisoned\n"
    )
    job = start(launcher, run, before=before)
    assert job.wait(SECONDS) == [0, 0], job.output()
    listed = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in listed] == ["the gradient is not finite"]
    assert listed[0]["step"] == 3
    assert listed[0]["ranks"] == [1], "before the sum over ranks it was this one's alone"
    assert len(listed[0]["samples"]) == 4
    assert listed[0]["samples_of_ranks"] == listed[0]["samples"][2:]
    assert any("step 3: the gradient is not finite (on rank 1)" in notice for notice in status(run)["notices"])
    metrics, expected = written(run)[0], written(unbroken(launcher, folder))[0]
    assert metrics[:2] == expected[:2]
    assert [row["step"] for row in metrics] == [row["step"] for row in expected]
    numbers = [value for row in metrics if row["step"] != 3 for value in row.values() if isinstance(value, float)]
    assert all(value == value for value in numbers)
    rows["NaN in a gradient of one rank"] = Row(
        1, "no rank takes the step; the rank is named, its samples are listed; the run goes on"
    )


def test_a_killed_rollout_server(launcher: Launcher, folder: Path) -> None:
    run = folder / "server"
    job = start(launcher, run, "rollout.placement=separate")
    job.wait_for_step(run, 2)
    servers = [pid for pid in children_of(job.pids[0]) if b"serve" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert servers
    os.kill(servers[0], signal.SIGKILL)
    assert job.wait(SECONDS) == [0, 0], job.output()
    found, expected = written(run), written(unbroken(launcher, folder))
    assert [row["reward"] for row in found[0]] == [row["reward"] for row in expected[0]]
    assert [(row["response"], row["advantage"]) for row in found[1]] == [
        (row["response"], row["advantage"]) for row in expected[1]
    ]
    rows["`kill -9` of a rollout server"] = Row(1, "started again, given its weights; the run goes on as if nothing had been")


@pytest.mark.skipif(not MEASURED, reason="minutes: PRISM_NEMO_FAULTS")
def test_killed_with_rollouts_begun_and_a_judge(launcher: Launcher, folder: Path) -> None:
    """One step ahead, by servers, graded by a judge; killed on two ranks, then on one, then let through on two."""

    def verdict(seen: Seen, number: int) -> Answer:
        return completion("CORRECT" if zlib.crc32(json.dumps(seen.body["messages"]).encode()) % 2 else "WRONG")

    runs = {"whole": folder / "ahead_whole", "killed": folder / "ahead_killed"}
    data, prompts = tiny_task().data, folder / "prompts.jsonl"  # with a unit, of which only the judge knows what to think
    lines = [json.loads(line) for line in data.prompts.read_text().splitlines()]
    prompts.write_text("".join(json.dumps(line | {"answer": f"{line['answer']} cm"}) + "\n" for line in lines))
    ahead = ("rollout.placement=separate", "rollout.max_staleness=1", "algorithm.policy_loss.rollout_correction=token")
    ahead += (f"data.train={prompts}", f"data.image_root={data.root}")
    with chat_server(verdict) as server:
        keys = ("enabled=true", f"base_url={server.base_url}", "model=m")
        all_of = {name: [*keys, f"cache_dir={run}.judge"] for name, run in runs.items()}
        judge = {name: [*ahead, *(f"reward.judge.{key}" for key in own)] for name, own in all_of.items()}
        finish(launcher, runs["whole"], *judge["whole"])
        for ranks, step in ((2, 2), (1, 5)):
            arguments = ["rlvr", *settings("rlvr", runs["killed"], *RUN, *judge["killed"])]
            job = launcher.start(ranks, arguments, folder / "ahead.logs")
            job.wait_for_step(runs["killed"], step)
            job.signal(0, signal.SIGKILL)
            job.wait(SECONDS)
        finish(launcher, runs["killed"], *judge["killed"])
        assert server.seen, "it was asked"
    (metrics, samples), (expected, expected_samples) = (written(runs[name]) for name in ("killed", "whole"))
    kept = [[{k: v for k, v in row.items() if not k.startswith("servers/")} for row in lines] for lines in (metrics, expected)]
    assert_same_metrics(*kept, 1e-4)  # sums over one rank and over two differ in the last digits
    assert [row["response"] for row in samples] == [row["response"] for row in expected_samples]
    rows["`kill -9` with rollouts begun ahead and a judge; resumed on fewer ranks, and on more"] = Row(
        2, "restarted, the run goes on: the same responses and rewards, metrics as far as sums in another order let them"
    )


def test_the_table_of_the_page() -> None:
    """Runs last. Rows of tests that were left out are not looked at."""
    if MEASURED:
        write_table(rows)
        return
    on_page = {cells[0]: cells[2:5] for cells in page_rows()}
    for fault, row in rows.items():
        assert on_page[fault] == row.cells(fault)[2:5]
