"""The run directory: configuration, environment, status, metrics, samples and TensorBoard of one stage's run.

    config.yaml         the resolved configuration; config.1.yaml, …: what earlier sessions of the run had, where it differed
    environment.json    versions, host, command, commit; environment.1.json, … likewise
    status.json         state (running | finished | failed | interrupted), stage, step, started, updated, seconds, sessions,
                        process; notices: what a person should know of the run, the last ones. A process that was killed
                        leaves "running" behind: `state_of` tells
    metrics.jsonl       one line per logged step
    samples.jsonl       what was generated, with its scores
    bad_samples.jsonl   records that could not be used
    tb/                 TensorBoard scalars

No torch here, and TensorBoard is imported only where it is used.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import yaml

from prism_nemo.convert.files import sync
from prism_nemo.errors import PrismError
from prism_nemo.json_files import read_json_object
from prism_nemo.progress import StepProgress
from prism_nemo.run_directory import (
    NON_FINITE,
    append_json_lines,
    check_same_run,
    describe_environment,
    keep_json_lines,
    next_free,
    read_json_lines,
    to_json_line,
    write_atomically,
)
from prism_nemo.run_lock import RunLock, holder_here, is_being_written

if TYPE_CHECKING:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    from prism_nemo.integrations.nemo import NemoLogger

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
BAD_SAMPLES = "bad_samples.jsonl"
STATUS = "status.json"
CONFIG = "config.yaml"
ENVIRONMENT = "environment.json"
TIME_PREFIX = "time/"
STATUS_INTERVAL_SECONDS = 1.0
NOTICES = 20  # that stay
DIRECTORY_VARIABLE = "PRISM_NEMO_DIRECTORY_FILE"  # a file that is told the run's directory: job scripts look there for progress


class Experiment:
    """One stage's run directory, open for writing; every rank makes one, and only the main rank's touches the disk.

    Other ranks must not look into the directory before the main rank's has been made (it may move an older run aside):
    let the ranks meet first. As a context manager it closes the run with the state that the block's end implies.

    Raises PrismError when the directory holds a run and neither `resume` nor `overwrite` is given, when the run there is
    another one (another stage, other settings), when another live process writes there, or when it holds files that are
    not a run's. `overwrite` moves the old run to `<directory>.old-N`.
    """

    def __init__(
        self,
        directory: Path,
        *,
        stage: str,
        config_yaml: str,
        resume: bool,
        overwrite: bool,
        is_main: bool,
        tensorboard: bool,
        nemo_exp_manager: Mapping[str, Any] | None,
        progress: bool,
    ) -> None:
        self.directory = directory
        self.stage = stage
        self.is_main = is_main
        self._progress = progress and is_main
        self._use_tensorboard = tensorboard
        self._tensorboard: EventFileWriter | None = None
        self._nemo: NemoLogger | None = None
        self._state = "running"
        self._error: str | None = None
        self._step = 0
        self._started = _now()
        self._sessions = 1
        self._earlier_seconds = 0.0
        self._began = time.monotonic()
        self._status_written = self._began
        self._notices: list[str] = []
        self._unwritten: dict[str, list[Mapping[str, Any]]] = {}  # lines that the disk had no room for
        if is_main:
            self._open(config_yaml, nemo_exp_manager, resume=resume, overwrite=overwrite)

    # Opening

    def _open(self, config_yaml: str, nemo_exp_manager: Mapping[str, Any] | None, *, resume: bool, overwrite: bool) -> None:
        _refuse_foreign_files(self.directory)
        self._lock = RunLock(self.directory)
        try:
            if (self.directory / STATUS).exists():
                if overwrite:
                    self._move_aside()
                else:
                    self._continue_run(config_yaml, resume=resume)
            if nemo_exp_manager is not None:
                from prism_nemo.integrations.nemo import NemoLogger

                parameters = yaml.safe_load(config_yaml)
                self._nemo = NemoLogger(nemo_exp_manager, self.directory, stage=self.stage, hyperparameters=parameters)
        except BaseException:
            self._lock.release()
            raise
        self._write_status()  # first: it is what makes the directory a run
        self._write_keeping_earlier(CONFIG, config_yaml)
        self._write_keeping_earlier(ENVIRONMENT, json.dumps(describe_environment(), indent=2) + "\n")
        if file := os.environ.get(DIRECTORY_VARIABLE):
            write_atomically(Path(file), f"{self.directory.absolute()}\n")

    def _move_aside(self) -> None:
        directory, old_lock = self.directory.absolute(), self._lock  # the lock stays until the move is done
        directory.rename(next_free(lambda n: directory.with_name(f"{directory.name}.old-{n}")))
        directory.mkdir()
        self._lock = RunLock(directory)
        old_lock.release()

    def _continue_run(self, config_yaml: str, *, resume: bool) -> None:
        if not resume:
            raise PrismError(
                "the run directory already holds a run",
                where=str(self.directory),
                remedy="experiment.resume=true goes on with it, experiment.overwrite=true moves it aside, "
                "and another experiment.dir leaves it alone",
            )
        earlier = json.loads((self.directory / STATUS).read_text(encoding="utf-8"))
        config = self.directory / CONFIG
        old_yaml = config.read_text(encoding="utf-8") if config.exists() else config_yaml  # absent: killed as it was starting
        check_same_run(self.directory, stages=(earlier["stage"], self.stage), configs=(old_yaml, config_yaml))
        self._step = earlier["step"]
        self._started = earlier["started"]
        self._sessions = earlier["sessions"] + 1
        self._earlier_seconds = earlier["seconds"]
        self._notices = earlier.get("notices", [])
        for name in (METRICS, SAMPLES, BAD_SAMPLES):
            keep_json_lines(self.directory / name, lambda _: True)  # a killed process may have left half a line
        if earlier["state"] == "running":  # this process has the lock: that one is no more
            self.notice(f"the session before died ({earlier.get('process', 'unknown')}), last heard of {earlier['updated']}")

    def _write_keeping_earlier(self, name: str, text: str) -> None:
        path = self.directory / name
        if path.exists() and path.read_text(encoding="utf-8") != text:
            path.rename(next_free(lambda n: path.with_name(f"{path.stem}.{n}{path.suffix}")))
        write_atomically(path, text)

    # Logging

    def log_metrics(self, step: int, metrics: Mapping[str, float], *, prefix: str = "train") -> None:
        """Appends `{"step", "prefix", …metrics}` to metrics.jsonl, floats to the last digit, and writes TensorBoard scalars.

        Whatever depends on the clock belongs under names that start with "time/": the rest of the file is then the same for
        every run with the same configuration. `time/run_seconds`, the run's age over all its sessions, is added here.
        A step's metrics belong before its checkpoint, so that a run resumed from it has them (see `rewind`).
        """
        if not self.is_main:
            return
        values = {name: value if type(value) is int else float(value) for name, value in metrics.items()}
        assert not values.keys() & {"step", "prefix"}, "names that the line itself uses"
        self._step = step
        self._append(METRICS, [{"step": step, "prefix": prefix, **values, f"{TIME_PREFIX}run_seconds": self.seconds}])
        if self._use_tensorboard:
            self._write_scalars(step, {f"{prefix}/{name}": value for name, value in values.items()})
        if self._nemo is not None:
            self._nemo.log_metrics(step, values, prefix=prefix)
        if time.monotonic() - self._status_written >= STATUS_INTERVAL_SECONDS:
            self._write_status()

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends one line `{"step", …row}` per row to samples.jsonl. Values are of JSON's own types; NaN and inf may be."""
        if self.is_main:
            self._append(SAMPLES, [{"step": step, **row} for row in rows])

    def record_bad_samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Lists unusable records in bad_samples.jsonl. A row that is listed already, as after a resume, is not listed twice."""
        if not self.is_main or not rows:
            return
        path = self.directory / BAD_SAMPLES
        listed = {to_json_line(row) for row in read_json_lines(path)} if path.exists() else set()
        self._append(BAD_SAMPLES, [row for row in rows if to_json_line(row) not in listed])

    def notice(self, text: str) -> None:
        """Something that a person should know and that does not stop the run: on standard error, and in status.json."""
        if not self.is_main:
            return
        print(f"{self.directory}: {text}", file=sys.stderr, flush=True)
        self._notices = [*self._notices, f"{_now()} {text}"][-NOTICES:]
        self._write_status()

    def flush(self) -> None:
        """Has all lines on the disk, also those that it had no room for. OSError when it still has none."""
        for name in list(self._unwritten):
            append_json_lines(self.directory / name, self._unwritten[name])
            del self._unwritten[name]
        for name in (METRICS, SAMPLES):
            if (self.directory / name).is_file():
                sync(self.directory / name)

    def _append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Appends lines, or keeps them in memory until there is room for them: no later line goes before them."""
        full = name in self._unwritten
        self._unwritten.setdefault(name, []).extend(rows)
        try:
            append_json_lines(self.directory / name, self._unwritten[name])
        except OSError as error:
            if not full:
                self.notice(f"{name} cannot be written ({error}); its lines are kept in memory, and written when they can be")
        else:
            del self._unwritten[name]

    def has_metrics(self, step: int, prefix: str) -> bool:
        """Whether metrics.jsonl has a line of that step and prefix; on ranks that do not write it, never."""
        path = self.directory / METRICS
        if not self.is_main or not path.exists():
            return False
        return any(row["step"] == step and row["prefix"] == prefix for row in read_json_lines(path))

    def rewind(self, step: int) -> None:
        """Makes metrics and samples end with `step`, the one that training continues behind; 0 empties them.

        A run that was stopped behind its last checkpoint and resumed from it has then the same files as an unbroken run.
        """
        if not self.is_main:
            return
        for name in (METRICS, SAMPLES):
            keep_json_lines(self.directory / name, lambda row: step > 0 and row["step"] <= step)
        self._step = step
        self._write_status()
        if self._use_tensorboard and self._sessions > 1:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            start = Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START))
            self._event_writer().add_event(start)  # TensorBoard drops what earlier files have from this step on

    def progress_steps(self, start: int, stop: int, description: str) -> StepProgress:
        """Iterates over the steps `start` to `stop - 1` with a progress bar; silent on other ranks and without `progress`."""
        return StepProgress(start, stop, description, enabled=self._progress)

    # Closing

    def finish(self) -> None:
        """The run did what it was asked to do."""
        self._close("finished")

    def interrupt(self) -> None:
        """The run was stopped from outside (a signal, the keyboard) and may be resumed."""
        self._close("interrupted")

    def fail(self, error: BaseException) -> None:
        """The run ended with an error, which status.json then names."""
        self._error = f"{type(error).__name__}: {error}"
        self._close("failed")

    def __enter__(self) -> Experiment:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if self._state != "running":
            return
        if error is None:
            self.finish()
        elif isinstance(error, KeyboardInterrupt | SystemExit):
            self.interrupt()
        else:
            self.fail(error)

    def _close(self, state: str) -> None:
        assert self._state == "running", f"closed twice: {self._state}, then {state}"
        self._state = state
        if not self.is_main:
            return
        try:
            if self._tensorboard is not None:
                self._tensorboard.close()
            self.flush()
        except OSError as error:
            self.notice(f"not everything could be written ({error})")
        self._write_status()
        self._lock.release()
        if self._nemo is not None:  # last: it may wait for a server
            self._nemo.close(state)

    # Files

    @property
    def seconds(self) -> float:
        """The run's age: wall time of all its sessions so far."""
        return self._earlier_seconds + time.monotonic() - self._began

    def _write_status(self) -> None:
        status = {
            "state": self._state,
            "stage": self.stage,
            "step": self._step,
            "started": self._started,
            "updated": _now(),
            "seconds": round(self.seconds, 3),
            "sessions": self._sessions,
            "process": holder_here(),
        }
        if self._error is not None:
            status["error"] = self._error
        if self._notices:
            status["notices"] = self._notices
        self._status_written = time.monotonic()
        try:
            write_atomically(self.directory / STATUS, json.dumps(status, indent=2, ensure_ascii=False) + "\n")
        except OSError as error:
            print(f"{STATUS} cannot be written, the one there is older: {error}", file=sys.stderr, flush=True)

    def _event_writer(self) -> EventFileWriter:
        if self._tensorboard is None:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter

            self._tensorboard = EventFileWriter(str(self.directory / "tb"), flush_secs=10)
        return self._tensorboard

    def _write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        try:
            self._event_writer().add_event(Event(wall_time=time.time(), step=step, summary=summary))
        except OSError as error:  # its thread's, from an earlier event; it writes no more
            self._use_tensorboard, self._tensorboard = False, None
            self.notice(f"TensorBoard's events cannot be written any more in this session: {error}")


def state_of(directory: Path) -> str:
    """The state in the run's status.json; where that says "running" and no process writes any more, "died at step N, …".

    Raises PrismError when there is no status, or one that cannot be read.
    """
    status = read_json_object(directory / STATUS)
    state = str(status.get("state"))
    if state != "running" or is_being_written(directory):
        return state
    return f"died at step {status.get('step')}, last heard of {status.get('updated')} from {status.get('process', 'unknown')}"


def read_metrics(directory: Path, *, times: bool = True) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, in order, with NaN and inf as floats again; without `time/…` unless `times`.

    Raises PrismError when there is no such file or a line cannot be read.
    """
    path = directory / METRICS
    if not path.is_file():
        raise PrismError("no metrics here", where=str(path), remedy="name the run directory of a stage")
    try:
        return [
            {
                name: NON_FINITE[value] if isinstance(value, str) and name != "prefix" else value
                for name, value in {"step": row["step"], "prefix": row["prefix"], **row}.items()
                if times or not name.startswith(TIME_PREFIX)
            }
            for row in list(read_json_lines(path))
        ]
    except KeyError as error:
        raise PrismError(f"this is no file of metrics: {error}", where=str(path)) from error


def _refuse_foreign_files(directory: Path) -> None:
    """Makes the directory; a run's file names in it without a run's status are somebody else's files, which stay as they are."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise PrismError(f"cannot make the run directory: {error.strerror}", where=str(directory)) from error
    foreign = [name for name in (CONFIG, ENVIRONMENT, METRICS, SAMPLES, BAD_SAMPLES) if (directory / name).exists()]
    if foreign and not (directory / STATUS).exists():
        raise PrismError(
            f"the run directory holds {', '.join(foreign)}, which no run of this program wrote",
            where=str(directory),
            remedy="set another experiment.dir",
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
