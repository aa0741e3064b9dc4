"""Loggers beside the CSV files of a run: whatever goes wrong in one of them, the training goes on."""

import secrets
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

from omegaconf import OmegaConf
from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from repghost.files import write_text

WANDB_ID = "wandb_id.txt"


class GuardedLogger(Logger):
    """Passes on to `logger` what Lightning logs, until that raises: one line says so, and the run goes on without it.

    config: the YAML file of the run's config, which is logged when the training begins.
    """

    def __init__(self, logger: Logger, config: Path) -> None:
        super().__init__()
        self._logger: Logger | None = logger
        self._config: Path | None = config

    @property
    def name(self) -> None:
        return None

    @property
    def version(self) -> None:
        return None

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._pass("log_metrics", metrics, step)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        self._pass("log_hyperparams", params)

    def save(self) -> None:
        # Lightning's first call when a training begins: a logger that cannot start says so now, not an epoch later.
        if self._config is not None and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            config, self._config = OmegaConf.load(self._config), None
            self._pass("log_hyperparams", OmegaConf.to_container(config))
        self._pass("save")

    def finalize(self, status: str) -> None:
        self._pass("finalize", status)
        self._logger = None  # Lightning finalizes once more after each evaluation

    @rank_zero_only
    def _pass(self, method: str, *arguments: Any) -> None:
        if self._logger is None:
            return
        try:
            getattr(self._logger, method)(*arguments)
        except Exception as error:
            name, self._logger = type(self._logger).__name__, None
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"{name} failed and is left out from here on, the run goes on: {reason}", flush=True)


class RunWandbLogger(WandbLogger):
    """Lightning's logger for Weights & Biases; a run that is resumed in its folder goes on with its curve there.

    The id of the wandb run is kept in `save_dir`/wandb_id.txt. At the end, uploads have `finish_seconds`: what is left
    then stays in the folder, for `wandb sync`.
    """

    def __init__(self, save_dir: str, finish_seconds: float, **options: Any) -> None:
        super().__init__(save_dir=save_dir, id=_wandb_id(Path(save_dir) / WANDB_ID), **options)
        self._finish_seconds = finish_seconds

    @rank_zero_only
    def finalize(self, status: str) -> None:
        super().finalize(status)
        if self._experiment is None:
            return
        code = 0 if status == "success" else 1
        # Without a network, wandb waits for it: in a thread that nobody waits for.
        upload = Thread(target=self._experiment.finish, kwargs={"exit_code": code}, daemon=True)
        upload.start()
        upload.join(self._finish_seconds)
        if upload.is_alive():
            raise TimeoutError(
                f"the upload did not end in {self._finish_seconds:g} seconds; `wandb sync` can send what lies in "
                f"{self.save_dir}/wandb"
            )


def _wandb_id(file: Path) -> str | None:
    """The id of the wandb run, drawn and written to `file` at first; None on ranks that do not log."""
    if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        return None
    if not file.exists():
        write_text(file, secrets.token_hex(4) + "\n")
    return file.read_text().strip()
