"""kill -9 at random moments of import and export: the old state or the complete new one, and a rerun finishes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny import tiny_model

from prism_nemo.convert.commands import export_hf, import_hf

TRIALS = 10
SHARD_BYTES = 100_000

# Imports once and forks: a trial then costs no start of Python. The child dies at one of its steps (a part is written, a file
# is had on disk, …), drawn at random, and a random while after it began; its other threads are then anywhere. Counted rather
# than timed, the moments are spread over the whole conversion on a busy machine too.
SCRIPT = """
import itertools, json, os, random, shutil, signal, sys, time
from pathlib import Path
from prism_nemo.convert import commands, manifest, shards
from prism_nemo.errors import CheckpointError
import torch.distributed.checkpoint.metadata  # before the fork: the conversion imports it in a thread

direction, source, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
trials, shard_bytes = int(sys.argv[4]), int(sys.argv[5])
out, reference = folder / "out", folder / "reference"
convert = commands.import_hf if direction == "import" else commands.export_hf

def contents(directory):
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}

steps, dies_at, dies_after = itertools.count(), None, 0.0

def counted_step(function):
    def step(*arguments):
        if next(steps) == dies_at:
            time.sleep(dies_after)
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return step

shards.write_slot = counted_step(shards.write_slot)
shards.sync = counted_step(shards.sync)
shards.write_atomically = counted_step(shards.write_atomically)
manifest.seal = counted_step(manifest.seal)

def child(at_rename, at_step=None, after=0.0):
    global steps, dies_at, dies_after
    pid = os.fork()
    if pid:
        return pid
    steps, dies_at, dies_after = itertools.count(), at_step, after
    if at_rename:
        def rename(self, target):
            if at_rename == "after":
                os.rename(self, target)
            os.kill(os.getpid(), signal.SIGKILL)
        Path.rename = rename
    convert(source, out, max_shard_bytes=shard_bytes)
    os._exit(0)

convert(source, reference, max_shard_bytes=shard_bytes)
expected, total = contents(reference), next(steps)
assert total > 100
kept = []
write = shards.Staging.write
def counted(self, files, io):
    kept.append(write(self, files, io))
    return kept[-1]
shards.Staging.write = counted
generator = random.Random(0)
results = []
for trial in [*range(trials), "before", "after"]:
    if isinstance(trial, str):
        pid = child(trial)
    else:
        pid = child(None, generator.randrange(total), generator.uniform(0, 0.005))
    _, status = os.waitpid(pid, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    state = "new" if out.exists() else "old"
    if out.exists():
        assert contents(out) == expected, "it looks complete and is not"
    kept.clear()
    try:
        convert(source, out, max_shard_bytes=shard_bytes)
    except CheckpointError as error:
        assert state == "new" and "the target exists" in str(error), "only what is there whole may stop it"
    found = contents(out)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []
    left = sorted(p.name for p in folder.iterdir() if p.name not in ("out", "reference"))
    results.append({"trial": trial, "state": state, "kept": sum(kept), "left": left})
    shutil.rmtree(out)
print(json.dumps(results))
"""


def killed(direction: str, source: Path, folder: Path) -> list[dict[str, Any]]:
    folder.mkdir()
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, direction, str(source), str(folder), str(TRIALS), str(SHARD_BYTES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    result: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("direction", ["import", "export"])
def test_a_kill_leaves_the_old_state_or_the_new_one(direction: str, tmp_path: Path) -> None:
    source = tiny_model(experts=True).directory
    if direction == "export":
        import_hf(source, tmp_path / "checkpoint", max_shard_bytes=SHARD_BYTES)
        source = tmp_path / "checkpoint"
    results = killed(direction, source, tmp_path / direction)
    assert len(results) == TRIALS + 2
    assert all(result["left"] == [] for result in results), "a finished rerun leaves nothing of the earlier one"
    states = {result["trial"]: result["state"] for result in results}
    assert (states["before"], states["after"]) == ("old", "new")
    assert sum(result["state"] == "old" for result in results[:TRIALS]) >= TRIALS // 2, "killed in the middle"
    assert sum(result["kept"] > 0 for result in results) >= TRIALS // 2, "what was finished is kept"


def test_what_was_finished_is_checked_before_it_is_kept(tmp_path: Path) -> None:
    """A file that the journal calls finished, and whose bytes have changed since, is written anew."""
    source = tiny_model().directory
    import_hf(source, tmp_path / "reference", max_shard_bytes=SHARD_BYTES)
    folder = tmp_path / "killed"
    folder.mkdir()
    script = """
import os, signal, sys
from pathlib import Path
from prism_nemo.convert import commands
Path.rename = lambda self, target: os.kill(os.getpid(), signal.SIGKILL)
commands.import_hf(Path(sys.argv[1]), Path(sys.argv[2]), max_shard_bytes=int(sys.argv[3]))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", script, str(source), str(folder / "out"), str(SHARD_BYTES)]
    subprocess.run(command, env=environment, check=False)
    shards = sorted((folder / ".out.partial" / "content").glob("*.distcp"))
    assert len(shards) > 4
    content = bytearray(shards[2].read_bytes())
    content[len(content) // 2] ^= 255
    shards[2].write_bytes(content)
    shards[3].write_bytes(shards[3].read_bytes()[:-10])
    untouched = shards[4].stat().st_mtime_ns
    import_hf(source, folder / "out", max_shard_bytes=SHARD_BYTES)
    for file in (tmp_path / "reference").glob("*.distcp"):
        assert (folder / "out" / file.name).read_bytes() == file.read_bytes()
    assert (folder / "out" / shards[4].name).stat().st_mtime_ns == untouched


def test_another_conversion_to_the_same_target_starts_anew(tmp_path: Path) -> None:
    import_hf(tiny_model().directory, tmp_path / "reference")
    staging = tmp_path / ".out.partial"
    (staging / "content" / "hf").mkdir(parents=True)
    (staging / "content" / "stale.distcp").write_text("of something else")
    (staging / "plan.json").write_text('{"version": 0}')
    import_hf(tiny_model().directory, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "reference"]
    assert not (tmp_path / "out" / "stale.distcp").exists()
    export_hf(tmp_path / "out", tmp_path / "hf")
