"""RLVR and evaluation with a judge: whole stages that ask a server on this machine."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from helpers.chat_server import Answer, Seen, chat_server, completion
from helpers.stages import run_stage, written

from prism_nemo.run_directory import read_json_lines


def test_stages_with_a_judge(tmp_path: Path) -> None:
    """A judge to whom everything is right makes every response of valid format right; both stages share its verdicts."""

    def generous(seen: Seen, number: int) -> Answer:
        return completion("CORRECT")

    with chat_server(generous) as server:
        judge = [f"reward.judge.{key}" for key in ("enabled=true", f"base_url={server.base_url}", "model=m")]
        judge.append(f"reward.judge.cache_dir={tmp_path / 'judge'}")
        plain = run_stage("rlvr", tmp_path / "plain", "trainer.max_steps=1")
        judged = run_stage("rlvr", tmp_path / "judged", "trainer.max_steps=1", *judge)
        run_stage("eval", tmp_path / "eval", *judge)
        asked = Counter(json.dumps(seen.body) for seen in server.seen)
    assert max(asked.values(), default=0) <= 1
    (before,), (after,) = ([row for row in written(run)[0] if "accuracy" in row] for run in (plain, judged))
    assert after["rewards/judged"] == after["rewards/judged_correct"] and "rewards/judged" not in before
    assert after["accuracy"] >= before["accuracy"]
    assert (tmp_path / "judge" / "usage.jsonl").exists() == bool(asked)
    assert len(list(read_json_lines(tmp_path / "judged" / "samples.jsonl"))) > 0
