"""Runs the Dockerfile's Python steps without a container engine, over a stand-in for the base image's torch.

    python tools/container_steps.py --python python3.12 [--serve] [--keep DIR]

The base is a virtual environment with torch and pip; every path of the image lies in a folder instead. What the Dockerfile's RUN
lines do is done there, word by word, except what needs nvcc (apex, Transformer Engine) or root (the user). Then it is used.
`--serve` also installs vLLM's environment (10 GB). Minutes, and a package index.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAND_IN = ("torch==2.13.0", "setuptools<82")  # that the base image has
LEFT_OUT = {"apex": "needs nvcc", "transformer-engine": "needs nvcc"}
_INSTRUCTION = re.compile(r"^([A-Z]+)\s+(.*)", re.DOTALL)


def stages(text: str) -> dict[str, list[tuple[str, str]]]:
    """The Dockerfile's instructions by stage: (name, what follows)."""
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)
    found: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        match = _INSTRUCTION.match(line.strip())
        if not match:
            continue
        name, rest = match.groups()
        if name == "FROM":
            current = found.setdefault(rest.split()[-1], [])
        else:
            current.append((name, rest))
    return found


class Image:
    """Folders that stand for the image's file system: /opt, /src, /wheels become those below `root`."""

    def __init__(self, root: Path, base: Path) -> None:
        self.root = root
        self.base = base
        self.seconds: dict[str, float] = {}

    def inside(self, text: str) -> str:
        return re.sub(r"(?<![\w./])/(opt|src|wheels|apex|te)(?=[/\s'*]|$)", rf"{self.root}/\1", text)

    def build(self, name: str, instructions: list[tuple[str, str]]) -> None:
        began = time.monotonic()
        folder = self.root
        for instruction, rest in instructions:
            if instruction == "WORKDIR":
                folder = Path(self.inside(rest))
                folder.mkdir(parents=True, exist_ok=True)
            elif instruction == "COPY":
                self._copy(rest, folder)
            elif instruction == "RUN":
                self._run(rest, folder)
        self.seconds[name] = round(time.monotonic() - began, 1)

    def _copy(self, rest: str, folder: Path) -> None:
        words = [word for word in rest.split() if not word.startswith("--chmod")]
        if any(word.startswith("--from") for word in words) or words[-1].startswith("/usr/"):
            return  # what the image copies between stages is one folder here
        *sources, target = words
        place = Path(self.inside(target)) if target.startswith("/") else folder / target
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, place, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / source, place)

    def _run(self, rest: str, folder: Path) -> None:
        command = re.sub(r"--mount=\S+\s+", "", rest)
        if "useradd" in command:
            return
        command = self.inside(command)
        print(f"== {command}", file=sys.stderr, flush=True)
        environment = {
            "PATH": f"{self.base}/bin:/usr/bin:/bin",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "HOME": str(self.root),
            "REVISION": "unknown",
        }
        environment |= {key: value for key, value in os.environ.items() if key.startswith(("PIP_", "SSL_", "REQUESTS_"))}
        subprocess.run(["bash", "-euo", "pipefail", "-c", command], cwd=folder, env=environment, check=True, stdout=sys.stderr)


def make_base(python: str, folder: Path) -> Path:
    """A virtual environment in the base image's part. One on top of it sees its packages by a .pth file."""
    subprocess.run([python, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--upgrade", "pip"], check=True)
    subprocess.run([*pip, *STAND_IN], check=True)
    return folder


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd="/").stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="python3.12")
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--keep", type=Path, help="where all is made, and stays")
    options = parser.parse_args()
    root = (options.keep or Path(tempfile.mkdtemp(prefix="container-steps-"))).resolve()
    try:
        print(json.dumps(run(root, options.python, serve=options.serve), indent=2))
    finally:
        if not options.keep:
            shutil.rmtree(root)


def run(root: Path, python: str, *, serve: bool) -> dict[str, object]:
    found = stages((ROOT / "Dockerfile").read_text())
    base = make_base(python, root / "base")
    before = output(base / "bin/python", "-m", "pip", "freeze")
    for name in ("apex", "te"):
        (root / name).mkdir(parents=True, exist_ok=True)
    image = Image(root, base)
    train = root / "opt/train/bin/python"
    # --system-site-packages means the interpreter's own packages; here the base is itself an environment.
    site = 'import sysconfig; print(sysconfig.get_path("purelib"))'
    below = output(base / "bin/python", "-c", site)
    instructions = found["train-environment"]
    image.build("train-environment: venv", instructions[:1])
    (Path(output(train, "-c", site)) / "base.pth").write_text(f"import site; site.addsitedir({below!r})\n")
    image.build("train-environment", instructions[1:])
    image.build("project", found["project"])
    image.build("train", found["train"])
    result: dict[str, object] = {
        "python": output(train, "--version"),
        "torch": output(train, "-c", "import torch; print(torch.__version__, torch.__file__)").replace(str(root), ""),
        "megatron": output(train, "-c", "import megatron.core; print(megatron.core.__version__)"),
        "prism-nemo": output(root / "opt/train/bin/prism-nemo", "doctor", "--quick", "--path", str(root)).splitlines(),
        "base unchanged": output(base / "bin/python", "-m", "pip", "freeze") == before,
    }
    if serve:
        image.build("serve-environment", found["serve-environment"])
        image.build("full", found["full"])
        python_of_serve = root / "opt/serve/bin/python"
        result["serve"] = output(
            python_of_serve, "-c", "import torch, vllm; print('torch', torch.__version__, 'vllm', vllm.__version__)"
        )
        result["serve, doctor"] = output(
            python_of_serve, "-m", "prism_nemo", "doctor", "--quick", "--path", str(root)
        ).splitlines()
    return result | {"left out": LEFT_OUT, "seconds": image.seconds}


if __name__ == "__main__":
    main()
