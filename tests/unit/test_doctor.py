"""`prism-nemo doctor` on one process: what it sees, what it says, and that nothing makes it wait."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from prism_nemo import cli
from prism_nemo.doctor import gpus, matmul, packages
from prism_nemo.doctor.finding import Finding, Status
from prism_nemo.doctor.meeting import Guest, Host
from prism_nemo.doctor.place import node_of_rank, this_place
from prism_nemo.doctor.probe import Probe, ProbeFailed
from prism_nemo.doctor.probes import disk, model
from prism_nemo.errors import ConfigError

HEAVY = ("torch", "megatron", "transformers", "vllm")


def doctor(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    root = str(Path(cli.__file__).parents[1])
    command = [sys.executable, "-X", "importtime", "-m", "prism_nemo", "doctor", *arguments]
    variables = {**os.environ, "PYTHONPATH": root, **environment}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=120, check=False)


def by_check(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


def told(findings: list[dict[str, str]]) -> dict[str, Finding]:
    return by_check([Finding.from_json(finding) for finding in findings])


def test_quick_is_light_writes_nothing_and_tells_as_json(tmp_path: Path) -> None:
    # A launcher's variables do not make it wait for others.
    done = doctor("--quick", "--json", cwd=tmp_path, WORLD_SIZE="4", RANK="2", MASTER_ADDR="192.0.2.1", MASTER_PORT="1")
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert not imported & set(HEAVY)
    (node,) = json.loads(done.stdout)["nodes"].values()
    assert {"python", "packages", "open files", "/dev/shm", "disk", "images"} <= {check["check"] for check in node["checks"]}
    assert done.returncode == (0 if node["healthy"] else 1)
    assert node["healthy"], node
    assert list(tmp_path.iterdir()) == []


def test_a_missing_model_is_a_node_that_cannot_train(tmp_path: Path) -> None:
    settings = [
        "trainer.max_steps=1",
        f"model.path={tmp_path}/none",
        f"data.train={tmp_path}/x.jsonl",
        f"experiment.dir={tmp_path}/runs/new",
    ]
    done = doctor("--quick", "sft", *settings, cwd=tmp_path)
    assert done.returncode == 1
    assert "failed   model.path" in done.stdout and f"{tmp_path}/none is no folder on this node" in done.stdout
    assert done.stdout.splitlines()[-1].endswith("1 failed")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("job", ["convert import --hf x --out y", "pipeline demo=digits --end", "data validate x.jsonl"])
def test_every_command_of_a_job_can_be_given(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--quick", *job.split()]) == 0
    assert "healthy" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["nonsense"], ["sft", "model.pth=x"], ["--limit", "0"], ["--what"]])
def test_mistakes_are_told_as_everywhere(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", *arguments]) == 2
    assert capsys.readouterr().err.startswith("prism-nemo: ")


def test_a_wrong_version_is_named_and_a_containers_prerelease_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    python, core, extras = packages.declared()
    assert [finding.status for finding in packages.check_packages()][:2] == [Status.ok, Status.ok]
    installed = packages.importlib.metadata.version
    monkeypatch.setattr(packages, "declared", lambda: (">=99", [*core, "numpy==1.0", "no-such-package>=2"], extras))
    found = by_check(packages.check_packages())
    assert found["python"].status is Status.failed
    assert found["packages"].text == f"numpy is {installed('numpy')}, not ==1.0; no-such-package is missing"
    container = {"torch": "2.12.0a0+5aee4d2.nv26.5"}
    monkeypatch.setattr(packages, "declared", lambda: (python, ["torch>=2.11"], {}))
    monkeypatch.setattr(packages.importlib.metadata, "version", container.__getitem__)
    assert [finding.status for finding in packages.check_packages()] == [Status.ok, Status.ok]
    container["torch"] = "2.10.0a0+x"
    assert by_check(packages.check_packages())["packages"].text == "torch is 2.10.0a0+x, not >=2.11"


def test_pins_are_known_from_the_installed_package_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from_checkout = packages.declared()
    monkeypatch.setattr(packages.prism_nemo, "__file__", str(tmp_path / "prism_nemo" / "__init__.py"))
    python, core, extras = packages.declared()
    assert python == from_checkout[0]
    assert any(line.startswith("megatron-core==") for line in core)
    assert any(line.startswith("vllm==") for line in extras["gpu"]) and not any(line.startswith("vllm") for line in core)


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    mounted = os.geteuid() == 0 and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("a file system of a few MB can only be mounted by root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path, 4) as folder:
        found = told(disk(str(folder / "not" / "there" / "yet"), 8, None))
        assert found["write"].status is Status.failed and "No space left" in found["write"].text
        assert found["disk"].status is Status.warning
        assert list(folder.iterdir()) == []
        # A model that is larger than the disk.
        assert told(disk(str(folder), 0, 1 << 30))["disk"].status is Status.failed


def test_a_disk_with_room(tmp_path: Path) -> None:
    found = told(disk(str(tmp_path), 4, 1000))
    assert found["write"].status in (Status.ok, Status.warning) and "MB/s" in found["write"].text
    assert list(tmp_path.iterdir()) == []


def test_a_models_weights_are_counted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x" * 1000)
    found = model(str(tmp_path), "model.path")
    assert found["weight_bytes"] == 1000
    assert told(found["findings"])["model.path"].status is Status.ok


def test_a_child_that_hangs_or_dies_is_ended_and_says_how_far_it_came(tmp_path: Path) -> None:
    probe = Probe("share_lock_hold", {"folder": str(tmp_path)}, limit=3.0)
    probe.wait_until("holding the lock")
    began = time.monotonic()
    with pytest.raises(ProbeFailed, match=r"did not answer within 3 s, holding the lock"):
        probe.result()
    assert time.monotonic() - began < 30
    assert probe._process.poll() is not None
    with pytest.raises(ProbeFailed, match=r"ended with status 1, .*No such file or directory"):
        Probe("share_remove", {"folder": str(tmp_path / "none")}, limit=30.0).result()


def test_children_end_with_their_parent_however_that_ends(tmp_path: Path) -> None:
    code = (
        "import sys; from prism_nemo.doctor.probe import Probe\n"
        "probe = Probe('share_lock_hold', {'folder': sys.argv[1]}, limit=100)\n"
        "probe.wait_until('holding the lock'); print(probe._process.pid, flush=True); probe.result()"
    )
    root = str(Path(cli.__file__).parents[1])
    parent = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": root}
    )
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    child.wait(60)


def test_an_interrupt_ends_it_at_once(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-m", "prism_nemo", "doctor"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(Path(cli.__file__).parents[1])},
    )
    while not psutil.Process(parent.pid).children():
        time.sleep(0.05)
    children = psutil.Process(parent.pid).children()
    parent.send_signal(signal.SIGINT)
    assert parent.wait(60) == 130
    psutil.wait_procs(children, 60)
    assert not any(child.is_running() for child in children)


def test_wrong_products_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    finding, rate = matmul._multiply(torch.device("cpu"), "CPU")
    assert finding.status is Status.ok and rate > 0
    multiply = torch.Tensor.__matmul__

    def one_wrong(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = multiply(a, b)
        if a.shape == b.shape:
            product[7, 3] += 1
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", one_wrong)
    finding, _ = matmul._multiply(torch.device("cpu"), "CPU")
    assert finding.status is Status.failed and "1 of 512 rows" in finding.text


SMI = """#!/bin/sh
case "$1" in
    *index,name*) printf '0, NVIDIA H100, 580.82, 81559, %s\\n1, NVIDIA H100, 580.82, 81559, 4\\n' "${USED:-4}" ;;
    *ecc*) printf '0, 0\\n1, %s\\n' "${ECC:-0}" ;;
    *clocks_event*) [ -z "$OLD" ] || exit 2; printf '0, 0x0000000000000001\\n1, %s\\n' "${CLOCKS:-0x0}" ;;
    *clocks_throttle*) printf '0, 0x0\\n1, 0x0000000000000048\\n' ;;
esac
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that answers as nvidia-smi does."""
    path = tmp_path / "nvidia-smi"
    path.write_text(SMI)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return path


def test_what_nvidia_smi_tells(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = by_check(gpus.check_nvidia_smi(10))
    assert {finding.status for finding in found.values()} == {Status.ok}
    assert found["nvidia-smi"].text == "2 x NVIDIA H100, driver 580.82"
    for name, value in {"USED": "50000", "ECC": "3", "CLOCKS": "0x0000000000000048"}.items():
        monkeypatch.setenv(name, value)
    found = by_check(gpus.check_nvidia_smi(10))
    assert (found["ECC"].status, found["ECC"].text) == (Status.failed, "uncorrected errors since the driver's start: GPU 1: 3")
    assert found["throttling"].text == "GPU 1: hardware slowdown, too hot (hardware)"
    assert found["GPU memory"].status is Status.warning and "GPU 0 50000 of 81559 MiB" in found["GPU memory"].text
    monkeypatch.setenv("OLD", "1")
    assert by_check(gpus.check_nvidia_smi(10))["throttling"].status is Status.warning
    monkeypatch.setenv("ECC", "[N/A]")
    assert by_check(gpus.check_nvidia_smi(10))["ECC"].status is Status.ok  # GPU 0 tells


def test_an_nvidia_smi_that_hangs_or_fails(smi: Path) -> None:
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    (finding,) = gpus.check_nvidia_smi(10)
    assert (finding.status, finding.text) == (Status.failed, "NVIDIA-SMI has failed")
    smi.write_text("#!/bin/sh\nexec sleep 60\n")
    (finding,) = gpus.check_nvidia_smi(0.5)
    assert finding.status is Status.failed and "does not answer" in finding.text


def test_places() -> None:
    assert this_place({}).world_size == 1
    # The batch script of a job of 4 tasks is alone.
    assert this_place({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}).world_size == 1
    by_rank_sh = this_place(
        {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "SLURM_NTASKS_PER_NODE": "8", "SLURM_NODEID": "1"}
        | {"MASTER_ADDR": "a", "MASTER_PORT": "12000", "SLURMD_NODENAME": "b"}
    )
    assert (by_rank_sh.node, by_rank_sh.node_name, by_rank_sh.leads, by_rank_sh.ranks_per_node) == (1, "b", False, 8)
    assert node_of_rank(3, by_rank_sh, {0: "a"}) == "a"
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        this_place({"WORLD_SIZE": "2"})


def test_strangers_do_not_disturb_a_meeting() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = this_place(
            {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1] - 1)}
        )
        host = Host(place, limit=20)  # on the next port that is free
        address = host._listener.getsockname()
        assert address[0] == "127.0.0.1"
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"job": "other", "rank": 0}\n', b'{"job": 1, "rank": []}\n', b""):
            with socket.create_connection(address) as stranger:
                stranger.sendall(words)
                stranger.shutdown(socket.SHUT_WR)
                stranger.settimeout(20)
                assert stranger.recv(100) == b""
        taken.settimeout(20)
        guest = Guest(place, limit=20)
        assert guest.exchange({"a": [1, "é"]}).values == [{"a": [1, "é"]}]
        assert abs(guest.clock_offset()) < 20
        guest.leave()
        host.close()
