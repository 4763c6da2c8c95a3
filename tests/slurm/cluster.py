"""A real SLURM on this machine: two virtual nodes with four fake GPUs each, all in one folder, gone with it."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

NODES = ("prism-a", "prism-b")
ENDS = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged")
_CONF = """\
ClusterName=prism
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=cred_expire=5,socket={folder}/munge/socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.txt
MpiDefault=none
ReturnToService=1
SlurmdTimeout=10
KillWait=5
MessageTimeout=20
MinJobAge=3600
SlurmctldParameters=enable_configless
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
GresTypes=gpu
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={nodes} NodeHostname={host} NodeAddr=127.0.0.1 Port={first}-{last} Sockets=1 CoresPerSocket=64 ThreadsPerCore=1 \
RealMemory=512000 Gres=gpu:4
PartitionName=main Nodes={nodes} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes={nodes} MaxTime=INFINITE State=UP PriorityTier=9
"""


def missing() -> str | None:
    """Why there can be no cluster here; None where there can."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"needs SLURM ({', '.join(absent)} missing): make test-slurm"
    return None if os.geteuid() == 0 else "needs root: SLURM's daemons start jobs of users"


@dataclass(frozen=True)
class Cluster:
    folder: Path
    environment: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]]  # slurmctld, and slurmd by its node

    def run(self, *command: str, check: bool = True, **more: object) -> str:
        """Runs one of SLURM's commands; what it printed."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120, **more)  # type: ignore[call-overload]
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}\n{self.logs()}")
        return str(done.stdout)

    def submit(self, *arguments: str, cwd: Path, environment: dict[str, str] | None = None) -> str:
        """`sbatch` these; the job's id."""
        command = ["sbatch", "--parsable", *arguments]
        done = subprocess.run(
            command, env=self.environment | (environment or {}), cwd=cwd, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}\n{self.logs()}"
        return done.stdout.strip().split(";")[0]

    def show(self, job: str) -> dict[str, str]:
        """What SLURM knows of a job."""
        words = self.run("scontrol", "show", "job", job, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, *, states: Sequence[str] = ENDS, seconds: float) -> str:
        """Until the job is in one of these states, which it returns."""
        deadline = time.monotonic() + seconds
        while (state := self.show(job)["JobState"]) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state} after {seconds} s\n{self.logs()}"
            time.sleep(0.2)
        return state

    def wait_until_gone(self, job: str) -> None:
        """Until nothing of a job runs any more."""
        deadline = time.monotonic() + 60
        while self.run("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T %C %r").startswith("COMPLETING"):
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.1)

    def processes(self, node: str) -> list[int]:
        """Those of jobs on this node."""
        its = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={self.environment['SLURM_CONF']}".encode()}
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if its <= set((folder / "environ").read_bytes().split(b"\0")):
                    found.append(int(folder.name))
        return found

    def steps(self, node: str) -> list[str]:
        """Those that the node has not done with: each has a socket there."""
        return [file.name for file in (self.folder / f"spool.{node}").glob(f"{node}_*")]

    @contextmanager
    def node_without_power(self, node: str) -> Iterator[None]:
        """The node's daemons and all processes of jobs there are gone at once; it comes back at the end."""
        daemon = self.daemons[node]
        daemon.kill()
        daemon.wait(10)
        processes = self.processes(node)
        parents = {int(Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()[1]) for number in processes}
        steps = [number for number in parents if Path(f"/proc/{number}/comm").read_text().startswith("slurmstepd")]
        for number in [*steps, *processes]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        yield
        self.daemons[node] = _start(["slurmd", "-D", "-N", node], self.environment)

    def clear(self) -> None:
        """Ends all jobs."""
        self.run("scancel", "--user=root", check=False)
        self.run("scancel", "--user=root", "--signal=KILL", "--full", check=False)
        deadline = time.monotonic() + 60
        while self.run("squeue", "--noheader"):
            assert time.monotonic() < deadline, self.run("squeue")
            time.sleep(0.1)

    def logs(self) -> str:
        files = sorted(self.folder.glob("slurm*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in files)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Starts SLURM, and ends it with all its jobs."""
    for name in ("state", "dev", *(f"spool.{node}" for node in NODES)):
        (folder / name).mkdir()
    for number in range(4):
        os.mknod(folder / "dev" / f"gpu{number}", 0o20666, os.makedev(1, 3))  # as /dev/null: nothing else makes a device of it
    host = socket.gethostname()
    ports = _free_ports(1 + len(NODES))
    conf = folder / "slurm.conf"
    conf.write_text(_CONF.format(host=host, port=ports[0], first=ports[1], last=ports[-1], folder=folder, nodes=",".join(NODES)))
    (folder / "gres.conf").write_text(f"NodeName={','.join(NODES)} Name=gpu File={folder}/dev/gpu[0-3]\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "PRISM_NEMO_"))}
    environment |= {"SLURM_CONF": str(conf)}
    found = Cluster(folder, environment, {})
    with _named_hosts(), _munge(folder):
        try:
            found.daemons["slurmctld"] = _start(["slurmctld", "-D", "-c"], environment)
            for node in NODES:
                found.daemons[node] = _start(["slurmd", "-D", "-N", node], environment)
            _until_idle(found)
            yield found
            found.clear()
        finally:
            for process in reversed(found.daemons.values()):
                process.terminate()
            for process in found.daemons.values():
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                process.kill()


def _start(command: Sequence[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def _until_idle(found: Cluster) -> None:
    deadline = time.monotonic() + 30
    while found.run("sinfo", "-h", "-p", "main", "-o", "%T", check=False).split() != ["idle"]:
        assert time.monotonic() < deadline, found.logs()
        time.sleep(0.1)


def _free_ports(count: int) -> list[int]:
    """Consecutive ones that nobody has."""
    for first in range(16900, 19900, 10):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for number in range(count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", first + number))
            return list(range(first, first + count))
    raise AssertionError("no free ports")


@contextmanager
def _named_hosts() -> Iterator[None]:
    """The nodes' names lead to this machine."""
    file = Path("/etc/hosts")
    before = file.read_text()
    line = f"127.0.0.1 {' '.join(NODES)}\n"
    if line not in before:
        file.write_text(before + ("" if before.endswith("\n") else "\n") + line)
    yield


@contextmanager
def _munge(folder: Path) -> Iterator[None]:
    """SLURM's authentication, with a key and a socket of its own."""
    user = pwd.getpwnam("munge")
    home = folder / "munge"
    home.mkdir()
    key = home / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    for path in (home, key):
        os.chown(path, user.pw_uid, user.pw_gid)
    command = [
        "munged", "--foreground", "--force", f"--socket={folder}/munge/socket", f"--key-file={key}",
        f"--pid-file={home}/munged.pid", f"--log-file={home}/munged.log", f"--seed-file={home}/munged.seed",
    ]  # fmt: skip
    process = subprocess.Popen(command, user="munge", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 10
        while not (home / "socket").exists():
            assert process.poll() is None and time.monotonic() < deadline, "munged did not start"
            time.sleep(0.05)
        yield
    finally:
        process.terminate()
        process.wait(10)
