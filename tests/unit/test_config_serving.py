"""A rollout server's configuration out of a run's."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.stages import write_tiny_model

from prism_nemo.cli import main
from prism_nemo.config.compose import dump_config, load_config
from prism_nemo.config.enums import Precision, RolloutPlacement
from prism_nemo.config.serving import server_of
from prism_nemo.config.validate import validate
from prism_nemo.errors import ConfigError

RUN = ("model.path=policy", "data.train=prompts.jsonl", "experiment.dir=run", "trainer.global_batch_size=4")
SERVED = ("rollout.placement=separate", "rollout.servers.urls=[http://node2:8900]")


def test_a_server_takes_what_it_needs_of_the_run(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model:\n  precision: fp32\ndata:\n  max_response_length: 77\n")
    write_tiny_model(tmp_path / "policy")
    more = (
        f"model.path={tmp_path / 'policy'}",
        "data.max_prompt_length=55",
        "rollout.max_batch_size=3",
        "rollout.servers.weight_bucket_mb=900",
        "rollout.max_staleness=1",
    )
    server = server_of("rlvr", [*RUN, *SERVED, *more, "serve.port=8900"], config_file=tmp_path / "mine.yaml")
    validate(server)
    assert (server.model.path, server.model.precision) == (str(tmp_path / "policy"), Precision.fp32)
    assert (server.data.max_prompt_length, server.data.max_response_length) == (55, 77)
    assert server.rollout.placement is RolloutPlacement.colocated
    assert server.rollout.servers.urls == []
    assert server.rollout.max_batch_size == 3
    assert server.rollout.max_staleness == 0
    assert server.serve.port == 8900
    assert server.serve.max_request_mb >= 1800
    (tmp_path / "serve.yaml").write_text(dump_config(server))
    assert load_config("serve", config_file=tmp_path / "serve.yaml") == server


@pytest.mark.parametrize("stage", ["align", "rlvr", "pairs", "eval", "generate"])
def test_every_stage_that_samples_has_servers(stage: str) -> None:
    data = "data.validation=x" if stage == "eval" else "data.train=x"
    more = ["discriminator.path=y"] if stage == "align" else []
    assert server_of(stage, ["model.path=policy", data, "experiment.dir=run", *SERVED, *more]).model.path == "policy"


def test_a_stage_without_rollouts_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="sft has no rollouts"):
        server_of("sft", ["model.path=policy", "data.train=x", "experiment.dir=run", "trainer.max_steps=1"])
    assert main(["serve", "--of", "slf", "model.path=x"]) == 2
    assert "there is no stage `slf`" in capsys.readouterr().err
