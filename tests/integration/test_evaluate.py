"""The `eval` command: what it measures, in batches of any size, and that it can be stopped."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.stages import HELD_OUT, run_stage, written

from prism_nemo.errors import ConfigError
from prism_nemo.experiment import Experiment

SMALL_BATCHES = "rollout.max_batch_size=5"  # of twelve prompts


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_stage("eval", tmp_path_factory.mktemp("eval") / "run", "reward.accuracy_weight=0.7", "reward.format_weight=0.1")


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


def test_the_size_of_the_batches_changes_nothing(whole: Path, tmp_path: Path) -> None:
    run = run_stage("eval", tmp_path / "run", SMALL_BATCHES, "reward.accuracy_weight=0.7", "reward.format_weight=0.1")
    assert written(run) == written(whole)
    assert evaluation(run) == evaluation(whole)


def test_an_unknown_reward_is_found_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no reward named 'exactt'"):
        run_stage("eval", tmp_path / "run", "reward.name=exactt")
    assert not (tmp_path / "run").exists()


def test_a_stopped_evaluation_says_so_and_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a signal behind the second batch of three."""
    log_samples = Experiment.log_samples
    batches = []

    def log_and_signal(self: Experiment, *arguments: Any) -> None:
        log_samples(self, *arguments)
        batches.append(len(batches))
        if len(batches) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Experiment, "log_samples", log_and_signal)
        with pytest.raises(SystemExit) as caught:
            run_stage("eval", run, SMALL_BATCHES)
    assert caught.value.code == 75
    assert len(batches) == 2
    assert signal.getsignal(signal.SIGTERM) is handler
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
    assert not (run / "evaluation.json").exists()
    run_stage("eval", run, SMALL_BATCHES)
    assert written(run) == written(run_stage("eval", tmp_path / "unbroken", SMALL_BATCHES))
