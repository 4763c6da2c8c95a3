"""Installed packages against what prism-nemo asks for, without importing any."""

from __future__ import annotations

import importlib.metadata
import platform
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import prism_nemo
from prism_nemo.doctor.finding import Finding, failed, ok, warning

DISTRIBUTION = "prism-nemo"
OPTIONAL = ("gpu", "video", "nemo")  # extras of which nothing need be there, but what is must fit


def declared() -> tuple[str, list[str], dict[str, list[str]]]:
    """Which Python, packages and packages of extras are asked for, by this code's checkout or else the installed package."""
    project = Path(prism_nemo.__file__).parents[1] / "pyproject.toml"
    if project.is_file():
        table = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        if table["name"] == DISTRIBUTION:
            return table["requires-python"], table["dependencies"], table["optional-dependencies"]
    metadata = importlib.metadata.metadata(DISTRIBUTION)
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    extras: dict[str, list[str]] = {name: [] for name in metadata.get_all("Provides-Extra") or []}
    for requirement in required:
        for name, members in extras.items():
            if requirement.marker is not None and requirement.marker.evaluate({"extra": name}):
                members.append(_without_marker(requirement))
    core = [_without_marker(one) for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    return metadata["Requires-Python"] or "", core, extras


def _without_marker(requirement: Requirement) -> str:
    bare = Requirement(str(requirement))
    bare.marker = None
    return str(bare)


def check_packages() -> list[Finding]:
    python, core, extras = declared()
    version = platform.python_version()
    fits = SpecifierSet(python).contains(version, prereleases=True)
    first = (
        ok("python", version)
        if fits
        else failed("python", f"{version}, but {python} is needed", "PRISM_NEMO_PYTHON names another")
    )
    problems = [problem for line in core if (problem := _problem(Requirement(line), must=True))]
    extra = [
        problem for name in OPTIONAL for line in extras.get(name, []) if (problem := _problem(Requirement(line), must=False))
    ]
    findings = [first]
    if problems:
        findings.append(failed("packages", "; ".join(problems), "install this release's own: pip install -e ."))
    else:
        findings.append(ok("packages", f"{len(core)} as pyproject.toml asks for them"))
    if extra:
        findings.append(warning("extras", "; ".join(extra), "pip install -e '.[NAME]' with the extra's name"))
    return findings


def _problem(requirement: Requirement, *, must: bool) -> str | None:
    if requirement.marker is not None and not requirement.marker.evaluate():
        return None
    try:
        found = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is missing" if must else None
    # A container's torch calls itself 2.12.0a0+...: that is what it is tested as.
    if requirement.specifier.contains(found, prereleases=True):
        return None
    return f"{requirement.name} is {found}, not {requirement.specifier}"
