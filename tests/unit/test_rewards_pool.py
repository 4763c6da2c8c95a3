"""The pool of workers against hostile expressions, killed workers, threads, and the end of its own process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from prism_nemo.errors import PrismError
from prism_nemo.rewards.pool import Decision, Pool
from prism_nemo.rewards.question import Question

EQUAL, DIFFERENT, TIMEOUT, CRASH = Decision.EQUAL, Decision.DIFFERENT, Decision.TIMEOUT, Decision.CRASH
WATCHDOG_SECONDS = 240.0

PATHOLOGICAL = [
    r"9^{9^{9^{9}}}",
    r"2^{2^{99999}}",
    "((7^{999})^{999})^{999}",
    "9!!!!",
    "(99!)!",
    r"\int_0^{\infty} e^{-x^{x^x}} dx",
    r"\sum_{n=1}^{\infty} \frac{1}{n^{n!}}",
    "(" * 140 + "x" + ")" * 140,
    r"\sqrt{" * 40 + "2" + "}" * 40,
    r"\frac{1}{" * 30 + "2" + "}" * 30,
    "9" * 299 + r"\sqrt{2}",
    "(a+b+c+d+e+f)^{999}-(f+e+d+c+b+a)^{999}+1",
    r"\sin(\cos(\tan(\ln(x^{99}+\sqrt{x^{98}+\sqrt{x^{97}+y}}))))^{\sqrt{x}}",
    r"\binom{99999999}{49999999}",
    r"\log_{2}(3^{999^{99}})",
    "x" * 280 + "^2",
    "__import__('os').system('true')",
    r"\input{/etc/passwd}",
]
SLOW = Question(r"\binom{99999999}{49999999}", r"\sqrt{7}+x")  # only a limit ends it


def pool(num_workers: int = 2, time_limit_seconds: float = 1.0, memory_limit_mb: int = 1024) -> Pool:
    return Pool(num_workers=num_workers, time_limit_seconds=time_limit_seconds, memory_limit_mb=memory_limit_mb)


def good(count: int) -> tuple[list[Question], list[Decision]]:
    """Questions of every other answer equal."""
    questions = [Question(rf"\sqrt{{{3 * (n + 2) ** 2}}}", rf"{n + 2 + n % 2}\sqrt{{3}}") for n in range(count)]
    return questions, [DIFFERENT if n % 2 else EQUAL for n in range(count)]


def wait_for(condition: Callable[[], bool]) -> None:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < WATCHDOG_SECONDS
        time.sleep(0.01)


def test_pathological_expressions_beside_good_ones() -> None:
    questions, expected = good(40)
    hostile = [Question(text, truth) for text in PATHOLOGICAL for truth in (r"\sqrt{7}+x", "5")]
    mixed = [question for index, one in enumerate(hostile) for question in (one, questions[index])]
    with pool() as workers:
        decisions = workers.decide(mixed)
        assert decisions[1::2] == expected[: len(hostile)]
        assert EQUAL not in decisions[::2]
        assert workers.decide(questions) == expected


def test_limits_of_time_and_memory_are_decisions() -> None:
    """And where the limit leaves no room for a worker, the error says so."""
    questions, expected = good(6)
    with pool() as workers:
        assert workers.decide([SLOW] * 3 + questions) == [TIMEOUT] * 3 + expected
    with pytest.raises(PrismError, match="does not start") as failure, pool(memory_limit_mb=32) as workers:
        workers.decide(questions)
    assert failure.value.remedy is not None and "memory_limit_mb" in failure.value.remedy


def test_workers_that_are_killed_are_replaced_and_lose_nothing() -> None:
    questions, expected = good(300)
    with pool() as workers, ThreadPoolExecutor(1) as thread:
        decided = thread.submit(workers.decide, questions)
        killed: set[int] = set()
        while len(killed) < 5 and not decided.done():
            for process_id in workers.process_ids:
                if process_id not in killed and len(killed) < 5:
                    os.kill(process_id, signal.SIGKILL)
                    killed.add(process_id)
            time.sleep(0.2)
        assert decided.result(WATCHDOG_SECONDS) == expected
        assert len(killed) >= 2
        for process_id in workers.process_ids:  # while they are idle
            os.kill(process_id, signal.SIGKILL)
        assert workers.decide(questions[:10]) == expected[:10]


def test_signals_for_the_run_do_not_reach_workers() -> None:
    questions, expected = good(4)
    with pool() as workers:
        assert workers.decide(questions) == expected
        before = workers.process_ids
        for process_id in before:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                os.kill(process_id, number)
        assert workers.decide(questions) == expected
        assert workers.process_ids == before


def test_a_worker_that_stands_still_is_replaced() -> None:
    questions, expected = good(4)
    with pool(num_workers=1) as workers:
        assert workers.decide(questions) == expected
        (stopped,) = workers.process_ids
        os.kill(stopped, signal.SIGSTOP)
        workers._wall_limit = 10.0  # enough for a new worker to start on a busy machine
        assert workers.decide(questions) == expected
        assert workers.process_ids != [stopped]


def test_a_large_process_keeps_its_workers() -> None:
    """What the process that starts a worker has held is not the worker's memory."""
    questions, expected = good(4)
    ballast = bytearray(2**30)
    ballast[:: 2**12] = bytes([1]) * 2**18  # touches every page
    with pool(num_workers=1) as workers:
        assert workers.decide(questions) == expected
        before = workers.process_ids
        assert workers.decide(questions) == expected
        assert len(before) == 1 and workers.process_ids == before


def test_from_several_threads() -> None:
    questions, expected = good(30)
    with pool() as workers, ThreadPoolExecutor(4) as threads:
        assert threading.active_count() >= 1
        parts = [slice(start, start + 10) for start in (0, 10, 20)] * 2
        decided = [threads.submit(workers.decide, questions[part]) for part in parts]
        assert [future.result(WATCHDOG_SECONDS) for future in decided] == [expected[part] for part in parts]
        assert len(workers.process_ids) <= 2


def test_an_interrupt_leaves_a_pool_that_works() -> None:
    questions, expected = good(4)
    with pool() as workers:
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            for _ in range(1000):
                workers.decide([SLOW, *questions])
            time.sleep(WATCHDOG_SECONDS)
        assert workers.decide(questions) == expected


def test_closing_ends_the_workers_and_a_closed_pool_starts_again() -> None:
    questions, expected = good(4)
    workers = pool()
    assert workers.process_ids == []
    assert workers.decide([]) == []
    assert workers.process_ids == []  # none before one is needed
    for _ in range(2):
        assert workers.decide(questions) == expected
        running = [psutil.Process(process_id) for process_id in workers.process_ids]
        workers.close()
        assert not any(process.is_running() for process in running)


SCRIPT = """
import sys, time
from prism_nemo.rewards.pool import Pool
from prism_nemo.rewards.question import Question
pool = Pool(num_workers=2, time_limit_seconds=1.0, memory_limit_mb=1024)
assert len(pool.decide([Question("\\\\sqrt{8}", "2\\\\sqrt{2}")] * 4)) == 4
print(*pool.process_ids, flush=True)
time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize("killed", [False, True])
def test_workers_end_with_their_parent(killed: bool) -> None:
    """With a pool that nobody closed; also when the parent is killed."""
    command = [sys.executable, "-W", "error", "-c", SCRIPT, "600" if killed else "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None and parent.stderr is not None
        process_ids = [int(word) for word in parent.stdout.readline().split()]
        assert len(process_ids) == 2
        if killed:
            parent.kill()
        assert parent.wait(WATCHDOG_SECONDS) == (-signal.SIGKILL if killed else 0)
        assert killed or parent.stderr.read() == ""
    wait_for(lambda: not any(psutil.pid_exists(process_id) for process_id in process_ids))


def test_beside_torch_and_gloo() -> None:
    """In a process with torch's threads and a process group's."""
    code = (
        "import os, torch, torch.distributed as dist\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "(torch.randn(64, 64) @ torch.randn(64, 64)).sum()\n"
        "from prism_nemo.rewards import score\n"
        "text = '<caption>c</caption><think>t</think><answer>$\\\\sqrt{8}$</answer>'\n"
        "assert score(text, '2\\\\sqrt{2}').accuracy == 1.0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=WATCHDOG_SECONDS)
