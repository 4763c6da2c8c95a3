"""Secrets of the environment are in no file of a run, no output and no process's arguments; servers are local or want a token.

The runs are real processes whose environment is full of canaries.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.stages import settings, tiny_task

from prism_nemo.rollout.server import TOKEN_VARIABLE

CANARY = "canary-31415926"
VARIABLES = (
    TOKEN_VARIABLE,
    "OPENAI_API_KEY",
    "WANDB_API_KEY",
    "HF_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "SLURM_JWT",
    "MY_OWN",
)
PROXY = f"http://me:{CANARY}@127.0.0.1:9"


def environment() -> dict[str, str]:
    return {**os.environ, **{name: f"{CANARY}-{name}" for name in VARIABLES}, "HTTPS_PROXY": PROXY, "PYTHONWARNINGS": "ignore"}


def arguments_of_all() -> dict[str, str]:
    """Command lines of every process of this machine, which everybody may read."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                found[entry.name] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return found


class Watch:
    """Looks at all command lines again and again while the block lasts."""

    def __enter__(self) -> Watch:
        self.seen: set[str] = set()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._stop.wait(0.05):
            self.seen |= set(arguments_of_all().values())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def holding(folder: Path) -> list[str]:
    """The files that hold a canary, in their content or their name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [str(path) for path in files if CANARY.encode() in path.read_bytes() or CANARY in path.name]


def test_a_run_with_a_rollout_server_of_its_own(tmp_path: Path) -> None:
    """The server is a process of its own, and learns the token without anybody seeing it."""
    one_step = ["trainer.max_steps=1", "rollout=megatron", "rollout.placement=separate"]
    task = tiny_task()
    command = [
        sys.executable,
        "-m",
        "prism_nemo",
        "rlvr",
        *settings("rlvr", tmp_path / "run", *one_step, f"model.path={task.model}", "experiment.tensorboard=true"),
    ]
    with Watch() as watch:
        done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert any(" serve " in line for line in watch.seen), "it started a server"
    assert not [line for line in watch.seen if CANARY in line]
    assert CANARY not in done.stdout + done.stderr
    assert holding(tmp_path) == []
    assert {"config.yaml", "environment.json", "status.json"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_a_run_that_fails_with_a_traceback(tmp_path: Path) -> None:
    """Of an error that is nobody's mistake."""
    code = (
        "import sys, prism_nemo.stages.sft as sft\n"
        "def fails(*_): raise RuntimeError('a fault in the program')\n"
        "sft.SFTTrainer.fit = fails\n"
        "from prism_nemo.cli import main\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "sft", *settings("sft", tmp_path / "run", "trainer.max_steps=1")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=400, check=False)
    assert done.returncode == 1 and "a fault in the program" in done.stderr
    assert "a fault in the program" in (tmp_path / "run" / "status.json").read_text()
    assert CANARY not in done.stdout + done.stderr
    assert holding(tmp_path) == []


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, int, Path]]:
    """A rollout server as somebody starts it: its address, its process and what it writes."""
    log = tmp_path / "log"
    command = [sys.executable, "-m", "prism_nemo", "serve", f"model.path={tiny_task().model}", "model.precision=fp32"]
    with log.open("wb") as opened:
        process = subprocess.Popen(
            [*command, "runtime.device=cpu", "serve.port=0"], stderr=opened, stdout=opened, env=environment()
        )
    try:
        for _ in range(4000):
            text = log.read_text()
            if " at http://" in text:
                break
            assert process.poll() is None, text
            threading.Event().wait(0.05)
        yield text.partition(" at ")[2].split()[0], process.pid, log
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def listening(process: int) -> set[str]:
    """Addresses, in the kernel's own words, at which a process takes connections."""
    sockets = set()
    for entry in Path(f"/proc/{process}/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.add(str(entry.readlink()))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                found.add(fields[1].partition(":")[0])
    return found


def test_a_server_is_local_and_wants_its_token(server: tuple[str, int, Path]) -> None:
    url, process, log = server
    assert listening(process) == {"0100007F"}, "127.0.0.1 and nothing else"
    for path in ("/v1/health", "/v1/weights", "/v1/generate", "/", f"/{CANARY[:3]}\x1b[2J"):
        for token in (None, "wrong", CANARY):
            headers = {} if token is None else {"Authorization": f"Bearer {token}"}
            for data in (None, b"{}"):
                request = urllib.request.Request(url + urllib.parse.quote(path), data=data, headers=headers)
                with pytest.raises(urllib.error.HTTPError) as caught:
                    urllib.request.urlopen(request, timeout=60)
                expected = {401} if data is not None or path != "/" else {401, 404}
                assert caught.value.code in expected
                assert CANARY not in caught.value.read().decode()
    right = urllib.request.Request(f"{url}/v1/health", headers={"Authorization": f"Bearer {CANARY}-{TOKEN_VARIABLE}"})
    with urllib.request.urlopen(right, timeout=60) as answer:
        assert answer.status == 200
    assert CANARY not in log.read_text()
    assert not [line for line in arguments_of_all().values() if CANARY in line]
