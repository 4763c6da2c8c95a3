"""The Python that rollout servers run in: this one, or another that has vLLM, whose torch may differ from the run's."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import cache

from prism_nemo.errors import ConfigError

VARIABLE = "PRISM_NEMO_SERVE_PYTHON"
_LIMIT_SECONDS = 120.0  # a file system may be slow at first
_HAS_VLLM = "import importlib.util; print(importlib.util.find_spec('vllm') is not None)"


def serve_python() -> str:
    """Path or name of the program."""
    return os.environ.get(VARIABLE) or sys.executable


def vllm_is_installed(*, for_servers: bool) -> bool:
    """Whether this Python has it or, `for_servers`, theirs. Raises ConfigError where that cannot be started."""
    if not for_servers or serve_python() == sys.executable:
        return importlib.util.find_spec("vllm") is not None
    return _has_vllm(serve_python())


@cache
def _has_vllm(python: str) -> bool:
    try:
        done = subprocess.run([python, "-c", _HAS_VLLM], capture_output=True, text=True, check=False, timeout=_LIMIT_SECONDS)
        problem = f"status {done.returncode}: {done.stderr.strip()[-300:]}"
        answer = done.stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        problem, answer = str(error), ""
    if answer not in ("True", "False"):
        raise ConfigError(
            f"the Python of the rollout servers does not start: {problem}",
            where=f"environment variable {VARIABLE}: {python}",
            remedy="name a Python that has prism-nemo and vLLM, or unset it: servers then run in the Python of the run",
        )
    return answer == "True"
