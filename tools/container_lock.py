"""Writes docker/train.txt, serve.txt and build.txt: every package of the container's environments, at one version each.

    python -m pip install uv && python tools/container_lock.py

From pyproject.toml, for the container's Python and platform. Run it when pyproject.toml or docker/train.in changes; a test
compares them. Versions that the files hold already are kept where they still fit; --upgrade takes the newest.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PYTHON = "3.12"
PLATFORM = "x86_64-manylinux_2_39"
HEADER = """\
# Made by tools/container_lock.py from pyproject.toml; not for editing. Python {python}, Linux on x86-64.
# {what}
"""
TRAIN = "The training environment, on top of the base image: its torch, and what comes with that, is not listed and stays."
BUILD = "What builds the project's own wheel."
SERVE = "The environment of rollout servers: vLLM with the torch that it is built for."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upgrade", action="store_true")
    upgrade = ["--upgrade"] if parser.parse_args().upgrade else []
    with tempfile.TemporaryDirectory() as folder:
        # A torch that is needed nowhere: the base image's is the one.
        without_torch = Path(folder) / "without-torch.txt"
        without_torch.write_text('torch ; sys_platform == "never"\n')
        extras = [option for name in ("video", "report", "nemo") for option in ("--extra", name)]
        lock("train.txt", TRAIN, ["pyproject.toml", "docker/train.in", *extras, "--override", str(without_torch), *upgrade])
        build = Path(folder) / "build.in"
        build.write_text("\n".join(project()["build-system"]["requires"]) + "\n")
        lock("build.txt", BUILD, [str(build), *upgrade])
        # Not the extra `gpu`: Transformer Engine would be compiled a second time, and a server's layers are vLLM's.
        vllm = Path(folder) / "serve.in"
        vllm.write_text(requirement("vllm") + "\n")
        lock("serve.txt", SERVE, ["pyproject.toml", str(vllm), "--extra", "video", *upgrade])


def requirement(name: str) -> str:
    """The line of pyproject.toml's extra `gpu` that names the package."""
    (line,) = (line for line in project()["project"]["optional-dependencies"]["gpu"] if line.startswith(name))
    return str(line)


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def lock(name: str, what: str, arguments: list[str]) -> None:
    target = ROOT / "docker" / name
    command = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--output-file", str(target), *arguments]
    found = subprocess.run([*command, "--python-version", PYTHON, "--python-platform", PLATFORM], cwd=ROOT, check=False)
    if found.returncode:
        sys.exit(f"{name}: uv found no versions that fit together")
    target.write_text(HEADER.format(python=PYTHON, what=what) + target.read_text())


if __name__ == "__main__":
    main()
