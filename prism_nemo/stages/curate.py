"""Teacher demonstrations for the prompts that the policy fails at, as the paper made its own.

    prism-nemo curate model.path=runs/sft data.train=prompts.jsonl teacher.base_url=https://host/v1 teacher.model=NAME \
                      teacher.api_key_env=VARIABLE curate.exclude=[benchmark.jsonl] experiment.dir=runs/curated

    curated.jsonl       the demonstrations, in `sharegpt` form
    pass_rates.jsonl    how many of its tries at each prompt the policy got right
    left_out.jsonl      every other record, and why
    report.json         counts by reason, and what was used of the endpoint

Records that are nearly the same as earlier ones or as a benchmark's go first, then those that the policy solves; the teacher is
asked about the rest. What a record gave is on the disk before the next ones, and so is every answer: a run that was stopped, by
whatever means, goes on there.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prism_nemo.config.schema import CurateConfig
from prism_nemo.config.validate import validate
from prism_nemo.curate.asking import ACCEPTED, TeacherAsking
from prism_nemo.curate.comparing import AT_ONCE, benchmark_fingerprints, contents_digest, find_overlap, open_benchmarks
from prism_nemo.curate.fingerprints import Fingerprint
from prism_nemo.curate.pass_rates import PassRate, pass_rate_lines, read_pass_rates
from prism_nemo.curate.pictures import Pictures
from prism_nemo.curate.teacher import demonstration
from prism_nemo.data.bad_records import BadRecord, BadTally
from prism_nemo.data.open import open_file
from prism_nemo.data.records import Record
from prism_nemo.endpoint.client import Endpoint
from prism_nemo.endpoint.errors import BudgetExhausted
from prism_nemo.engine.runtime import Runtime, session
from prism_nemo.errors import ConfigError, DataError, PrismError
from prism_nemo.experiment import Experiment
from prism_nemo.models.policy import PolicyModel
from prism_nemo.packing.groups import EncodedPrompt
from prism_nemo.rewards.grader import Grader, check_answer
from prism_nemo.rewards.question import AnswerKind
from prism_nemo.rollout.batch import prompts_at_once
from prism_nemo.rollout.sampler import Sampler
from prism_nemo.run_directory import resolve_model_directory, to_json_line, write_atomically
from prism_nemo.stages.loop import open_experiment
from prism_nemo.stages.parts import PartFiles
from prism_nemo.stages.sampled_records import EncodedRecords, sample_records
from prism_nemo.stages.sampling_run import build_sampler
from prism_nemo.stages.signals import EXIT_INTERRUPTED, StopSignals

RESULT = "curated.jsonl"
PASS_RATES = "pass_rates.jsonl"
LEFT_OUT = "left_out.jsonl"
REPORT = "report.json"
UNUSABLE = "unusable"
SOLVED = "solved by the policy"
_SLICE_SECONDS = 2.0  # between two meetings of the ranks while the main one asks


def run(config: CurateConfig) -> None:
    """The `curate` command.

    Told to stop, it ends with status 75; the same command goes on. When the teacher's budget is used up it writes what there is
    so far and raises BudgetExhausted; the same command with a larger budget goes on.
    """
    validate(config)
    with (
        Grader(config.reward) as grader,
        StopSignals() as signals,
        session(config.parallel, config.runtime) as runtime,
        open_experiment("curate", config, runtime) as experiment,
    ):
        experiment.rewind(0)
        if config.data.train is None:
            raise ConfigError("there is no data", where="data.train", remedy="name a file of prompts with verified answers")
        found = open_file(config.data.train, config.data, required=("answer",))
        experiment.record_bad_samples([asdict(bad) for bad in found.bad])
        _Curation(config, found.records[: config.limit_samples], grader, signals, runtime, experiment).run()


@dataclass(eq=False)
class _Curation:
    """One run, of which every rank calls every step. `left_out`: by number, the records that are, why, and what they are like."""

    config: CurateConfig
    records: Sequence[Record]
    grader: Grader
    signals: StopSignals
    runtime: Runtime
    experiment: Experiment
    left_out: dict[int, tuple[str, str]] = field(default_factory=dict)
    parts: dict[str, PartFiles] = field(default_factory=dict)

    def run(self) -> None:
        config, folder = self.config, Path(self.config.experiment.dir)
        cache = Path(config.teacher.cache_dir) if config.teacher.cache_dir is not None else folder / "teacher"
        endpoint = Endpoint(config.teacher, cache, section="teacher", stopped=lambda: self.signals.received)
        made_of = {"set of records": contents_digest(self.records)}
        self._compare(made_of)
        rates = self._pass_rates(made_of) if config.curate.unsolved_only else {}
        for number, rate in rates.items():
            if rate.share > config.curate.max_solved_share:
                self.left_out[number] = (SOLVED, f"{rate.solved} of {rate.of} tries")
        exhausted = self._ask(endpoint, made_of)
        self._write(endpoint, rates, complete=exhausted is None)
        if exhausted is not None:
            self.experiment.interrupt()
            raise exhausted
        for parts in self.parts.values():
            parts.remove()

    @property
    def _kept(self) -> list[int]:
        return [number for number in range(len(self.records)) if number not in self.left_out]

    def _open_parts(self, name: str, made_of: dict[str, str]) -> set[int]:
        """Opens the results of one step that earlier sessions have left; the records that are among them."""
        parts = self.parts[name] = PartFiles(Path(self.config.experiment.dir) / f"{name}_parts", made_of, self.runtime)
        done = {row["record"] for row in parts.in_order()}
        self.runtime.barrier()  # all have read before any writes
        return done

    def _tally(self, name: str, num_records: int) -> BadTally:
        """Of the records that an earlier session could not use in this step."""
        tally = BadTally(max_share=self.config.data.max_bad_sample_share, num_records=num_records)
        for row in self.parts[name].in_order():
            tally.tried += 1
            tally.failed += "bad" in row
        return tally

    def _note_unusable(self, name: str) -> None:
        for row in self.parts[name].in_order():
            if "bad" in row:
                self.left_out[row["record"]] = (UNUSABLE, row["bad"]["reason"])

    def _stop_if_told(self) -> None:
        """Ends the process with status 75, on every rank, when any of them got SIGTERM or SIGUSR1. A collective."""
        if self.runtime.max_over_all(int(self.signals.received)) > 0:
            raise SystemExit(EXIT_INTERRUPTED)

    # Duplicates and benchmarks

    def _compare(self, made_of: dict[str, str]) -> None:
        runtime, experiment = self.runtime, self.experiment
        benchmarks = open_benchmarks(self.config)
        done = self._open_parts("compared", made_of)
        tally = self._tally("compared", len(self.records))
        todo = [number for number in range(len(self.records)) if number not in done]
        together = AT_ONCE * runtime.world_size
        for step in experiment.progress_steps(0, -(-len(todo) // together), "compare"):
            start = step * together + runtime.rank * AT_ONCE
            shares = runtime.gather_objects_over_all([self._compared(number) for number in todo[start : start + AT_ONCE]])
            rows: list[dict[str, Any]] = [row for share in shares for row in share]
            if runtime.is_main:
                self.parts["compared"].append(rows)
            bad = [BadRecord(**row["bad"]) for row in rows if "bad" in row]
            experiment.record_bad_samples([asdict(record) for record in bad])
            tally.add(len(rows), len(bad), bad)
            self._stop_if_told()
        runtime.barrier()
        self._note_unusable("compared")
        found = list(benchmark_fingerprints(benchmarks, runtime))
        if runtime.is_main:
            usable = (row for row in self.parts["compared"].in_order() if "bad" not in row)
            self.left_out |= find_overlap(usable, self.records, found, self.config.curate)
        self.left_out = runtime.broadcast_from_main(self.left_out)
        made_of |= {f"benchmark {name}": contents_digest(records) for name, records in benchmarks.items()}

    def _compared(self, number: int) -> dict[str, Any]:
        record = self.records[number]
        try:
            check_answer(record)
            if record.answer_kind is not None and record.answer_kind not in {kind.value for kind in AnswerKind}:
                raise DataError(f"there is no kind of answer named {record.answer_kind!r}")
            return {"record": number, "fingerprint": Fingerprint.of(record).to_json()}
        except DataError as error:
            return {"record": number, "bad": asdict(BadRecord.from_error(record.id, f"record {record.id}", error))}

    # What the policy solves

    def _pass_rates(self, made_of: dict[str, str]) -> dict[int, PassRate]:
        """Of all records that are not left out, by number."""
        config, runtime = self.config, self.runtime
        if config.curate.pass_rates is not None:
            return read_pass_rates(Path(config.curate.pass_rates), {number: self.records[number] for number in self._kept})
        policy = resolve_model_directory(Path(config.model.path), PolicyModel.name)
        done = self._open_parts("tried", made_of | {"policy": str(policy)})
        todo = self._kept
        if not runtime.broadcast_from_main(set(todo) <= done):
            self._try(todo)
        self._note_unusable("tried")
        kept = set(self._kept)
        rows = [row for row in self.parts["tried"].in_order() if row["record"] in kept]
        rates = {row["record"]: PassRate(row["solved"], row["of"]) for row in rows}
        if runtime.is_main:
            write_atomically(Path(config.experiment.dir) / PASS_RATES, pass_rate_lines(self.records, rates))
        return rates

    def _try(self, todo: Sequence[int]) -> None:
        """Samples the policy's tries at the records that are in no part yet."""
        with closing(build_sampler(self.config, self.runtime, self.grader)) as sampler:
            sample_records(
                todo,
                self.parts["tried"],
                lambda numbers: self._tried(sampler, numbers),
                at_once=prompts_at_once(self.config.rollout),
                max_bad_share=self.config.data.max_bad_sample_share,
                experiment=self.experiment,
                name="try",
                stop_if_told=self._stop_if_told,
            )

    def _tried(self, sampler: Sampler, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """How many of its tries at each record the policy got right, or why the record cannot be used."""

        def encode(record: Record) -> tuple[EncodedPrompt, dict[str, Any]]:
            return sampler.encoder.encode_prompt(record), {"solved": 0, "of": 0}

        encoded = EncodedRecords.of(numbers, self.records, encode)
        rollouts = sampler.sample(encoded.batch, self.config.rollout, step=0)
        for rollout, accuracy in zip(rollouts.rollouts, rollouts.correct, strict=True):
            row = encoded.usable[rollout.prompt_index]
            row["of"] += 1
            row["solved"] += accuracy is not None and accuracy >= 1.0
        return encoded.rows

    # The teacher

    def _ask(self, endpoint: Endpoint, made_of: dict[str, str]) -> PrismError | None:
        """Asks from the main rank, while the others meet it from slice to slice. What ended the budget, or None."""
        runtime = self.runtime
        done = self._open_parts("asked", made_of)
        with TeacherAsking(self.records, self._undone(done), self.config, endpoint, self.grader) as asking:
            work = self._slices(asking)
            ended: PrismError | None = None
            finished = False
            while not finished:
                if runtime.is_main:
                    try:
                        next(work, None)
                        ended = asking.exhausted
                    except PrismError as error:
                        ended = error
                self._stop_if_told()
                failed = ended is not None and not isinstance(ended, BudgetExhausted)
                finished, ended = runtime.broadcast_from_main((asking.done or failed, ended))
        if ended is not None and not isinstance(ended, BudgetExhausted):
            raise ended
        return ended

    def _undone(self, done: set[int]) -> list[int]:
        """For the main rank to ask about."""
        return [number for number in self._kept if number not in done] if self.runtime.is_main else []

    def _slices(self, asking: TeacherAsking) -> Iterator[None]:
        """Asks, writes down what came, and comes back every few seconds."""
        endpoint, accepted = asking.endpoint, 0
        bar = self.experiment.progress_steps(0, asking.num_left, "ask")
        steps = iter(bar)
        next(steps, None)
        while not asking.done:
            rows = asking.work(_SLICE_SECONDS, lambda: self.signals.received)
            self.parts["asked"].append(rows)
            accepted += sum(row["outcome"] == ACCEPTED for row in rows)
            usage = endpoint.ledger.usage()
            bar.update(accepted=accepted, requests=usage.requests, cost=usage.cost(self.config.teacher))
            for _ in rows:
                next(steps, None)
            yield

    # The result

    def _write(self, endpoint: Endpoint, rates: dict[int, PassRate], *, complete: bool) -> None:
        if not self.runtime.is_main:
            return
        folder = Path(self.config.experiment.dir)
        kept = set(self._kept)
        pictures = Pictures(self.records, folder)
        counts = Counter(reason for reason, _ in self.left_out.values())
        temporary = folder / f".{RESULT}.new"
        with temporary.open("w", encoding="utf-8") as file:
            for row in self.parts["asked"].in_order():
                number = row["record"]
                if number not in kept:  # of settings that may change, as a larger budget's run may have
                    continue
                counts[row["outcome"]] += 1
                if row["outcome"] == ACCEPTED:
                    file.write(to_json_line(self._demonstration(row, rates.get(number), pictures)) + "\n")
                else:
                    self.left_out[number] = (row["outcome"], row["why"])
        temporary.replace(folder / RESULT)
        self._write_left_out(folder)
        self._report(endpoint, counts, complete=complete, root=pictures.root)

    def _demonstration(self, row: dict[str, Any], rate: PassRate | None, pictures: Pictures) -> dict[str, Any]:
        record = self.records[row["record"]]
        about: dict[str, Any] = {"teacher": self.config.teacher.model, "teacher_answers": row["answers"]}
        if rate is not None:
            about |= {"pass_rate": rate.share, "tries": rate.of}
        return demonstration(record, row["response"], pictures.fields(record), about)

    def _write_left_out(self, folder: Path) -> None:
        rows = (
            {"id": self.records[number].id, "reason": reason, "detail": detail}
            for number, (reason, detail) in sorted(self.left_out.items())
        )
        write_atomically(folder / LEFT_OUT, "".join(to_json_line(row) + "\n" for row in rows))

    def _report(self, endpoint: Endpoint, counts: Counter[str], *, complete: bool, root: Path) -> None:
        records = {"records": len(self.records), **dict(sorted(counts.items()))}
        not_asked = len(self.records) - sum(counts.values())
        if not_asked:
            records["not asked yet"] = not_asked
        usage = endpoint.ledger.usage()
        report = {
            "complete": complete,
            "counts": records,
            "usage": {**vars(usage), "cost": usage.cost(self.config.teacher)},
            "image_root": str(root),
        }
        write_atomically(Path(self.config.experiment.dir) / REPORT, json.dumps(report, indent=2) + "\n")
        self.experiment.log_metrics(1, {name.replace(" ", "_").replace(":", ""): count for name, count in records.items()})
        shown = ", ".join(f"{count} {name}" for name, count in records.items())
        print(f"{Path(self.config.experiment.dir) / RESULT}: {shown}\n{endpoint.summary()}; images are below {root}", flush=True)
