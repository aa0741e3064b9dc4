"""Loggers beside the CSV files of a run: whatever goes wrong in one of them, the training goes on."""

import csv
import secrets
import sys
import time
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from repghost.figures import draw_curve
from repghost.files import atomic_write, rows_as_csv, write_text
from repghost.reference import Row, standing
from repghost.training.classifier import ImageClassifier

TIMING = ("epoch", "train_seconds", "images_per_second", "validation_seconds")

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


def make_logger(config: DictConfig | None, directory: Path) -> Logger | None:
    """The logger of conf/logger beside the CSV files that every run writes; None for `logger=csv`."""
    if not config:
        return None
    logger = instantiate(config, save_dir=str(directory.resolve()), name=directory.name)
    return GuardedLogger(logger, directory / "config.yaml")


class RunFiles(Callback):
    """Writes metrics.csv (reproducible, rewritten from the history), timing.csv and curve.png; prints epoch lines."""

    def __init__(self, directory: Path, curve_seconds: float) -> None:
        self._directory = directory
        self._curve_seconds = curve_seconds
        self._curve_drawn = 0.0
        self.official: dict[int, Row] | None = None  # the official run to compare with, set once the data are known
        self._batches = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # An epoch that is entered in its middle is not announced by on_train_epoch_start.
        self.on_train_epoch_start(trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()
        self._batches = 0

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._batches += 1

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validating = time.perf_counter()

    @rank_zero_only
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, ImageClassifier)
        now, row = time.perf_counter(), pl_module.history[-1]
        seconds = self._validating - self._started
        speed = self._batches * pl_module.images_per_batch / seconds
        write_text(self._directory / "metrics.csv", rows_as_csv(pl_module.history))
        with open(self._directory / "timing.csv", "a", newline="") as file:
            writer = csv.writer(file)
            if file.tell() == 0:
                writer.writerow(TIMING)
            writer.writerow([row["epoch"], f"{seconds:.2f}", f"{speed:.1f}", f"{now - self._validating:.2f}"])
        if self.official and row["epoch"] in self.official:
            official = {f"official_{k}": v for k, v in self.official[int(row["epoch"])].items() if k != "epoch"}
            for logger in trainer.loggers:
                logger.log_metrics(official, step=int(row["epoch"]))
        if now - self._curve_drawn >= self._curve_seconds:
            self._draw(pl_module)
        print(
            f"epoch {row['epoch'] + 1:>3}/{trainer.max_epochs}  lr {row['lr']:.4f}  train loss {row['train_loss']:.4f}"
            f"  Top-1 raw {row['val_top1']:6.2f}%  EMA {row['ema_top1']:6.2f}%  {speed:,.0f} images/s"
            + (f"  {standing(row, self.official)}" if self.official else ""),
            flush=True,
        )

    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, ImageClassifier)
        self._draw(pl_module)

    def _draw(self, classifier: ImageClassifier) -> None:
        if classifier.history:
            with atomic_write(self._directory / "curve.png") as file:
                draw_curve(classifier.history, self.official, file)
        self._curve_drawn = time.perf_counter()


class SpeedBar(TQDMProgressBar):
    """Lightning's progress bar with images/s; silent where nobody watches (no terminal)."""

    def __init__(self, refresh_rate: int) -> None:
        super().__init__(refresh_rate=refresh_rate if sys.stderr.isatty() else 0)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        shown = {k: v for k, v in super().get_metrics(trainer, pl_module).items() if k != "v_num"}
        rate = self.train_progress_bar.format_dict["rate"] if self._train_progress_bar is not None else None
        if rate and isinstance(pl_module, ImageClassifier):
            shown["images/s"] = f"{rate * pl_module.images_per_batch:,.0f}"
        return shown
