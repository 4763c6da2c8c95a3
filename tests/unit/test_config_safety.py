"""Configurations of others: they run nothing, stay small, and carry no secret into the run's files."""

from __future__ import annotations

from pathlib import Path

import pytest

from prism_nemo.config.compose import dump_config, load_config
from prism_nemo.config.safety import MAX_NODES, check_yaml, refuse_secrets
from prism_nemo.config.validate import validate
from prism_nemo.errors import ConfigError, DataError
from prism_nemo.evaluation.benchmarks.files import Row

NEEDED = ["model.path=m", "data.train=d.jsonl", "trainer.max_steps=1", "experiment.dir=r"]


def aliases(levels: int) -> str:
    """Ten times more at each level."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(lines)


BOMBS = {
    "aliases": (aliases(9), "more than 100000 values"),
    "an alias in itself": ("a: &a [*a]", "stands for something that holds it"),
    "deep": ("a: " + "[" * 100_000, "more than 50 deep"),
    "deep mappings": ("\n".join(" " * i + "a:" for i in range(500)), "more than 50 deep"),
    "long": ("a: " + "x" * (1 << 21), "the limit is"),
    "longer": ("a: " + "x" * (1 << 23), "8388611 bytes"),
    "an object": ("a: !!python/object/apply:os.system [exit]", "could not determine a constructor"),
    "a name": ("a: !!python/name:os.system", "could not determine a constructor"),
}


@pytest.mark.parametrize("case", BOMBS)
def test_bombs(case: str, tmp_path: Path) -> None:
    text, message = BOMBS[case]
    file = tmp_path / "theirs.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config("sft", NEEDED, config_file=file)
    assert str(file) in str(caught.value.where)
    assert len(str(caught.value)) < 1000


def test_aliases_within_reason(tmp_path: Path) -> None:
    check_yaml(aliases(4), where="here")
    check_yaml("a: &a {x: 1}\nb: {<<: *a}\nc: [*a, *a]", where="here")
    with pytest.raises(ConfigError):
        check_yaml("[" + "1," * MAX_NODES + "]", where="here")


@pytest.mark.parametrize("value", ["[" * 3000, "!!python/object/apply:os.system [exit]", "x" * (1 << 21)])
def test_bombs_on_the_command_line(value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("sft", [*NEEDED, f"trainer.global_batch_size={value}"])
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "name",
    ["API_KEY", "aws_secret_access_key", "HF_TOKEN", "DB_PASSWORD", "http_authorization", "PGPASS", "MY_PWD", "SENTRY_DSN"],
)
def test_secrets_of_the_environment_stay_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """config.yaml is written into the run's folder, which people share."""
    monkeypatch.setenv(name, "canary-3141")
    with pytest.raises(ConfigError, match="looks like a secret") as caught:
        load_config("sft", [*NEEDED, f"data.system_prompt=${{oc.env:{name}}}"])
    assert "canary" not in str(caught.value)


def test_an_address_with_a_password_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://me:canary-3141@proxy:3128")
    with pytest.raises(ConfigError, match="looks like a secret") as caught:
        load_config("sft", [*NEEDED, "data.system_prompt=${oc.env:HTTPS_PROXY}"])
    assert "canary" not in str(caught.value)


def test_other_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH_DIR", "/scratch")
    config = load_config("sft", [*NEEDED[:3], "experiment.dir=${oc.env:SCRATCH_DIR}/${oc.env:NOT_SET_AT_ALL,run}"])
    assert "/scratch/run" in dump_config(config)
    monkeypatch.setenv("PWD", "/here")
    assert "/here/run" in dump_config(load_config("sft", [*NEEDED[:3], "experiment.dir=${oc.env:PWD}/run"]))
    with pytest.raises(ConfigError, match="NOT_SET_AT_ALL is not set"):
        load_config("sft", [*NEEDED[:3], "experiment.dir=${oc.env:NOT_SET_AT_ALL}"])


WRITTEN = {
    "a key of a logger": (
        "experiment.nemo_exp_manager={wandb_logger_kwargs: {api_key: canary-3141}}",
        "wandb_logger_kwargs.api_key",
    ),
    "a password in an address": (
        "experiment.nemo_exp_manager={mlflow_logger_kwargs: {tracking_uri: 'https://me:canary-3141@host/x'}}",
        "mlflow_logger_kwargs.tracking_uri",
    ),
    "a token in a list": ("experiment.nemo_exp_manager={x: [{access_token: canary-3141}]}", "x.access_token"),
    "a URL as the model": ("model.path=https://me:canary-3141@host/m", "model.path"),
}


@pytest.mark.parametrize("case", WRITTEN)
def test_secrets_among_settings(case: str) -> None:
    override, where = WRITTEN[case]
    with pytest.raises(ConfigError, match="looks like a secret") as caught:
        validate(load_config("sft", [*NEEDED, override]))
    assert str(caught.value.where).endswith(where)
    assert "canary" not in str(caught.value)


def test_what_only_sounds_like_a_secret() -> None:
    refuse_secrets(
        {"api_key_env": "KEY", "max_tokens": "5", "end_token": "x", "api_key": None, "url": "https://host:80/a@b", "key": "b"}
    )


LITERALS = {
    "long": "[1" + ",1" * 3_000_000 + "]",
    "brackets": "[" * 50_000,
    "signs": "-" * 50_000 + "1",
    "sum": "1+" * 40_000 + "1",
    "call": "__import__('os').system('exit')",
    "power": "[9**9**9]",
    "zeros": "['a\0b']",
}


@pytest.mark.parametrize("case", LITERALS)
def test_lists_written_as_text(case: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="`options`"):
        Row({"options": LITERALS[case]}, "here", tmp_path).texts("options")
