"""NeMo: our models under NeMo-Aligner's interfaces, and a stage's metrics in the loggers of nemo-toolkit's `exp_manager`.

    pip install torch==2.13.0                 # first, the build for your machine; a container has its own
    pip install 'prism-nemo[nemo]'

What the second line brings of NeMo is small. nemo-aligner 0.7.0 asks for two small packages only, because all that it builds on
is meant to come from NVIDIA's container; beside nemo-toolkit 3 just its interfaces can be imported (its trainers and models want
the collection `nlp`, which nemo-toolkit has given up), and just those are used here. `nemo-toolkit[common]` is `[core]` with what
`exp_manager` imports on its way. Importing all of it takes seconds, so that happens where it is asked for, not with this module.

    register()                                # isinstance(policy, nemo_aligner's AlignableGenerativeInterface) holds from here on

    experiment:
      nemo_exp_manager:                       # of any stage: its metrics also go to W&B, under NeMo's own names
        create_wandb_logger: true
        wandb_logger_kwargs: {project: prism, name: align}
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_nemo.config.validate import check_exp_manager
from prism_nemo.errors import ConfigError, PrismError
from prism_nemo.waiting import waiting

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

LOG_FOLDER = "exp_manager"  # in the run directory, where the settings name no other place
OUTCOMES = {"finished": "success", "failed": "failed", "interrupted": "KILLED"}  # in Lightning's words, the last in MLflow's


# NeMo-Aligner's interfaces


def register() -> None:
    """Makes `PolicyModel` and `DiscriminatorModel` virtual subclasses of NeMo-Aligner's interfaces.

    Raises PrismError when nemo-aligner is not installed, or when a release of it asks for methods that a model does not have.
    """
    for model, interface in interfaces().items():
        missing = missing_methods(model, interface)
        if missing:
            raise PrismError(
                f"{model.__name__} does not have {', '.join(missing)}",
                where=f"{interface.__module__}.{interface.__name__}",
                remedy="pip install nemo-aligner==0.7.0",
            )
        interface.register(model)


def interfaces() -> dict[type, Any]:
    """Each of our models with its NeMo-Aligner interface. Raises PrismError when nemo-aligner is not installed."""
    if importlib.util.find_spec("nemo_aligner") is None:
        raise PrismError("nemo-aligner is not installed", where=__name__, remedy="pip install 'prism-nemo[nemo]'")
    from prism_nemo.models.discriminator import DiscriminatorModel  # isort: skip  before NeMo, which imports Megatron
    from prism_nemo.models.policy import PolicyModel  # isort: skip
    from nemo_aligner.models.alignable_interface import AlignableGenerativeInterface, CriticModelInterface

    return {PolicyModel: AlignableGenerativeInterface, DiscriminatorModel: CriticModelInterface}


def missing_methods(model: type, interface: type) -> list[str]:
    """The public methods of an interface that a class does not have, by name.

    Those with a body count as well: a registered class inherits nothing.
    """
    names = [name for name, _ in inspect.getmembers(interface, inspect.isfunction) if not name.startswith("_")]
    return [name for name in names if not _implements(model, name)]


def _implements(model: type, name: str) -> bool:
    method = getattr(model, name, None)
    return callable(method) and not getattr(method, "__isabstractmethod__", False)


# exp_manager


class NemoLogger:
    """Hands metrics to the loggers that nemo-toolkit's `exp_manager` makes: TensorBoard, W&B, MLflow, DLLogger, ClearML.

    settings         exp_manager's, by its own names; those that have no meaning here are refused
    directory        the run directory; its folder `exp_manager` is the log directory unless the settings name one
    stage            exp_manager's `name`, and MLflow's experiment, where the settings have none
    hyperparameters  given to every logger once; nested dictionaries are fine

    Make it on the main rank only. exp_manager leaves the command line and, inside a git checkout, `git diff` in the log
    directory. A run that is resumed behind its last checkpoint logs the steps in between once more: metrics.jsonl is the record.

    Raises ConfigError when nemo-toolkit is not installed, and when it or a logger refuses the settings.
    """

    @waiting("experiment trackers")
    def __init__(self, settings: Mapping[str, Any], directory: Path, *, stage: str, hyperparameters: Mapping[str, Any]) -> None:
        check_exp_manager(settings)
        try:
            self._loggers = _exp_manager_loggers(settings, directory / LOG_FOLDER, stage)
            for logger in self._loggers:
                logger.log_hyperparams(dict(hyperparameters))
                logger.save()
        except Exception as error:  # each of these packages has its own: a wrong argument, no key, no server, no such package
            raise ConfigError(
                f"exp_manager: {type(error).__name__}: {error}",
                where="experiment.nemo_exp_manager",
                remedy="change the settings, or pip install the package that the message names",
            ) from error

    @waiting("experiment trackers")
    def log_metrics(self, step: int, metrics: Mapping[str, float], *, prefix: str = "train") -> None:
        """Every metric as `PREFIX/NAME`, the names that the run directory's TensorBoard has too."""
        values = {f"{prefix}/{name}": value for name, value in metrics.items()}
        for logger in self._loggers:
            logger.log_metrics(values, step)

    @waiting("experiment trackers")
    def close(self, state: str) -> None:
        """Ends every logger's run. state: finished, interrupted or failed."""
        from lightning.pytorch.loggers import WandbLogger

        for logger in self._loggers:
            logger.finalize(OUTCOMES[state])
            if isinstance(logger, WandbLogger):  # Lightning leaves the run open, and the process's next stage would write into it
                logger.experiment.finish(exit_code=0 if state == "finished" else 1)


def _exp_manager_loggers(settings: Mapping[str, Any], directory: Path, stage: str) -> list[Logger]:
    import prism_nemo.engine  # noqa: F401  isort: skip  before NeMo, which imports Megatron
    from lightning.pytorch import Trainer
    from lightning.pytorch.plugins.environments import LightningEnvironment
    from nemo.utils.exp_manager import exp_manager

    # exp_manager hangs its loggers on a Lightning trainer. This one never trains; left alone, it would look for its own ranks in
    # the SLURM job that it runs in, and refuse some jobs.
    trainer = Trainer(
        devices=1,
        plugins=[LightningEnvironment()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    given = {"name": stage, **_without_nulls(settings)}
    if not {"explicit_log_dir", "exp_dir"} & given.keys():
        given["explicit_log_dir"] = str(directory)
    log_directory = exp_manager(trainer, {**given, "create_checkpoint_callback": False, "create_mlflow_logger": False})
    loggers = list(trainer.loggers)
    if given.get("create_mlflow_logger"):
        loggers.append(_mlflow_logger(given, log_directory))
    return loggers


def _mlflow_logger(settings: Mapping[str, Any], directory: Path) -> Logger:
    """The logger that exp_manager of nemo-toolkit 3.0.0 fails to make, because it passes `run_name` twice."""
    from lightning.pytorch.loggers import MLFlowLogger

    usual = {"experiment_name": settings["name"], "run_name": settings.get("version"), "save_dir": str(directory / "mlruns")}
    return MLFlowLogger(**usual | _without_nulls(settings.get("mlflow_logger_kwargs", {})))


def _without_nulls(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}
