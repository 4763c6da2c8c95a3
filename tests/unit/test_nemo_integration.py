"""Our models against NeMo-Aligner's interfaces, and metrics in exp_manager's loggers.

What is marked `nemo` runs against the real packages (`make test-nemo` brings them). The rest holds the same interfaces by the
names written down here, and says what happens without the packages.
"""

from __future__ import annotations

import abc
import importlib.util
import inspect
import json
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from prism_nemo.config.compose import dump_config, load_config
from prism_nemo.config.schema import PipelineConfig
from prism_nemo.config.validate import validate
from prism_nemo.errors import ConfigError, PrismError
from prism_nemo.experiment import Experiment, read_metrics
from prism_nemo.integrations import nemo as integration
from prism_nemo.models.discriminator import DiscriminatorModel
from prism_nemo.models.policy import PolicyModel

# The parameters of every public method, as NeMo-Aligner 0.7.0 has them. `...`: any, each implementation has its own.
SUPERVISED: dict[str, Any] = {
    "get_loss_and_metrics": ["batch", "forward_only"],
    "prepare_for_training_step": [],
    "finish_training_step": [],
    "prepare_for_validation_step": [],
    "finish_validation_step": [],
}
INFERRABLE: dict[str, Any] = {"prepare_for_inference": [], "finish_inference": [], "infer": ...}
TRAINING: dict[str, Any] = {"prepare_for_training": [], "finish_training": []}
INTERFACES = {
    PolicyModel: SUPERVISED | INFERRABLE | TRAINING | {"get_init_policy_logprobs": ["rollout_batches"]},
    DiscriminatorModel: SUPERVISED | INFERRABLE | TRAINING | {"infer_rm_critic": ...},
}
METHODS = [(model, name, parameters) for model, methods in INTERFACES.items() for name, parameters in methods.items()]


def parameters_of(function: Any) -> Any:
    """Names of the parameters behind self, or `...` where any are taken."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    if [parameter.kind for parameter in parameters] == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]:
        return ...
    return [parameter.name for parameter in parameters]


# The interfaces, by the names above


@pytest.mark.parametrize(("model", "name", "parameters"), METHODS)
def test_a_model_takes_the_calls_that_the_interface_promises(model: type, name: str, parameters: Any) -> None:
    signature = inspect.signature(getattr(model, name))
    if parameters is ...:
        assert len(signature.parameters) == 2  # self, and the rows
        return
    signature.bind(None, *parameters)
    signature.bind(None, **dict.fromkeys(parameters))
    assert parameters_of(getattr(model, name)) == parameters  # the same order, so that both calls mean the same


def test_missing_methods_are_named() -> None:
    class Interface:
        def infer(self) -> None: ...
        def finish_inference(self) -> None: ...
        def prepare_for_inference(self) -> None: ...
        def _own_business(self) -> None: ...

    class Half:
        finish_inference = None  # not a method

        def infer(self) -> None: ...

    assert integration.missing_methods(Half, Interface) == ["finish_inference", "prepare_for_inference"]
    assert integration.missing_methods(PolicyModel, Interface) == []


def test_a_method_that_is_only_inherited_as_abstract_is_missing() -> None:
    class Interface(abc.ABC):
        @abc.abstractmethod
        def infer(self) -> None: ...

    class Unfinished(Interface):
        pass

    assert integration.missing_methods(Unfinished, Interface) == ["infer"]


# Without the packages


@pytest.fixture
def without_nemo(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None if name.startswith("nemo") else real(name, *rest))


def test_the_module_loads_neither_nemo_nor_torch() -> None:
    code = (
        "import sys, prism_nemo.integrations.nemo\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'nemo', 'nemo_aligner', 'lightning', 'torch'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.usefixtures("without_nemo")
def test_each_use_without_the_packages_names_the_command_that_brings_them(tmp_path: Path) -> None:
    with pytest.raises(PrismError) as no_aligner:
        integration.register()
    with pytest.raises(ConfigError) as no_toolkit:
        integration.NemoLogger({}, tmp_path, stage="sft", hyperparameters={})
    for caught in (no_aligner, no_toolkit):
        assert "not installed" in caught.value.what
        assert caught.value.remedy is not None and "pip install 'prism-nemo[nemo]'" in caught.value.remedy


@pytest.mark.usefixtures("without_nemo")
def test_a_run_that_cannot_log_leaves_the_directory_free(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        experiment(tmp_path / "run", nemo_exp_manager={})
    experiment(tmp_path / "run", nemo_exp_manager=None).finish()  # neither locked nor taken for a run


@pytest.mark.parametrize(
    ("settings", "what", "remedy"),
    [
        ({"create_checkpoint_callback": True, "ema": {}}, "create_checkpoint_callback, ema: ", "leave it out: "),
        ({"create_wandb_loger": True}, "create_wandb_loger: ", "did you mean create_wandb_logger"),
    ],
)
def test_settings_without_a_meaning_here_are_refused(tmp_path: Path, settings: dict[str, Any], what: str, remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        integration.NemoLogger(settings, tmp_path, stage="sft", hyperparameters={})
    assert caught.value.what.startswith(what) and caught.value.where == "experiment.nemo_exp_manager"
    assert caught.value.remedy is not None and caught.value.remedy.startswith(remedy)


# The configuration key

SFT = ["model.path=m", "data.train=t.jsonl", "trainer.max_steps=3", "experiment.dir=d"]


def test_the_settings_are_a_mapping_that_layers_add_to(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("experiment:\n  nemo_exp_manager:\n    wandb_logger_kwargs: {project: prism, name: a}\n")
    config = load_config(
        "sft", [*SFT, "experiment.nemo_exp_manager={create_wandb_logger: true, wandb_logger_kwargs: {name: b}}"], config_file=file
    )
    expected = {"wandb_logger_kwargs": {"project": "prism", "name": "b"}, "create_wandb_logger": True}
    assert not isinstance(config, PipelineConfig) and config.experiment.nemo_exp_manager == expected
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load_config("sft", config_file=tmp_path / "config.yaml") == config


@pytest.mark.parametrize(("value", "shown"), [("3", "3 (int)"), ("[name]", "['name'] (list)"), ("{1: 2}", "{1: 2} (dict)")])
def test_anything_but_a_mapping_is_refused(value: str, shown: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("sft", [*SFT, f"experiment.nemo_exp_manager={value}"])
    assert caught.value.what == f"experiment.nemo_exp_manager: expected mapping or null, got {shown}"


@pytest.mark.usefixtures("without_nemo")
@pytest.mark.parametrize(("settings", "what"), [("{nam: a}", "nam: unknown"), ("{name: a}", "NeMo is not installed")])
def test_settings_are_checked_before_anything_is_built(settings: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(load_config("sft", [*SFT, f"experiment.nemo_exp_manager={settings}"]))
    assert caught.value.what.startswith(what) and caught.value.where == "experiment.nemo_exp_manager"


def test_a_pipeline_passes_them_on_to_its_stages_only_when_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    pipeline = ["demo=digits", "experiment.dir=d"]
    with pytest.raises(ConfigError, match="a pipeline logs nothing itself") as caught:
        validate(load_config("pipeline", [*pipeline, "experiment.nemo_exp_manager={name: a}"]))
    assert caught.value.remedy is not None and "overrides" in caught.value.remedy
    validate(load_config("pipeline", [*pipeline, "overrides=['experiment.nemo_exp_manager={name: a}']"]))
    with pytest.raises(ConfigError, match="nam: unknown"):
        validate(load_config("pipeline", [*pipeline, "overrides=['experiment.nemo_exp_manager={nam: a}']"]))


# The real interfaces


@pytest.mark.nemo
@pytest.mark.parametrize("model", INTERFACES)
def test_the_names_written_down_here_are_those_of_the_real_interface(model: type) -> None:
    interface = integration.interfaces()[model]
    real = {
        name: parameters_of(function)
        for name, function in inspect.getmembers(interface, inspect.isfunction)
        if not name.startswith("_")
    }
    assert real == INTERFACES[model]
    assert interface.__abstractmethods__ <= INTERFACES[model].keys()
    assert integration.missing_methods(model, interface) == []


@pytest.mark.nemo
def test_registered_models_are_instances_of_the_real_interfaces() -> None:
    from nemo_aligner.models import alignable_interface as real

    integration.register()
    integration.register()  # again: nothing changes
    for model in (PolicyModel, DiscriminatorModel):
        assert issubclass(model, real.SupervisedInterface) and issubclass(model, real.Inferrable)
    assert isinstance(PolicyModel.__new__(PolicyModel), real.AlignableGenerativeInterface)
    assert isinstance(DiscriminatorModel.__new__(DiscriminatorModel), real.CriticModelInterface)
    assert not issubclass(PolicyModel, real.CriticModelInterface)
    assert not issubclass(DiscriminatorModel, real.AlignableGenerativeInterface)


@pytest.mark.nemo
def test_a_release_that_asks_for_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface

    class Grown(AlignableGenerativeInterface):
        def offload(self) -> None: ...

    monkeypatch.setattr("nemo_aligner.models.alignable_interface.AlignableGenerativeInterface", Grown)
    with pytest.raises(PrismError, match="PolicyModel does not have offload"):
        integration.register()
    assert not issubclass(PolicyModel, Grown)


# The real exp_manager

MLFLOW = "needs mlflow-skinny, which is no part of the extra"
CONFIG = {"optimizer": {"lr": 1e-3}, "trainer": {"max_steps": 3}}
LOSSES = [0.75, 0.5, 0.25]  # exact in the event files' fp32
VALIDATION = {"accuracy": 0.125}


def experiment(directory: Path, *, stage: str = "sft", **changes: Any) -> Experiment:
    return Experiment(
        directory,
        stage=stage,
        config_yaml=yaml.safe_dump(CONFIG),
        **{"resume": True, "overwrite": False, "is_main": True, "tensorboard": False, "progress": False, **changes},
    )


def run(directory: Path, settings: Mapping[str, Any], *, stage: str = "sft") -> Path:
    with experiment(directory, stage=stage, nemo_exp_manager=settings) as run:
        for step, loss in enumerate(LOSSES, start=1):
            run.log_metrics(step, {"loss": loss, "tokens": 100 + step})
        run.log_metrics(3, VALIDATION, prefix="validation")
    return directory


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.chdir(tmp_path)  # loggers write where they are told to, not here
    yield
    assert not {"wandb", "mlruns", "nemo_experiments", "lightning_logs"} & {path.name for path in tmp_path.iterdir()}


def scalars(directory: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(directory))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.nemo
def test_metrics_reach_exp_managers_tensorboard(tmp_path: Path) -> None:
    directory = run(tmp_path / "run", {})
    log = directory / "exp_manager"
    assert {"cmd-args.log", "lightning_logs.txt", "nemo_error_log.txt"} <= {path.name for path in log.iterdir()}
    found = scalars(log)
    assert found["train/loss"] == [(1, 0.75), (2, 0.5), (3, 0.25)]
    assert found["train/tokens"] == [(1, 101.0), (2, 102.0), (3, 103.0)]
    assert found["validation/accuracy"] == [(3, 0.125)]
    assert [row["loss"] for row in read_metrics(directory) if row["prefix"] == "train"] == LOSSES  # as without NeMo
    assert json.loads((directory / "status.json").read_text())["state"] == "finished"


@pytest.mark.nemo
def test_hyperparameters_are_written_as_a_run_starts(tmp_path: Path) -> None:
    with experiment(tmp_path / "run", nemo_exp_manager={}):
        assert yaml.safe_load((tmp_path / "run" / "exp_manager" / "hparams.yaml").read_text()) == CONFIG


@pytest.mark.nemo
def test_a_resumed_run_goes_on_in_the_same_place(tmp_path: Path) -> None:
    for step in (1, 2):
        with experiment(tmp_path / "run", nemo_exp_manager={}) as session:
            session.log_metrics(step, {"loss": 0.5 * step})
            session.interrupt()
    assert scalars(tmp_path / "run" / "exp_manager")["train/loss"] == [(1, 0.5), (2, 1.0)]


@pytest.mark.nemo
def test_only_the_main_rank_has_an_exp_manager(tmp_path: Path) -> None:
    with experiment(tmp_path / "run", is_main=False, nemo_exp_manager={}) as other:
        other.log_metrics(1, {"loss": 1.0})
    assert not (tmp_path / "run").exists()


@pytest.mark.nemo
def test_a_slurm_jobs_ranks_are_not_taken_for_lightnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"JOB_NAME": "train", "JOB_ID": "7", "NTASKS": "8", "NODEID": "0", "PROCID": "0", "LOCALID": "0"}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert scalars(run(tmp_path / "run", {}) / "exp_manager")["train/loss"][-1] == (3, 0.25)


@pytest.mark.nemo
def test_nemos_own_directories_are_named_after_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_EXPM_VERSION", "v1")  # which exp_manager itself sets for the rest of the process
    for stage in ("sft", "rlvr"):
        run(tmp_path / stage, {"exp_dir": str(tmp_path / "all")}, stage=stage)
        assert scalars(tmp_path / "all" / stage / "v1")["train/loss"] == [(1, 0.75), (2, 0.5), (3, 0.25)]


@pytest.mark.nemo
def test_two_stages_of_a_process_are_two_runs_of_wandb(tmp_path: Path) -> None:
    import wandb

    settings = {"create_tensorboard_logger": False, "create_wandb_logger": True, "wandb_logger_kwargs": {"project": "prism"}}
    directories = [run(tmp_path / stage, settings, stage=stage) for stage in ("sft", "rlvr")]
    wandb.teardown()  # waits for its service, which writes the files
    for directory in directories:
        [offline_run] = directory.glob("exp_manager/wandb/offline-run-*/run-*.wandb")
        assert wandb_history(offline_run) == [
            {"train/loss": 0.75, "train/tokens": 101, "trainer/global_step": 1},
            {"train/loss": 0.5, "train/tokens": 102, "trainer/global_step": 2},
            {"train/loss": 0.25, "train/tokens": 103, "trainer/global_step": 3},
            {"validation/accuracy": 0.125, "trainer/global_step": 3},
        ]


def wandb_history(path: Path) -> list[dict[str, Any]]:
    """The logged lines of an offline run's file (a log as LevelDB writes it), without W&B's own entries."""
    from wandb.proto.wandb_internal_pb2 import Record

    content = path.read_bytes()
    lines, data, cursor = [], b"", 7  # behind the file's own header
    while cursor < len(content):
        if 32768 - cursor % 32768 < 7:  # a piece's header does not reach over the end of a block
            cursor += 32768 - cursor % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", content, cursor)  # checksum, length; 1: whole, 2, 3, 4: first, middle, last
        data += content[cursor + 7 : cursor + 7 + size]
        cursor += 7 + size
        if kind in (1, 4):
            record, data = Record.FromString(data), b""
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            shown = {name: value for name, value in items.items() if not name.startswith("_")}
            lines += [shown] if shown else []
    return lines


@pytest.mark.nemo
@pytest.mark.parametrize(("error", "status"), [(None, "FINISHED"), (ValueError("x"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_mlflow_gets_metrics_parameters_and_the_outcome(tmp_path: Path, error: BaseException | None, status: str) -> None:
    mlflow = pytest.importorskip("mlflow", reason=MLFLOW)
    place = {"exp_dir": str(tmp_path / "all"), "explicit_log_dir": None, "name": None, "version": "first"}
    settings = {**place, "create_mlflow_logger": True, "mlflow_logger_kwargs": {"experiment_name": None}}
    with pytest.raises(type(error)) if error else nullcontext(), experiment(tmp_path / "run", nemo_exp_manager=settings) as run:
        run.log_metrics(5, {"loss": 0.75})
        if error is not None:
            raise error
    client = mlflow.MlflowClient(f"file:{tmp_path}/all/sft/first/mlruns")
    [found] = client.search_runs([client.get_experiment_by_name("sft").experiment_id])
    assert (found.info.run_name, found.info.status, found.data.metrics) == ("first", status, {"train/loss": 0.75})
    assert found.data.params == {"optimizer/lr": "0.001", "trainer/max_steps": "3"}


@pytest.mark.nemo
@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"create_wandb_logger": True}, "name and project are required"),
        ({"create_tensorboard_logger": "maybe"}, "maybe"),
        ({"create_mlflow_logger": True, "mlflow_logger_kwargs": {"trackin_uri": "x"}}, "trackin_uri"),
        ({"create_mlflow_logger": True, "mlflow_logger_kwargs": {"tracking_uri": "nosuch://x"}}, "nosuch"),
    ],
)
def test_what_a_logger_refuses_is_the_users_error(tmp_path: Path, settings: dict[str, Any], what: str) -> None:
    if "create_mlflow_logger" in settings:
        pytest.importorskip("mlflow", reason=MLFLOW)
    with pytest.raises(ConfigError) as caught:
        experiment(tmp_path / "run", nemo_exp_manager=settings)
    assert what in caught.value.what and caught.value.where == "experiment.nemo_exp_manager"
    experiment(tmp_path / "run", nemo_exp_manager=None).finish()  # the directory is free
