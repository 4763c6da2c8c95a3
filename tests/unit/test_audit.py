"""The audit of dependencies: what it finds, and that it never takes silence for an answer."""

from __future__ import annotations

import email.message
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", REPOSITORY / "tools" / "audit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_project_keeps_its_own_rules(audit: ModuleType) -> None:
    assert audit.bound_problems(REPOSITORY / "pyproject.toml") == []
    assert audit.unpinned(sorted((REPOSITORY / "docker").glob("*.txt"))) == []


def test_bounds(audit: ModuleType, tmp_path: Path) -> None:
    bad = ["numpy", "pillow<12", "torch==2.*", "apex>=1", "x @ https://host/x.whl", "pytest>=999"]
    good = ["rich>=13", "not-installed-here==1.0", "pyyaml~=6.0"]
    listed = ", ".join(f'"{text}"' for text in bad + good)
    (tmp_path / "pyproject.toml").write_text(
        f"[project]\ndependencies = []\n[project.optional-dependencies]\nextra = [{listed}]\n"
    )
    found = audit.bound_problems(tmp_path / "pyproject.toml")
    assert [text.partition(" (extra)")[0].replace(" ", "") for text in found if "is installed" not in text] == [
        text.replace(" ", "") for text in bad[:5]
    ]
    assert any("pytest>=999" in text and "is installed" in text for text in found)


def test_pins(audit: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "train.txt"
    file.write_text("# comment\n--index-url x\na==1.0\nb[x]==2.0 ; python_version < '4'\nc>=1\nd\ne==1.*\n")
    assert [line.partition(":")[2] for line in audit.unpinned([file])] == [
        "5: `c>=1` is not pinned",
        "6: `d` is not pinned",
        "7: `e==1.*` is not pinned",
    ]


def test_licences(audit: ModuleType) -> None:
    metadata = email.message.Message()
    for name, value in {"License-Expression": "MIT", "License": "first\nsecond", "Classifier": "License :: OSI :: BSD"}.items():
        metadata[name] = value
    assert audit.licence_of(metadata) == "MIT; first; BSD"
    assert {"torch", "megatron-core", "pyyaml", "numpy"} <= audit.shipped()
    assert "ruff" not in audit.shipped()


KNOWN = {"dependencies": [{"name": "pyyaml", "version": "5.3", "vulns": [{"id": "A-1", "fix_versions": ["5.4"]}]}]}
SILENT = {"dependencies": [{"name": "pyyaml", "skip_reason": "not found"}]}
CLEAN = {"dependencies": [{"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "not found"}]}
VULNERABLE = {"dependencies": [{"name": "a", "version": "1", "vulns": [{"id": "A-2", "fix_versions": [], "aliases": ["B-2"]}]}]}
ANSWERS = {
    "clean": (json.dumps(KNOWN), json.dumps(CLEAN), [], None),
    "vulnerable": (json.dumps(KNOWN), json.dumps(VULNERABLE), ["a 1: A-2, mended in none"], None),
    "silent": (json.dumps(SILENT), json.dumps(CLEAN), [], "says nothing of pyyaml==5.3"),
    "down": ("", "", [], "it is down"),
    "nonsense": ("[", "[", [], "Expecting value"),
    "down in between": (json.dumps(KNOWN), "", [], "it is down"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_advisories(case: str, audit: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in answers for pip-audit, whose database may be out of reach here."""
    known, installed, found, unreachable = ANSWERS[case]
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pip-audit").touch()
    (tmp_path / "known").write_text(known)
    (tmp_path / "installed").write_text(installed)
    (tmp_path / "bin" / "python").write_text(
        f"#!{sys.executable}\nimport sys, pathlib\n"
        f"name = 'known' if '--requirement' in sys.argv else 'installed'\n"
        f"sys.stdout.write((pathlib.Path({str(tmp_path)!r}) / name).read_text())\n"
        "sys.stderr.write('first line\\nit is down\\n')\nsys.exit(1)\n"
    )
    (tmp_path / "bin" / "python").chmod(0o755)
    monkeypatch.setattr(audit, "ENVIRONMENT", tmp_path)
    seen, why = audit.advisories()
    assert seen == found
    assert why is None if unreachable is None else unreachable in why
    for required, status in ((None, 1 if found else 0), ("1", 1 if found or unreachable else 0)):
        monkeypatch.setenv("AUDIT_REQUIRED", required or "0")
        assert audit.main() == status


def test_accepted_advisories_are_left_out(audit: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "_ask", lambda *_: VULNERABLE["dependencies"])
    monkeypatch.setattr(audit, "_run", lambda *_, **__: None)
    monkeypatch.setattr(audit, "ACCEPTED", {"B-2": "nobody can reach it"})
    assert audit.advisories() == ([], None)
