"""A rollout server as a process that this one starts, and that ends with it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import site
import socket
import subprocess
import sys
import time
from pathlib import Path

import prism_nemo
from prism_nemo.config.serve_python import serve_python
from prism_nemo.rollout.server import TOKEN_VARIABLE

_LAST_LINES = 15
_LAST_BYTES = 1 << 16
_CLOSING_SECONDS = 5.0
# A server is a process alone, whatever its parent is one of.
_OF_RANKS = re.compile(r"((LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_.*)")


class ServerProcess:
    """`prism-nemo serve` with a configuration file, in a session of its own: an interrupt of this process does not reach it.

    Both ends of a socket pair tie it to this process: it tells its address over it, and ends when it closes.
    """

    def __init__(self, config_file: Path, log_file: Path, *, index: int, token: str) -> None:
        self._log_file = log_file
        self._received = b""
        self._own, theirs = socket.socketpair()
        self._own.setblocking(False)
        command = [serve_python(), "-m", "prism_nemo", "serve", "--config", str(config_file)]
        try:
            with log_file.open("ab") as log:
                self._log_start = log.tell()
                self.process = subprocess.Popen(
                    [*command, f"serve.parent_fd={theirs.fileno()}"],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                    env=_environment(index, token),
                )
        finally:
            theirs.close()

    @property
    def exit_status(self) -> int | None:
        return self.process.poll()

    def address(self) -> tuple[str, str] | None:
        """The server's URL and its instance, once it has told them."""
        with contextlib.suppress(BlockingIOError, ConnectionError):
            self._received += self._own.recv(1 << 12)
        if not self._received.endswith(b"\n"):
            return None
        told = json.loads(self._received)
        return told["url"], told["instance"]

    def last_lines(self) -> str:
        """Of what this process wrote, for an error."""
        with self._log_file.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, size - _LAST_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-_LAST_LINES:])

    def end(self, *, at_once: bool) -> None:
        """Ends the server and all that it started; not `at_once`: lets it clean up, for a while."""
        if not at_once:
            self._signal(signal.SIGTERM)
            deadline = time.monotonic() + _CLOSING_SECONDS
            while self.exit_status is None and time.monotonic() < deadline:
                time.sleep(0.02)
        self._signal(signal.SIGKILL)
        self.process.wait()
        self._own.close()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


def _environment(index: int, token: str) -> dict[str, str]:
    """Of server `index`: this process's, without its place among ranks. The GPUs of each server would be given here."""
    kept = {name: value for name, value in os.environ.items() if not _OF_RANKS.fullmatch(name)}
    # The server runs this code. But a package that is installed brings along, for another Python, all that lies beside it.
    package = Path(prism_nemo.__file__).parent.parent
    if serve_python() == sys.executable or package not in map(Path, site.getsitepackages()):
        kept["PYTHONPATH"] = os.pathsep.join(filter(None, (str(package), kept.get("PYTHONPATH"))))
    return {**kept, TOKEN_VARIABLE: token}
