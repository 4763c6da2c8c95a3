"""The `eval` command: what it measures, in batches of any size, and that it goes on where it was stopped."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.stages import HELD_OUT, run_stage, tiny_task, written
from helpers.stopped_runs import signal_behind_batch

import prism_nemo
from prism_nemo.errors import ConfigError, PrismError
from prism_nemo.experiment import Experiment
from prism_nemo.stages.parts import PartFiles

DOCUMENTATION = Path(prism_nemo.__file__).parent.parent / "docs" / "evaluation.md"
SMALL_BATCHES = "rollout.max_batch_size=5"  # of twelve prompts
SEVERAL = ("rollout.num_rollouts_per_prompt=4", "category=question")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_stage("eval", tmp_path_factory.mktemp("eval") / "run", "reward.accuracy_weight=0.7", "reward.format_weight=0.1")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody stopped, with four responses to each prompt."""
    return run_stage("eval", tmp_path_factory.mktemp("eval") / "several", *SEVERAL)


def evaluation(run: Path) -> dict[str, Any]:
    return json.loads((run / "evaluation.json").read_text())


def test_the_figures_are_those_of_the_samples(whole: Path) -> None:
    """The reward's, too, by the weights that were given."""
    samples = written(whole)[1]
    found = evaluation(whole)
    for decoding, figures in (("sampled", found), ("greedy", found["greedy"])):
        rows = [row for row in samples if row["decoding"] == decoding]
        assert len(rows) == HELD_OUT
        assert figures["accuracy"] == pytest.approx(sum(row["correct"] for row in rows) / HELD_OUT)
        assert figures["format_rate"] == pytest.approx(sum(row["valid"] for row in rows) / HELD_OUT)
        rewards = [0.7 * row["correct"] + 0.1 * row["valid"] for row in rows]
        assert figures["reward"] == pytest.approx(sum(rewards) / HELD_OUT, rel=1e-6)
    assert 0 < found["reward"] != found["greedy"]["reward"]


def test_the_columns_of_the_samples_are_those_of_the_documentation(whole: Path) -> None:
    (row,) = re.findall(r"^\| `samples.jsonl` \|(.*)\|$", DOCUMENTATION.read_text(), re.MULTILINE)
    assert {*re.findall(r"`(\w+)`", row)} == {name for name in written(whole)[1][0] if name != "step"}


def test_the_size_of_the_batches_changes_nothing(whole: Path, tmp_path: Path) -> None:
    run = run_stage("eval", tmp_path / "run", SMALL_BATCHES, "reward.accuracy_weight=0.7", "reward.format_weight=0.1")
    assert written(run) == written(whole)
    assert evaluation(run) == evaluation(whole)


def test_an_unknown_reward_is_found_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no reward named 'exactt'"):
        run_stage("eval", tmp_path / "run", "reward.name=exactt")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("batch", [2, 7])
def test_a_stopped_evaluation_goes_on(batch: int, several: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the second of six sampled batches, and the first of two greedy ones; a line of the next one was being written."""
    handler = signal.getsignal(signal.SIGTERM)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_behind_batch(patch, batch)
        with pytest.raises(SystemExit) as caught:
            run_stage("eval", run, *SEVERAL, "rollout.max_batch_size=8")
    assert caught.value.code == 75
    assert signal.getsignal(signal.SIGTERM) is handler
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
    assert not (run / "evaluation.json").exists()
    part = run / "parts" / "rank_00000.jsonl"
    kept = [json.loads(line)["record"] for line in part.read_text().splitlines()]
    assert 0 < len(kept) < 2 * HELD_OUT
    with part.open("a") as file:
        file.write('{"record": 23, "sam')
    sampled = []
    append = PartFiles.append

    def note(self: PartFiles, rows: Any) -> None:
        sampled.extend(row["record"] for row in rows)
        append(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(PartFiles, "append", note)
        run_stage("eval", run, *SEVERAL)
    assert sorted([*kept, *sampled]) == list(range(2 * HELD_OUT))
    assert written(run) == written(several)
    assert evaluation(run) == evaluation(several)
    assert not (run / "parts").exists()


def test_a_run_that_died_as_it_wrote_its_results_writes_them_again(
    several: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the samples were written; no prompt is sampled again."""
    log_samples = Experiment.log_samples
    calls = []

    def log_and_die(self: Experiment, *arguments: Any) -> None:
        log_samples(self, *arguments)
        calls.append(arguments)
        if len(calls) == 10:
            raise KeyboardInterrupt

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "log_samples", log_and_die)
        with pytest.raises(KeyboardInterrupt):
            run_stage("eval", run, *SEVERAL)
    assert len((run / "samples.jsonl").read_text().splitlines()) == 40 and not (run / "evaluation.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr(PartFiles, "append", lambda *_: pytest.fail("sampled again"))
        run_stage("eval", run, *SEVERAL)
    assert written(run) == written(several) and evaluation(run) == evaluation(several)


def test_a_stopped_evaluation_does_not_go_on_with_other_truths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny_task().data.root, tmp_path / "data")
    file, run = tmp_path / "data" / "test.jsonl", tmp_path / "run"
    given = (SMALL_BATCHES, f"data.validation={file}")
    with monkeypatch.context() as patch:
        signal_behind_batch(patch, 1)
        with pytest.raises(SystemExit):
            run_stage("eval", run, *given)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[3]["answer"] = "17"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(PrismError, match="made of another set of prompts and verified answers"):
        run_stage("eval", run, *given)


# Several responses a prompt


def test_pass_and_majority_are_those_of_the_samples(several: Path) -> None:
    found = evaluation(several)
    rows: dict[str, list[dict[str, Any]]] = {}
    for row in written(several)[1]:
        if row["decoding"] == "sampled":
            rows.setdefault(row["id"], []).append(row)
    assert len(rows) == HELD_OUT and all(len(group) == 4 for group in rows.values())
    pairs = [(a["correct"] or b["correct"]) for group in rows.values() for a, b in itertools.combinations(group, 2)]
    assert found["pass@1"] == pytest.approx(found["accuracy"])
    assert found["pass@2"] == pytest.approx(sum(pairs) / len(pairs))
    assert found["pass@4"] == pytest.approx(sum(any(row["correct"] for row in group) for group in rows.values()) / HELD_OUT)
    votes = []
    for group in rows.values():
        answers = [row["extracted"] for row in group if row["valid"]]
        best = max(answers, key=answers.count, default=None)  # the first of equally frequent ones
        votes.append(any(row["correct"] for row in group if row["extracted"] == best))
    assert found["majority@4"] == pytest.approx(sum(votes) / HELD_OUT)
    assert "pass@1" not in found["greedy"]


def test_figures_are_broken_down_and_have_intervals(several: Path) -> None:
    found = evaluation(several)
    samples = [row for row in written(several)[1] if row["decoding"] == "sampled"]
    questions = {row["category"] for row in samples}
    assert found["categories"].keys() == questions and len(questions) > 1
    for name, figures in found["categories"].items():
        rows = [row for row in samples if row["category"] == name]
        assert figures["num_prompts"] == len(rows) / 4
        assert figures["accuracy"] == pytest.approx(sum(row["correct"] for row in rows) / len(rows))
    assert (found["num_prompts"], found["num_responses"], found["greedy"]["num_responses"]) == (12, 48, 12)
    for name, (low, high) in found["intervals"].items():
        assert low <= found[name] <= high
    assert found["intervals"].keys() == {name for name, value in found.items() if isinstance(value, float)}


def test_a_k_beyond_the_rollouts_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pass@8 cannot be told from 4 responses"):
        run_stage("eval", tmp_path / "run", *SEVERAL, "pass_at_k=[1,8]")
