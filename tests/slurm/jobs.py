"""Jobs of one test, and what they wrote."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from slurm.cluster import ENDS, Cluster

HOME = Path(__file__).parents[2]
STAND_IN = Path(__file__).with_name("stand_in.sh")
PATIENCE = 400.0  # seconds for whatever a test waits for: far more than it takes


@dataclass(frozen=True)
class Jobs:
    cluster: Cluster
    folder: Path
    python: str

    def submit(self, script: str, *arguments: str, flags: str = "", **variables: str) -> str:
        """`sbatch FLAGS slurm/SCRIPT.sh ARGUMENTS` with one GPU a node where the flags do not say otherwise; the job's id."""
        environment = self._environment(variables)
        gpus = [] if script in ("convert", "pipeline") else ["--gpus-per-node=1"]
        return self.cluster.submit(
            *gpus, *flags.split(), str(HOME / "slurm" / f"{script}.sh"), *arguments, cwd=self.folder, environment=environment
        )

    def call(self, script: str, *arguments: str, **variables: str) -> tuple[int, str]:
        """Runs a script as a user does who has not submitted it: status, and what it says."""
        command = ["bash", HOME / "slurm" / f"{script}.sh", *arguments]
        environment = self.cluster.environment | self._environment(variables)
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
        )
        return done.returncode, done.stderr

    def _environment(self, variables: dict[str, str]) -> dict[str, str]:
        return {"PRISM_NEMO_HOME": str(HOME), "PRISM_NEMO_PYTHON": self.python} | variables

    def stand_in(self, does: str, *arguments: str, script: str = "align", flags: str = "", **variables: str) -> str:
        """A job whose processes run a line of bash in place of the run."""
        return self.submit(script, *arguments, flags=flags, PRISM_NEMO_PYTHON=str(STAND_IN), PRISM_NEMO_TEST=does, **variables)

    def end(self, job: str) -> str:
        """How the job ended: its last state."""
        return self.cluster.wait(job, seconds=PATIENCE)

    def until(self, job: str, holds: Callable[[], object]) -> None:
        """Waits until something holds of a job that has not ended."""
        checked = began = time.monotonic()
        while not holds():
            time.sleep(0.01)
            if time.monotonic() - checked > 1.0:
                checked = time.monotonic()
                state = self.cluster.show(job)["JobState"]
                assert state not in ENDS and checked - began < PATIENCE, f"{job} is {state}\n{self.log(job)}"

    def restarts(self, job: str) -> int:
        return int(self.cluster.show(job)["Restarts"])

    def preempt(self, *, nodes: int = 2) -> None:
        """Another job, to which these nodes are more urgently due, comes and goes."""
        flags = ["--partition=urgent", f"--nodes={nodes}", "--exclusive", "--output=/dev/null"]
        assert self.end(self.cluster.submit(*flags, "--wrap=true", cwd=self.folder)) == "COMPLETED"

    def log(self, job: str) -> str:
        """What the job's script, and its first rank, wrote."""
        (file,) = self.folder.glob(f"*-{job}.log")
        return file.read_text()

    def rank_log(self, job: str, name: str = "rank_0") -> str:
        return (self.folder / "logs" / job / f"{name}.log").read_text()
