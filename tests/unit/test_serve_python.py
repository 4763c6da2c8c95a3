"""Rollout servers in another Python than the run's: which one, and whether it can serve."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from prism_nemo.config.enums import RolloutEngineKind, RolloutPlacement
from prism_nemo.config.rollout import RolloutConfig, check_rollout
from prism_nemo.config.serve_python import VARIABLE, serve_python, vllm_is_installed
from prism_nemo.errors import ConfigError
from prism_nemo.rollout.processes import _environment

SERVED = RolloutConfig(placement=RolloutPlacement.separate)


def python_with(modules: Path, program: Path) -> str:
    """A Python that finds what lies in `modules` too."""
    program.write_text(f'#!/bin/sh\nPYTHONPATH={modules} exec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return str(program)


def test_the_python_of_servers_is_asked_for_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modules" / "vllm").mkdir(parents=True)
    (tmp_path / "modules" / "vllm" / "__init__.py").touch()
    monkeypatch.delenv(VARIABLE, raising=False)
    own = vllm_is_installed(for_servers=False)
    assert serve_python() == sys.executable
    assert vllm_is_installed(for_servers=True) is own
    monkeypatch.setenv(VARIABLE, python_with(tmp_path / "modules", tmp_path / "python"))
    assert vllm_is_installed(for_servers=True)
    assert vllm_is_installed(for_servers=False) is own
    check_rollout(RolloutConfig(engine=RolloutEngineKind.vllm, placement=RolloutPlacement.separate), 1)


def test_a_python_that_does_not_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho no such library >&2\nexit 127\n")
    broken.chmod(0o755)
    for path, told in ((tmp_path / "absent", "No such file"), (broken, "status 127: no such library")):
        monkeypatch.setenv(VARIABLE, str(path))
        with pytest.raises(ConfigError, match=told) as raised:
            check_rollout(SERVED, 1)
        assert str(raised.value.where).endswith(str(path))
        check_rollout(RolloutConfig(), 1)  # rollouts of the training processes do not need it
        urls = RolloutConfig(placement=RolloutPlacement.separate)
        urls.servers.urls = ["http://node1:8900"]
        check_rollout(urls, 1)  # neither do servers that others start


def test_another_python_gets_the_checkout_but_no_installed_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that lies among the run's others would bring all of them to a Python that they are not for."""
    monkeypatch.setenv("PYTHONPATH", "/mine")
    checkout = str(Path(__file__).parents[2])
    monkeypatch.setenv(VARIABLE, "/opt/serve/bin/python")
    assert _environment(0, "secret")["PYTHONPATH"] == f"{checkout}{os.pathsep}/mine"
    monkeypatch.setattr("prism_nemo.rollout.processes.site.getsitepackages", lambda: ["/usr/lib", checkout])
    assert _environment(0, "secret")["PYTHONPATH"] == "/mine"
    monkeypatch.delenv(VARIABLE)
    assert _environment(0, "secret")["PYTHONPATH"] == f"{checkout}{os.pathsep}/mine"
