"""What every stage's loop does around its own steps: resume, draw batches, log, save, validate, stop.

A trainer writes its loop out and calls this; nothing is inherited:

    for step in loop.steps(self):
        batch = loop.next_batch(self.stream)
        ...
        loop.end_step(metrics, samples)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from prism_nemo.config.compose import dump_config
from prism_nemo.config.schema import (
    AlignConfig,
    CurateConfig,
    EvalConfig,
    GenerateConfig,
    PairsConfig,
    RLVRConfig,
    SFTConfig,
    WarmupConfig,
)
from prism_nemo.data.records import Record
from prism_nemo.data.stream import RecordStream
from prism_nemo.engine import watch
from prism_nemo.engine.checkpoint import Checkpointed, CheckpointStore
from prism_nemo.engine.runtime import Runtime
from prism_nemo.engine.writing import SaveError, SaveHangs
from prism_nemo.errors import PrismError
from prism_nemo.experiment import Experiment
from prism_nemo.progress import StepProgress
from prism_nemo.stages.bad_samples import record_step_without_update, settle_bad_records
from prism_nemo.stages.signals import EXIT_INTERRUPTED, StopSignals

TrainingConfig = SFTConfig | WarmupConfig | AlignConfig | RLVRConfig
SamplingConfig = EvalConfig | PairsConfig | CurateConfig | GenerateConfig  # of commands that train nothing

LAST_SAVE_SECONDS = 60.0  # that a save under way gets when an error ends the run

T = TypeVar("T")


class Trainer(Protocol):
    """What the loop needs of a stage's trainer."""

    @property
    def models(self) -> Mapping[str, Checkpointed]: ...

    @property
    def stream(self) -> RecordStream[Any]: ...

    def run_validation(self) -> dict[str, float]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def open_experiment(stage: str, config: TrainingConfig | SamplingConfig, runtime: Runtime) -> Experiment:
    """The run directory of a stage, made by the main rank before any other looks into it. A collective."""
    settings = config.experiment
    experiment = Experiment(
        Path(settings.dir),
        stage=stage,
        config_yaml=dump_config(config),
        resume=settings.resume,
        overwrite=settings.overwrite,
        is_main=runtime.is_main,
        tensorboard=settings.tensorboard,
        nemo_exp_manager=settings.nemo_exp_manager,
        progress=settings.progress,
    )
    runtime.barrier()
    watch.report_to(Path(settings.dir), lambda reason: experiment.fail(watch.RankLost(reason)))
    return experiment


class StageLoop:
    """Owns the run directory and the checkpoints of one stage."""

    def __init__(self, stage: str, config: TrainingConfig, runtime: Runtime) -> None:
        self.config = config
        self.runtime = runtime
        self.directory = Path(config.experiment.dir)
        self.stage = stage
        self.experiment = open_experiment(stage, config, runtime)
        self.checkpoints = CheckpointStore(
            self.directory,
            runtime,
            keep_last_k=config.trainer.keep_last_k,
            from_older=config.experiment.resume_from_older,
            longest_seconds=60 * config.trainer.max_save_minutes,
        )
        self.done = 0  # steps
        self._bad_steps = 0
        self._bad_listed = 0
        self._saved_step = 0
        self._failed_saves = 0  # in a row
        self._signals = StopSignals()
        self._times: dict[str, float] = {}

    def __enter__(self) -> StageLoop:
        self._signals.__enter__()
        self.experiment.__enter__()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        self._signals.__exit__(kind, error, traceback)
        if error is not None:
            if not watch.is_of_another_rank(error):  # which is gone: its part would never come
                self._wait_for_save()
            error = watch.explain(error)
            kind = type(error)
        self.experiment.__exit__(kind, error, traceback)

    def steps(self, trainer: Trainer) -> Iterator[int]:
        """The steps still to do, from 0 or from behind the newest checkpoint, each ended with `end_step`.

        Behind a step that calls for it, saves and then validates; the last one always does. After SIGTERM or SIGUSR1 the running
        step is finished and saved, and the process exits with status 75; a validation that was due is made up for when the run
        is resumed.
        """
        start = self._resume(trainer)
        bar = self.experiment.progress_steps(start, self.config.trainer.max_steps, self.stage)
        for step in bar:
            began = time.perf_counter()
            self._ended = False
            self._times = {}
            self._is_at(f"step {step + 1}")
            yield step
            assert self._ended, "the loop's body must call end_step"
            self.done = step + 1
            self._metrics["time/step_seconds"] = time.perf_counter() - began
            self.experiment.log_metrics(step + 1, self._metrics | self._times)
            self.experiment.log_samples(step + 1, self._samples)
            self._show(bar)
            self._save_and_validate(trainer, step + 1)

    def _resume(self, trainer: Trainer) -> int:
        """Loads the newest checkpoint and returns its step; 0 when there is none."""
        self._is_at("loading a checkpoint")
        state = self.checkpoints.load(trainer.models)
        if self.checkpoints.notice:
            self.experiment.notice(self.checkpoints.notice)
        if state is None:
            self.experiment.rewind(0)
            return 0
        start: int = state["step"]
        self.done = start
        self._saved_step = start
        self._bad_steps = state["bad_steps"]
        trainer.load_state_dict(state["trainer"])
        self.experiment.rewind(start)
        validated = self.runtime.max_over_all(int(self.experiment.has_metrics(start, "validation"))) > 0
        if self._validation_is_due(start) and not validated:
            self.validate(trainer, start)
        return start

    def _save_and_validate(self, trainer: Trainer, done: int) -> None:
        """What is due behind step `done` (from 1). Saving comes first: nothing that goes wrong later takes the step away."""
        settings = self.config.trainer
        last, stop, due = done == settings.max_steps, self._anyone_was_told_to_stop(), self._validation_is_due(done)
        saves = last or stop or bool(settings.save_interval and done % settings.save_interval == 0)
        self._settle_save(may_fail=True, wait=False)
        if saves:
            self.save(trainer, done, may_fail=not last and not stop)
        if due and not stop:
            self.validate(trainer, done)
            due, stop = False, self._anyone_was_told_to_stop()
            if stop:  # also a save that is under way is waited for
                self.save(trainer, done)
        if stop and (due or not last):
            self.experiment.interrupt()
            raise SystemExit(EXIT_INTERRUPTED)

    def _validation_is_due(self, done: int) -> bool:
        settings = self.config.trainer
        if self.config.data.validation is None:
            return False
        return done == settings.max_steps or bool(settings.val_check_interval and done % settings.val_check_interval == 0)

    def next_batch(self, stream: RecordStream[T]) -> list[tuple[Record, T]]:
        """This data-parallel rank's part of the next global batch, without its unusable records. A collective.

        These are listed, and past the allowed share the run stops, on every rank. A global batch of such records alone is passed
        over: no step is done on nothing.
        """
        while True:
            batch = stream.next_batch(self.runtime.data_parallel_rank, self.runtime.data_parallel_size)
            new = stream.bad[self._bad_listed :]
            self._bad_listed = len(stream.bad)
            if settle_bad_records(
                stream.tally,
                tried=stream.tried,
                failed=stream.failed,
                new=new,
                runtime=self.runtime,
                experiment=self.experiment,
            ):
                return batch

    def end_step(self, metrics: Mapping[str, float], samples: Sequence[Mapping[str, Any]] = ()) -> None:
        """Hands over what a step measured; `samples` are written as they are."""
        self._ended = True
        self._metrics = dict(metrics)
        self._samples = samples

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Adds the block's wall time to the step's metrics as `time/NAME_seconds`."""
        began = time.perf_counter()
        self._is_at(f"step {self.done + 1}, {name}")
        yield
        self._is_at(f"step {self.done + 1}")
        key = f"time/{name}_seconds"
        self._times[key] = self._times.get(key, 0.0) + time.perf_counter() - began

    def guard(self, applied: bool, what: str, sample_ids: Sequence[str], *, at_fault: bool) -> None:
        """Counts consecutive steps without an update because a loss, score or gradient was not finite.

        After `trainer.max_bad_steps` of them the run stops; the samples of every such step are written down, and which ranks were
        `at_fault`: had what was not finite before ranks were summed. `sample_ids` are this rank's.
        """
        if applied:
            self._bad_steps = 0
            return
        self._bad_steps += 1
        ranks = record_step_without_update(self.done + 1, what, sample_ids, at_fault, self.runtime, self.experiment)
        if self._bad_steps >= self.config.trainer.max_bad_steps:
            raise PrismError(
                f"{what} was not finite in {self._bad_steps} steps in a row, the last time {ranks}",
                where=str(self.directory / "bad_samples.jsonl"),
                remedy="look at those samples; lower the learning rate, or use precision fp32",
            )

    def validate(self, trainer: Trainer, done: int) -> None:
        self._is_at(f"validation behind step {done}")
        metrics = trainer.run_validation()
        if metrics:
            self.experiment.log_metrics(done, metrics, prefix="validation")

    def save(self, trainer: Trainer, done: int, *, may_fail: bool = False) -> None:
        """Saves the state behind step `done` (from 1), unless it is saved already. A collective.

        One that `may_fail`, as on a full disk, is written while training goes on (`trainer.async_save`). If it does fail, the
        earlier checkpoints stay as they are, and that is only told, until `trainer.max_failed_saves` have in a row. Any other is
        waited for, and raises SaveError.
        """
        self._is_at(f"saving step {done}")
        self._settle_save(may_fail=may_fail or not self._is_under_way(done), wait=True)
        if done <= self._saved_step:
            return
        state = {"trainer": trainer.state_dict(), "bad_steps": self._bad_steps}
        wait = not may_fail or not self.config.trainer.async_save
        with self._failing(may_fail, done):
            self.checkpoints.begin(done, trainer.models, state, before=self.experiment.flush, copied=not wait)
        self._settle_save(may_fail=may_fail, wait=wait)

    def _wait_for_save(self) -> None:
        """What is under way as an error ends the run gets a while to come through. Not a collective."""
        saving = self.checkpoints.under_way
        if saving is None or saving.wait(0.0):
            return
        if self.runtime.is_main:
            print(f"{self.directory}: an error ends the run as soon as step {saving.step} is saved", file=sys.stderr, flush=True)
        if not saving.wait(LAST_SAVE_SECONDS):
            saving.give_up()
            watch.exit_within(LAST_SAVE_SECONDS)  # Python waits for threads that write, however long that takes

    def _is_under_way(self, done: int) -> bool:
        return self.checkpoints.under_way is not None and self.checkpoints.under_way.step == done

    def _settle_save(self, *, may_fail: bool, wait: bool) -> None:
        """Looks whether the save under way, if any, has come through, or waits until it has. A collective."""
        if self.checkpoints.under_way is None:
            return
        with self._failing(may_fail, self.checkpoints.under_way.step):
            saved = self.checkpoints.settle(wait=wait)
            if saved is not None:
                self._saved_step, self._failed_saves = saved, 0

    @contextmanager
    def _failing(self, may_fail: bool, step: int) -> Iterator[None]:
        """A save of step `step`, which fails the run or, when it `may_fail`, only counts."""
        try:
            yield
        except SaveError as error:
            self._failed_saves += 1
            if isinstance(error, SaveHangs):
                watch.exit_within(LAST_SAVE_SECONDS)  # whatever else this process still wants of that file system
                raise
            if not may_fail or self._failed_saves >= self.config.trainer.max_failed_saves:
                raise
            self.experiment.notice(f"step {step}: {error.what}. Going on; saving is tried again when it is due next")

    def _anyone_was_told_to_stop(self) -> bool:
        return self.runtime.max_over_all(int(self._signals.received)) > 0

    def _is_at(self, what: str) -> None:
        watch.doing(f"{self.stage}, {what}")

    def _show(self, bar: StepProgress) -> None:
        shown = ("loss", "reward", "accuracy", "caption_accuracy", "format_rate", "perception/accuracy", "reasoning/accuracy")
        bar.update(**{name: self._metrics[name] for name in shown if name in self._metrics})
