"""`prism-nemo doctor` on ranks: two nodes' worth of them on this machine, one of which is late, dead, stopped or the first."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from prism_nemo import cli

LONGEST_SECONDS = 240  # a watchdog: far above what a busy machine takes


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Rank:
    """One rank, on a node of its own as far as its variables say."""

    def __init__(self, rank: int, world_size: int, port: int, cwd: Path, *options: str) -> None:
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(world_size),
            "SLURM_NODEID": str(rank),
            "SLURM_NTASKS_PER_NODE": "1",
            "SLURMD_NODENAME": f"node{rank}",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": str(Path(cli.__file__).parents[1]),
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "prism_nemo", "doctor", "--json", "--path", str(cwd), *options],
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def report(self) -> tuple[int, dict[str, Any]]:
        """Its exit status, and the JSON that it printed, if any."""
        out, err = self.process.communicate(timeout=LONGEST_SECONDS)
        assert "Traceback" not in err, err
        return self.process.returncode, json.loads(out) if out else {}

    def wait_for(self, happened: Callable[[psutil.Process], bool]) -> None:
        deadline = time.monotonic() + LONGEST_SECONDS
        while not happened(psutil.Process(self.process.pid)):
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.02)

    def is_in(self, probe: str) -> Callable[[psutil.Process], bool]:
        def runs(process: psutil.Process) -> bool:
            for child in process.children():
                try:
                    if child.cmdline()[-1:] == [probe]:
                        return True
                except psutil.Error:
                    continue
            return False

        return runs


@contextmanager
def ranks(count: int, cwd: Path, *options: str, world_size: int = 2) -> Iterator[list[Rank]]:
    port = free_port()
    started = [Rank(rank, world_size, port, cwd, *options) for rank in range(count)]
    try:
        yield started
    finally:
        for rank in started:
            rank.process.send_signal(signal.SIGCONT)
            rank.process.kill()
            rank.process.communicate()


def checks(report: dict[str, Any], node: str) -> dict[str, dict[str, str]]:
    return {check["check"]: check for check in report["nodes"][node]["checks"]}


def left_behind(folder: Path) -> list[Path]:
    return list(folder.iterdir())


def test_two_healthy_nodes(tmp_path: Path) -> None:
    with ranks(2, tmp_path) as (first, second):
        status, report = first.report()
        assert second.report() == (status, {})
    assert (status, report["healthy"]) == (0, True), report
    assert list(report["nodes"]) == ["node0", "node1"]
    for node in report["nodes"]:
        found = checks(report, node)
        assert {"torch", "matmul CPU", "clock", "shared folder", "locks", "ports", "all-reduce, all", "write"} <= set(found)
        assert "2 ranks over gloo: right" in found["all-reduce, all"]["text"]
        assert found["shared folder"]["status"] in ("ok", "warning") and "what 2 node(s) wrote" in found["shared folder"]["text"]
        assert found["locks"]["status"] == "ok"
    assert left_behind(tmp_path) == []


def test_a_rank_that_never_arrives_is_named(tmp_path: Path) -> None:
    with ranks(1, tmp_path, "--limit", "8") as (first,):
        began = time.monotonic()
        status, report = first.report()
        assert time.monotonic() - began < LONGEST_SECONDS / 2
    assert status == 1
    assert "rank 1 of 2 does not answer" in checks(report, "node number 1")["ranks"]["text"]
    assert "rank 1 on node number 1 missing" in checks(report, "node0")["all-reduce"]["text"]


def test_without_the_first_rank_the_others_say_so(tmp_path: Path) -> None:
    with ranks(1, tmp_path) as (first,):
        first.process.kill()
        port = free_port()
        second = Rank(1, 2, port, tmp_path, "--limit", "5")
        status, report = second.report()
    assert status == 1
    assert "rank 0 on 127.0.0.1 was not found within 5 s" in checks(report, "node1")["ranks"]["text"]


def test_a_rank_that_is_killed_is_named(tmp_path: Path) -> None:
    with ranks(2, tmp_path) as (first, second):
        second.wait_for(second.is_in("all_reduce"))
        second.process.kill()
        status, report = first.report()
    assert status == 1
    found = checks(report, "node1")["ranks"]
    assert (found["status"], found["text"]) == ("failed", "rank 1 of 2 has ended")
    assert "because rank 1 is missing" in checks(report, "node0")["all-reduce"]["text"]


def test_who_waits_for_long_is_not_missing(tmp_path: Path) -> None:
    """A rank whose own all-reduce has died waits for the others longer than a sign of life may stay away."""
    with ranks(2, tmp_path, "--limit", "24") as (first, second):
        second.wait_for(second.is_in("all_reduce"))
        for child in psutil.Process(second.process.pid).children():
            child.kill()
        status, report = first.report()
    assert status == 1
    assert "rank 1 ended with status -9" in checks(report, "node1")["all-reduce"]["text"]
    found = [check for node in report["nodes"] for check in checks(report, node).values()]
    assert not any("missing" in check["text"] or check["check"] == "ranks" for check in found)


def test_a_rank_that_is_stopped_is_named(tmp_path: Path) -> None:
    with ranks(2, tmp_path, "--limit", "20") as (first, second):
        second.wait_for(second.is_in("torch"))
        second.wait_for(lambda process: len(process.net_connections()) > 0)
        second.process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        status, report = first.report()
        assert time.monotonic() - began < LONGEST_SECONDS / 2
    assert status == 1
    assert (
        "rank 1 of 2 does not answer"
        in checks(report, "node1" if "node1" in report["nodes"] else "node number 1")["ranks"]["text"]
    )


def test_when_the_first_rank_is_killed_the_others_end(tmp_path: Path) -> None:
    with ranks(2, tmp_path) as (first, second):
        first.wait_for(first.is_in("all_reduce"))
        first.process.kill()
        status, report = second.report()
    assert status == 1
    assert "rank 0 on 127.0.0.1" in checks(report, "node1")["ranks"]["text"]
    assert "torch" in checks(report, "node1")
