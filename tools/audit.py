"""What this project depends on: bounds, licences, and published vulnerabilities. `make audit`

    offline   every requirement of pyproject.toml is bounded as the policy in SECURITY.md says and is met by what is installed;
              every installed package has a licence that is known and allowed; docker/*.txt pin exactly
    online    pip-audit, in an environment of its own, asks the advisory database about every installed package

The database is first asked about an old release that it must know something of. Where it does not, the last line says so:
NOT AUDITED. That is status 0, as long as AUDIT_REQUIRED=1 is not set. Status 1 for whatever was found.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parent.parent
PIP_AUDIT = "pip-audit==2.10.1"
ENVIRONMENT = REPOSITORY / ".venv" / "audit"
KNOWN = "pyyaml==5.3"  # its advisories are old enough to be in every database
SECONDS = 600
OURS = "prism-nemo"
NEVER = {"apex": "the package of this name on the index is another project; NVIDIA's comes from its source"}
PERMISSIVE = re.compile(
    r"\b(MIT|BSD|0BSD|Apache|PSF|Python Software Foundation|ISC|Zlib|CC0|BSL-1\.0|CNRI|HPND|MPL|Mozilla Public|Unlicense)\b"
)
COPYLEFT = re.compile(r"\bA?L?GPL|GNU\b")
ACCEPTED: dict[str, str] = {}  # advisories that do not concern this project: id, and why


# Bounds


def requirements(pyproject: Path) -> Iterator[tuple[str, Requirement]]:
    """(extra, requirement); the extra of what everybody gets is empty."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    for text in project["dependencies"]:
        yield "", Requirement(text)
    for extra, texts in project.get("optional-dependencies", {}).items():
        for text in texts:
            yield extra, Requirement(text)


def bound_problems(pyproject: Path) -> list[str]:
    """Requirements without a lower bound or pin, from elsewhere than an index, of a forbidden name, or not met here."""
    found = []
    for extra, requirement in requirements(pyproject):
        name = f"{requirement} ({extra or 'dependencies'})"
        operators = {part.operator for part in requirement.specifier}
        if requirement.url:
            found.append(f"{name}: is an address")
        elif not operators & {">=", "==", "~=", ">"}:
            found.append(f"{name}: has no lower bound")
        if any("*" in part.version for part in requirement.specifier):
            found.append(f"{name}: a pin with a star is none")
        if (reason := NEVER.get(canonicalize_name(requirement.name))) is not None:
            found.append(f"{name}: {reason}")
        try:
            installed = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of an extra that is not installed
        if not requirement.specifier.contains(installed, prereleases=True):
            found.append(f"{name}: {installed} is installed")
    return found


def unpinned(lists: Iterable[Path]) -> list[str]:
    """Lines of the image's lists that are not one version exactly."""
    found = []
    for path in lists:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            text = line.partition(" #")[0].strip().rstrip("\\").strip()
            if text and not text.startswith(("#", "-")) and not re.fullmatch(r"[^\s=<>~!;]+==[^\s*;]+(\s*;.*)?", text):
                found.append(f"{path.name}:{number}: `{text}` is not pinned")
    return found


# Licences


def licence_of(metadata: importlib.metadata.PackageMetadata) -> str:
    """All that a package says of its licence, on one line."""
    classifiers = [text for text in metadata.get_all("Classifier") or [] if text.startswith("License ::")]
    said = [metadata["License-Expression"], (metadata["License"] or "").strip().partition("\n")[0]]
    return "; ".join(text for text in [*said, *(text.rpartition(" :: ")[2] for text in classifiers)] if text)


def shipped() -> set[str]:
    """Names of all packages that the project needs to run, with the packages that these need."""
    found: set[str] = set()
    waiting = [OURS]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        try:
            needed = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for text in needed:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


def licence_problems() -> list[str]:
    """Packages whose licence is not known, and copyleft among what the project needs to run."""
    needed, found = shipped(), []
    for distribution in importlib.metadata.distributions():
        name, said = distribution.metadata["Name"], licence_of(distribution.metadata)
        tool = canonicalize_name(name) not in needed
        if COPYLEFT.search(said) and not tool:
            found.append(f"{name} {distribution.version}: {said}")
        elif not PERMISSIVE.search(said) and not (tool and COPYLEFT.search(said)):
            found.append(f"{name} {distribution.version}: its licence is not known: {said or 'it says none'}")
    return found


# Vulnerabilities


def advisories() -> tuple[list[str], str | None]:
    """What the database knows of the installed packages, and why it could not be asked; None: it was."""
    try:
        if not (ENVIRONMENT / "bin" / "pip-audit").exists():
            _run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)])
            _run([str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "install", "--quiet", PIP_AUDIT])
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write(f"{KNOWN}\n")
            file.flush()
            known = _ask("--requirement", file.name, "--no-deps", "--disable-pip")
        if not any(package.get("vulns") for package in known):
            return [], f"it says nothing of {KNOWN}, which has known vulnerabilities"
        packages = _ask("--path", sysconfig.get_path("purelib"))
    except subprocess.CalledProcessError as error:
        return [], _last_line(error.stderr)
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as error:
        return [], _last_line(str(error))
    found = [
        f"{package['name']} {package['version']}: {advisory['id']}, mended in {', '.join(advisory['fix_versions']) or 'none'}"
        for package in packages
        for advisory in package.get("vulns", ())
        if not ACCEPTED.keys() & {advisory["id"], *advisory.get("aliases", ())}
    ]
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    if skipped:
        print(f"not in the advisory database: {', '.join(skipped)}")
    return found, None


def _ask(*arguments: str) -> list[dict[str, Any]]:
    """What pip-audit tells of each package; its own status says whether it found something."""
    command = [str(ENVIRONMENT / "bin" / "python"), "-m", "pip_audit", *arguments, "--format", "json"]
    done = _run([*command, "--progress-spinner", "off", "--timeout", "15"], may_fail=True)
    if not done.stdout.strip():
        raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
    packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    return packages


def _run(command: list[str], *, may_fail: bool = False) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=not may_fail)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:300] if lines else "it gave no reason"


def main() -> int:
    required = os.environ.get("AUDIT_REQUIRED") == "1"
    problems = bound_problems(REPOSITORY / "pyproject.toml")
    problems += unpinned(sorted((REPOSITORY / "docker").glob("*.txt"))) + licence_problems()
    print(f"bounds and licences: {len(problems)} problems")
    found, unreachable = advisories()
    for problem in problems + found:
        print(f"  {problem}")
    if unreachable is None:
        print(f"advisories: {len(found)} of installed packages")
    else:
        print(f"NOT AUDITED: the advisory database could not be asked: {unreachable}")
    return 1 if problems or found or (unreachable is not None and required) else 0


if __name__ == "__main__":
    sys.exit(main())
