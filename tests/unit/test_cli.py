"""The command line: what it prints, what it imports, how it fails."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from prism_nemo import cli
from prism_nemo.config.compose import SCHEMAS, load_config
from prism_nemo.config.keys import keys
from prism_nemo.config.schema import SFTConfig
from prism_nemo.engine.writing import SaveError
from prism_nemo.errors import DataError

HEAVY = {"torch", "megatron", "transformers", "hydra", "numpy", "vllm"}


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -X importtime -m prism_nemo …` in a process of its own, from another folder."""
    root = str(Path(cli.__file__).parent.parent)
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "prism_nemo", *arguments],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": root, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def imported(done: subprocess.CompletedProcess[str]) -> set[str]:
    """The top-level packages that a process imported."""
    return {
        line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines() if line.startswith("import time:")
    }


def messages(done: subprocess.CompletedProcess[str]) -> str:
    return "".join(line for line in done.stderr.splitlines(keepends=True) if not line.startswith("import time:"))


def test_help_is_quick_and_imports_nothing_heavy(tmp_path: Path) -> None:
    began = os.times()
    done = run("--help", cwd=tmp_path)
    ended = os.times()
    assert done.returncode == 0
    assert not imported(done) & (HEAVY | {"omegaconf", "yaml"})
    # Processor time, which a busy machine does not stretch; on an idle one it is the time that a person waits.
    assert ended.children_user + ended.children_system - began.children_user - began.children_system < 0.5
    for command in (*cli.STAGES, "convert import", "convert export", "report RUN_DIR"):
        assert re.search(rf"^  {command} +\w", done.stdout, re.MULTILINE), command


def test_a_mistake_is_quick_quiet_and_leaves_nothing_behind(tmp_path: Path) -> None:
    done = run("sft", "optimizer.lrr=1", cwd=tmp_path)
    assert done.returncode == 2
    assert messages(done) == (
        "prism-nemo: unknown key optimizer.lrr (given 1 (int)) for sft\n"
        "  where: command line\n"
        "  remedy: did you mean optimizer.lr?\n"
    )
    assert not imported(done) & HEAVY
    assert list(tmp_path.iterdir()) == []


def test_the_traceback_is_shown_when_asked_for(tmp_path: Path) -> None:
    done = run("sft", "optimizer.lrr=1", cwd=tmp_path, PRISM_NEMO_TRACEBACK="1")
    assert done.returncode == 2
    assert "Traceback (most recent call last)" in done.stderr and "did you mean optimizer.lr?" in done.stderr


def test_the_demos_configuration_is_printed_and_nothing_is_made(tmp_path: Path) -> None:
    done = run("pipeline", "demo=digits", "seed=3", "--cfg", cwd=tmp_path)
    assert (done.returncode, messages(done)) == (0, "")
    assert "seed: 3\n" in done.stdout and "- name: sft_rlvr_long\n" in done.stdout
    assert list(tmp_path.iterdir()) == []


# In this process


def test_every_schema_has_a_command() -> None:
    assert list(cli.STAGES) == list(SCHEMAS)


@pytest.mark.parametrize("stage", SCHEMAS)
def test_a_stages_help_lists_every_key_with_default_comment_and_type(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([stage, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for key in keys(SCHEMAS[stage]).values():
        [line] = [line for line in lines if line.startswith(f"  {key.name}=")]
        assert line.endswith(f" {key.comment} ({key.type_text})")


def test_a_stages_help_shows_what_the_stage_starts_from(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["rlvr", "--help"])
    text = capsys.readouterr().out
    for setting in (
        "model.path=(required)",
        "optimizer.lr=1e-06",
        "trainer.max_steps=1500",
        "runtime.num_threads=null",
        "data.shuffle=true",
    ):
        assert f"  {setting} " in text
    assert "  algorithm=dapo | dr_grpo | grpo | gspo\n" in text


def test_the_examples_in_the_help_are_possible() -> None:
    for name, stage in cli.STAGES.items():
        load_config(name, stage.example.split())


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"], ["help"]])
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.startswith("usage: prism-nemo COMMAND")


@pytest.mark.parametrize("arguments", [["convert"], ["convert", "import", "--help"], ["report", "-h"]])
def test_help_of_the_other_commands(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.startswith(f"usage: prism-nemo {arguments[0]}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rlvrr"], "there is no command `rlvrr`\n  remedy: did you mean rlvr?"),
        (["sft", "--lr", "3"], "unrecognized arguments: --lr"),
        (["sft", "--config"], "argument --config: expected one argument"),
        (["sft", "optimizer.lr"], "`optimizer.lr` is not of the form key=value"),
        (["convert", "imprt"], "convert cannot `imprt`"),
        (["convert", "import", "--hf", "x"], "the following arguments are required: --out"),
        (["convert", "export", "--hf", "x", "--out", "y"], "the following arguments are required: --checkpoint"),
        (["report"], "the following arguments are required: RUN_DIR"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(f"prism-nemo: {message}")


def test_options_and_overrides_come_in_any_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("trainer:\n  max_steps: 7\n  keep_last_k: 9\n")
    assert cli.main(["sft", "optimizer.lr=3e-5", "--config", str(mine), "trainer.keep_last_k=4", "--cfg", "parallel=tp4"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    config = load_config("sft", ["model.path=m", "data.train=t.jsonl", "experiment.dir=d"], config_file=printed)
    assert isinstance(config, SFTConfig)
    assert (config.optimizer.lr, config.trainer.max_steps, config.trainer.keep_last_k) == (3e-5, 7, 4)
    assert config.parallel.tensor_model_parallel_size == 4


def test_under_torchrun_the_ranks_agree_and_one_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = {}
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["pipeline", "demo=digits", "overrides=[parallel.tensor_model_parallel_size=4]"]) == 2
        said[rank] = capsys.readouterr().err
    assert said["0"].startswith("prism-nemo: 2 ranks cannot hold models of 4 ranks") and said["1"] == ""


def test_a_missing_run_directory_is_told_by_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("prism-nemo: no such run directory\n")


@pytest.fixture
def sft_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[types.ModuleType, list[str]]:
    """A module in the place of the SFT stage, and arguments that pass every check."""
    model = tmp_path / "model"
    model.mkdir()
    text = '{"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 8, "vocab_size": 8}'
    vision = '{"num_heads": 2, "intermediate_size": 8, "deepstack_visual_indexes": [0]}'
    (model / "config.json").write_text(f'{{"model_type": "qwen3_vl", "text_config": {text}, "vision_config": {vision}}}')
    (tmp_path / "data.jsonl").write_text("{}\n")
    module = types.ModuleType(cli.STAGES["sft"].module)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    given = [f"model.path={model}", f"data.train={tmp_path / 'data.jsonl'}", f"experiment.dir={tmp_path / 'run'}"]
    return module, ["sft", *given, "trainer.max_steps=3"]


def test_a_stage_gets_its_typed_configuration(sft_stage: tuple[types.ModuleType, list[str]]) -> None:
    module, arguments = sft_stage
    seen: list[object] = []
    module.run = seen.append  # type: ignore[attr-defined]
    assert cli.main([*arguments, "optimizer.lr=2e-5"]) == 0
    [config] = seen
    assert isinstance(config, SFTConfig) and (config.optimizer.lr, config.trainer.max_steps) == (2e-5, 3)


def test_a_rank_that_fails_alone_in_a_stage_says_so(
    sft_stage: tuple[types.ModuleType, list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, arguments = sft_stage

    def fail(config: SFTConfig) -> None:
        raise DataError("an image is broken", where="17.png", remedy="mend it")

    module.run = fail  # type: ignore[attr-defined]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err == "[rank 1] prism-nemo: an image is broken\n  where: 17.png\n  remedy: mend it\n"


def test_what_may_succeed_later_ends_with_1(sft_stage: tuple[types.ModuleType, list[str]]) -> None:
    """Job scripts start it again."""
    module, arguments = sft_stage

    def fail(config: SFTConfig) -> None:
        raise SaveError(0, "No space left on device", Path("runs"))

    module.run = fail  # type: ignore[attr-defined]
    assert cli.main(arguments) == 1


def test_an_interrupted_stage_ends_with_130(sft_stage: tuple[types.ModuleType, list[str]]) -> None:
    module, arguments = sft_stage

    def interrupt(config: SFTConfig) -> None:
        raise KeyboardInterrupt

    module.run = interrupt  # type: ignore[attr-defined]
    assert cli.main(arguments) == 130


def test_a_fault_of_our_own_keeps_its_traceback(sft_stage: tuple[types.ModuleType, list[str]]) -> None:
    module, arguments = sft_stage

    def fault(config: SFTConfig) -> None:
        raise ZeroDivisionError

    module.run = fault  # type: ignore[attr-defined]
    with pytest.raises(ZeroDivisionError):
        cli.main(arguments)


def test_asking_for_the_cpu_hides_cuda_devices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Megatron is prepared for the CPU only where torch sees no CUDA device."""
    seen: list[str] = []
    stage = types.SimpleNamespace(run=lambda config: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    monkeypatch.setattr(cli.importlib, "import_module", lambda name: stage)
    for device in ("auto", "cpu"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
        assert cli.main(["pipeline", "demo=digits", f"experiment.dir={tmp_path}", f"device={device}"]) == 0
    assert seen == ["3", ""]
