"""Records read over an index by two data-parallel ranks: the broken records and the metrics of one rank. One launch."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

from helpers.ranks import run_ranks
from helpers.stages import assert_same_metrics, run_stage, settings, tiny_task, written

from prism_nemo.config.compose import load_config
from prism_nemo.config.enums import Device
from prism_nemo.config.schema import ParallelConfig, RuntimeConfig
from prism_nemo.engine.runtime import session
from prism_nemo.run_directory import read_json_lines

STEPS = 9  # of 8 records each: the 64 records once, and a part of the second epoch


def on_two_ranks(overrides: list[str]) -> None:
    with session(ParallelConfig(), RuntimeConfig(device=Device.cpu)):
        importlib.import_module("prism_nemo.stages.sft").run(load_config("sft", overrides))


def overrides_of(run: Path, data: Path, cache: Path) -> list[str]:
    sources = {"all": {"path": str(data / "public.jsonl"), "weight": 3}, "clean": {"path": str(data / "teacher.json")}}
    given = [
        "data.train=null",
        f"data.mixture={json.dumps(sources)}",
        f"data.cache_dir={cache}",
        "data.index_above_mb=0",
        "data.max_bad_sample_share=0.2",
        f"trainer.max_steps={STEPS}",
    ]
    return settings("sft", run, *given)


def test_two_ranks_read_what_one_reads(tmp_path: Path) -> None:
    shutil.copytree(tiny_task().data.root, tmp_path / "data")
    lines = (tmp_path / "data" / "public.jsonl").read_text().splitlines()
    lines[3], lines[8], lines[40] = "{", "[]", json.dumps(json.loads(lines[40]) | {"images": ["images/none.png"]})
    (tmp_path / "data" / "public.jsonl").write_text("\n".join(lines))
    clean = [json.loads(line) for line in (tmp_path / "data" / "teacher.jsonl").read_text().splitlines()]
    (tmp_path / "data" / "teacher.json").write_text(json.dumps(clean))
    two = overrides_of(tmp_path / "two", tmp_path / "data", tmp_path / "cache")
    run_ranks(on_two_ranks, 2, two, timeout_seconds=300)
    one = run_stage("sft", tmp_path / "one", *overrides_of(tmp_path / "one", tmp_path / "data", tmp_path / "other"))
    listed = [sorted(row["id"] for row in read_json_lines(run / "bad_samples.jsonl")) for run in (one, tmp_path / "two")]
    assert listed[0] == listed[1]
    assert {"public:4", "public:9"} & set(listed[0])
    assert_same_metrics(written(tmp_path / "two")[0], written(one)[0], 1e-3)
    assert len(list((tmp_path / "cache").glob("*.index"))) == 2
    assert not list((tmp_path / "cache").glob("*.new"))
