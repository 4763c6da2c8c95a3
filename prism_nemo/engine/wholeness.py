"""Whether checkpoints are what was written, which all ranks find together, each by a part; and which one to go on from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from prism_nemo.convert.manifest import MANIFEST, REMEDY, STEP_MANIFEST, damaged, has_hashes, problems
from prism_nemo.engine.runtime import Runtime
from prism_nemo.errors import CheckpointError
from prism_nemo.run_directory import LATEST

TRAINER = "trainer.json"


@dataclass(frozen=True)
class Damage:
    """What is wrong with a checkpoint, in words that follow "the checkpoint is"."""

    directory: Path  # the step's folder, or that of the model whose file it is
    problem: str

    @property
    def error(self) -> CheckpointError:
        return damaged(self.problem, self.directory)


@dataclass(frozen=True)
class Choice:
    """The checkpoint to go on from, and the newer ones that are damaged, the newest first."""

    directory: Path
    skipped: Sequence[tuple[Path, Damage]]

    @property
    def notice(self) -> str:
        """What a person should know; "" when it is the newest one."""
        if not self.skipped:
            return ""
        steps = [_step(path) for path in (self.skipped[0][0], self.directory)]
        lost = f": {steps[0] - steps[1]} steps are done again" if None not in steps else ""  # type: ignore[operator]
        names = "; ".join(f"{path.name} is {damage.problem}" for path, damage in self.skipped)
        return f"resumed from {self.directory.name}, not from {self.skipped[0][0].name}{lost}. {names}"


def check_together(directory: Path) -> None:
    """`check_manifest` by all ranks of the default group. The same CheckpointError on each. A collective."""
    found = _problems_together(directory, MANIFEST)
    if found:
        raise damaged(found[0], directory)


def choose(folder: Path, runtime: Runtime, *, from_older: bool) -> Choice | None:
    """The newest whole checkpoint up to the one that `latest` names; None when there is none at all. A collective.

    Raises CheckpointError, the same on every rank, when none is whole, and without `from_older` when the newest is not.
    """
    candidates: list[Path] = runtime.broadcast_from_main(_candidates(folder) if runtime.is_main else None)
    skipped: list[tuple[Path, Damage]] = []
    for directory in candidates:
        damage = find_damage(directory)
        if damage is None:
            return Choice(directory, skipped)
        skipped.append((directory, damage))
        if not from_older:
            break
    if not skipped:
        return None
    if len(skipped) == 1:
        error = skipped[0][1].error
        older = len(candidates) > 1
        remedy = "experiment.resume_from_older=true goes on from an older one; or copy this one again" if older else error.remedy
        raise CheckpointError(error.what, where=error.where, remedy=remedy)
    raise CheckpointError(
        "none of the run's checkpoints is whole\n    "
        + "\n    ".join(f"{path.name} is {found.problem}" for path, found in skipped),
        where=str(folder),
        remedy=REMEDY.replace("use an earlier checkpoint, or copy this one", "copy one of them"),
    )


def find_damage(directory: Path) -> Damage | None:
    """What is wrong with a step's folder, its models' included. A collective."""
    box = [_outline(directory) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    problem, models, sealed = box[0]
    if problem is not None:
        return Damage(directory, problem)
    for name in models:
        found = _problems_together(directory / name, MANIFEST)
        if found:
            return Damage(directory / name, found[0])
    found = _problems_together(directory, STEP_MANIFEST) if sealed else []
    return Damage(directory, found[0]) if found else None


def _outline(directory: Path) -> tuple[str | None, list[str], bool]:
    """What can be seen of a step's folder without reading much: a problem, its models, whether it has a manifest of its own."""
    try:
        return _seen(directory)
    except OSError as error:
        return f"unreadable: {error}", [], False


def _seen(directory: Path) -> tuple[str | None, list[str], bool]:
    if not directory.is_dir():
        return "not there", [], False
    models = sorted(path.name for path in directory.iterdir() if path.is_dir())
    sealed = (directory / STEP_MANIFEST).is_file()
    if not sealed and not (directory / TRAINER).is_file():
        return f"incomplete: it has no {TRAINER}", models, sealed
    if not sealed and any(has_hashes(directory / name) for name in models):  # earlier versions had no hashes, and none of these
        return f"incomplete: it has no {STEP_MANIFEST}", models, sealed
    return None, models, sealed


def _candidates(folder: Path) -> list[Path]:
    """What `latest` names, and then every older step, the newest first. Without a readable `latest`: every step."""
    steps = sorted(folder.glob("step_*"), reverse=True)
    marker = folder / LATEST
    try:
        name = marker.read_text(encoding="utf-8").strip() if marker.is_file() else ""
    except (OSError, ValueError):
        name = ""
    if not name:
        return steps
    newest = folder / name
    return [newest, *(step for step in steps if step.name < newest.name or _step(newest) is None)]


def _step(directory: Path) -> int | None:
    number = directory.name.removeprefix("step_")
    return int(number) if number.isdecimal() else None


def _problems_together(directory: Path, manifest: str) -> list[str]:
    world_size = dist.get_world_size()
    try:
        own = problems(directory, part=(dist.get_rank(), world_size), manifest=manifest)
    except OSError as error:
        own = [f"unreadable: {error}"]
    gathered: list[list[str] | None] = [None] * world_size
    dist.all_gather_object(gathered, own)
    return [problem for part in gathered for problem in part or ()]
