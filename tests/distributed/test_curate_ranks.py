"""Curation on two ranks, data-parallel and with the model cut over both, against one rank: asked once, written the same."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path
from typing import Any

from helpers.chat_server import chat_server
from helpers.digits_teacher import teacher, what_was_asked
from helpers.ranks import run_ranks
from helpers.stages import run_stage, settings

from prism_nemo.config.compose import load_config
from prism_nemo.config.schema import ParallelConfig, RuntimeConfig
from prism_nemo.engine.runtime import session
from prism_nemo.errors import PrismError

FILES = ("curated.jsonl", "pass_rates.jsonl", "left_out.jsonl")
TRIES = ("rollout.num_rollouts_per_prompt=4", "rollout.max_batch_size=24", "limit_samples=33")


def on_ranks(runs: list[list[str]]) -> list[str]:
    """What each run ended with on this rank."""
    ends = []
    with session(ParallelConfig(), RuntimeConfig()):
        for given in runs:
            config: Any = load_config("curate", given)
            try:
                importlib.import_module("prism_nemo.stages.curate").run(config)
                ends.append("finished")
            except PrismError as error:
                ends.append(f"{type(error).__name__}: {error.what}")
    return ends


def test_two_ranks_curate_what_one_does(tmp_path: Path) -> None:
    def rarely_right(record: str, attempt: int, text: str) -> str:
        return text if (int(record.rpartition("-")[2]) + attempt) % 3 else "no format"

    with chat_server(teacher(rarely_right)) as server:
        url = f"teacher.base_url={server.base_url}"
        run_stage("curate", tmp_path / "one", url, *TRIES)
        asked_by_one = Counter(what_was_asked(seen.body) for seen in server.seen)
        server.seen.clear()
        tp = "parallel.tensor_model_parallel_size=2"
        budget, none = "teacher.max_requests=5", "teacher.max_requests=null"
        runs = [
            settings("curate", tmp_path / "dp", url, *TRIES, budget),
            settings("curate", tmp_path / "dp", url, *TRIES, none),
            settings("curate", tmp_path / "tp", url, *TRIES, f"teacher.cache_dir={tmp_path / 'dp' / 'teacher'}", tp),
            settings(
                "curate", tmp_path / "failing", url, *TRIES, "teacher.base_url=http://127.0.0.1:9/v1", "teacher.max_attempts=2"
            ),
        ]
        ends = run_ranks(on_ranks, 2, runs)
        assert ends[0] == ends[1]
        assert ends[0][0] == "BudgetExhausted: the budget is used up: requests 5 of 5"
        assert ends[0][1:3] == ["finished", "finished"]
        assert ends[0][3].startswith(
            "EndpointError: 2 attempts failed, the last one so: the connection failed: ConnectionRefused"
        )
        assert Counter(what_was_asked(seen.body) for seen in server.seen) == asked_by_one
    for name in FILES:
        expected = (tmp_path / "one" / name).read_text()
        assert len(expected.splitlines()) > 3
        for run in ("dp", "tp"):
            assert (tmp_path / run / name).read_text() == expected, (run, name)
