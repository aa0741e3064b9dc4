"""What a run writes while it trains: metrics.csv, timing.csv, curve.png, a line per epoch, and a logger of conf/logger.

Whatever goes wrong in W&B or TensorBoard, the training goes on.
Check: `pytest tests/test_train.py tests/test_sweep.py`.
"""

import csv
import os
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partialmethod
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from repghost.dataset import DataModule
from repghost.figures import draw_curve
from repghost.files import atomic_write, rows_as_csv, write_text
from repghost.reference import Row, standing
from repghost.training.module import TrainingModule

WANDB_ID = "wandb_id.txt"


class GuardedLogger(Logger):
    """Passes on to `logger` what is logged, until that raises: one line says so, and the run goes on without it."""

    name = version = None

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger: Logger | None = logger

    @rank_zero_only
    def _pass(self, method: str, *arguments: Any, **options: Any) -> None:
        if self._logger is None:
            return
        try:
            # Without the terminal wandb cannot ask who logs in, and wait: it fails and says what to do.
            with open(os.devnull) as nothing, mock.patch.object(sys, "stdin", nothing):
                getattr(self._logger, method)(*arguments, **options)
            if method == "finalize":
                self._logger = None
        except Exception as error:
            name, self._logger = type(self._logger).__name__, None
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"{name} failed and is left out from here on, the run goes on: {reason}", flush=True)

    log_metrics = partialmethod(_pass, "log_metrics")
    log_hyperparams = partialmethod(_pass, "log_hyperparams")
    save = partialmethod(_pass, "save")

    def finalize(self, status: str) -> None:
        # A Trainer calls this after a training and after each evaluation; the last word is that of `close`.
        self._pass(*(("save",) if status == "success" else ("finalize", status)))

    def close(self, pictures: Sequence[Path]) -> None:
        """Ends the logger of a run that was trained and evaluated; pictures: PNG files to show with it."""
        for path in pictures:
            self._pass("log_image", path.stem, [str(path)])
        self._pass("finalize", "success")


class RunTensorBoardLogger(TensorBoardLogger):
    """Lightning's logger for TensorBoard, which shows pictures under the name that W&B's has for it."""

    def log_image(self, key: str, images: Sequence[str]) -> None:
        """Shows image files."""
        for path in images:
            with Image.open(path) as image:
                self.experiment.add_image(key, np.asarray(image.convert("RGB")), dataformats="HWC")


class RunWandbLogger(WandbLogger):
    """Lightning's logger for Weights & Biases; a run that is resumed in its folder continues its curve there.

    The id of the wandb run is kept in `save_dir`/wandb_id.txt. At the end uploads have `finish_seconds`; what is left
    then stays in the folder, for `wandb sync`.
    """

    def __init__(self, save_dir: str, finish_seconds: float, settings: dict[str, Any], **options: Any) -> None:
        settings = {"finish_timeout": finish_seconds, "finish_timeout_raises": True, **settings}
        super().__init__(save_dir=save_dir, id=_wandb_id(Path(save_dir) / WANDB_ID), settings=settings, **options)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        import wandb

        super().finalize(status)
        if wandb.run is not None:
            wandb.run.finish(exit_code=0 if status == "success" else 1)


@rank_zero_only
def _wandb_id(file: Path) -> str | None:
    """The id of the wandb run, drawn and written to `file` at first; None on ranks that do not log."""
    if not file.exists():
        write_text(file, secrets.token_hex(4) + "\n")
    return file.read_text().strip()


def make_logger(config: DictConfig | None, directory: Path) -> list[Logger]:
    """The logger of conf/logger beside the CSV files that every run writes; none for `logger=csv`."""
    if not config:
        return []
    return [GuardedLogger(instantiate(config, save_dir=str(directory.resolve()), name=directory.name))]


class RunFiles(Callback):
    """Writes metrics.csv (reproducible, rewritten from the history), timing.csv and curve.png; prints epoch lines.

    The line says for which share of the time the training waited for data: hardly any where its step is what bounds it,
    more where the loader does. On a GPU the work that is queued meanwhile is not taken off: that would take a
    synchronization. Hands config.yaml to the loggers when the training begins. `official` is the reference curve to
    compare with, `epoch_seconds` what an epoch of this process took, with its validation: the median, None before the
    first ended.
    """

    def __init__(self, directory: Path, curve_seconds: float) -> None:
        self.official: dict[int, Row] | None = None
        self.epoch_seconds: float | None = None
        self._measured: list[float] = []  # seconds of every epoch
        self._directory = directory
        self._curve_seconds = curve_seconds
        self._curve_drawn = 0.0

    @rank_zero_only
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A logger that cannot start says so now, not an epoch later.
        config: Any = OmegaConf.to_container(OmegaConf.load(self._directory / "config.yaml"))
        for logger in trainer.loggers:
            logger.log_hyperparams(config)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._started = time.perf_counter()
        self._batches = 0
        self._waited_before = _seconds_waited(trainer)

    on_train_start = on_train_epoch_start  # which an epoch that is entered in its middle does not call

    def on_train_batch_end(self, *_: Any) -> None:
        self._batches += 1

    def on_validation_start(self, *_: Any) -> None:
        self._validating = time.perf_counter()

    @rank_zero_only
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        now, row = time.perf_counter(), pl_module.history[-1]
        epoch, seconds = int(row["epoch"]), self._validating - self._started
        if self._batches:  # an epoch may be entered in its middle, or at its end
            whole = seconds * trainer.num_training_batches / self._batches
            self._measured.append(whole + now - self._validating)
            self.epoch_seconds = median(self._measured)
        left = ((trainer.max_epochs or 0) - epoch - 1) * (self.epoch_seconds or 0)
        speed = self._batches * pl_module.images_per_batch / seconds
        waited = min(1.0, (_seconds_waited(trainer) - self._waited_before) / seconds)
        write_text(self._directory / "metrics.csv", rows_as_csv(pl_module.history))
        timing = {
            "epoch": row["epoch"],
            "train_seconds": round(seconds, 2),
            "images_per_second": round(speed, 1),
            "validation_seconds": round(now - self._validating, 2),
            "waited_for_data": round(waited, 4),
        }
        append_row(self._directory / "timing.csv", timing)
        if self.official and epoch in self.official:
            official = {f"official_{k}": v for k, v in self.official[epoch].items() if k != "epoch"}
            for logger in trainer.loggers:
                logger.log_metrics(official, step=epoch)
        if now - self._curve_drawn >= self._curve_seconds:
            self.on_train_end(trainer, pl_module)
        print(
            f"epoch {epoch + 1:>3}/{trainer.max_epochs}  lr {row['lr']:.4f}  train loss {row['train_loss']:.4f}"
            f"  {pl_module.epoch_words(row)}  {speed:,.0f} images/s"
            + (f"  {duration(left)} left" if left else "")
            + f"  waited {waited:.0%} for data"
            + (f"  {standing(row, self.official)}" if self.official else ""),
            flush=True,
        )

    @rank_zero_only
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, TrainingModule)
        if pl_module.history:
            with atomic_write(self._directory / "curve.png") as file:
                draw_curve(pl_module.history, self.official, file)
        self._curve_drawn = time.perf_counter()


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row to a CSV file; one of an earlier version, without some of its columns, gets them, empty."""
    before = csv.DictReader(path.read_text(errors="replace").splitlines()) if path.exists() else ()
    rows = [{column: old.get(column) for column in row} for old in before]
    write_text(path, rows_as_csv([*rows, row]))


def _seconds_waited(trainer: pl.Trainer) -> float:
    datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
    return float(datamodule.seconds_waited) if isinstance(datamodule, DataModule) else 0.0


class SpeedBar(TQDMProgressBar):
    """Lightning's progress bar with images/s and the time until the training ends; silent without a terminal."""

    def __init__(self, refresh_rate: int) -> None:
        super().__init__(refresh_rate=refresh_rate if sys.stderr.isatty() else 0)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        shown: dict[str, Any] = dict(super().get_metrics(trainer, pl_module))
        bar = self.train_progress_bar.format_dict
        # Lightning sets the bar's position, of which tqdm measures no rate of its own.
        rate = (bar["n"] - bar["initial"]) / bar["elapsed"] if bar["elapsed"] else 0
        if rate and isinstance(pl_module, TrainingModule):
            shown["images/s"] = f"{rate * pl_module.images_per_batch:,.0f}"
            epochs = (trainer.max_epochs or 0) - trainer.current_epoch - bar["n"] / trainer.num_training_batches
            callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
            measured = next((c.epoch_seconds for c in callbacks if isinstance(c, RunFiles)), None)
            # Without the validations until one was measured.
            shown["left"] = duration(epochs * (measured or trainer.num_training_batches / rate))
        return shown


def duration(seconds: float) -> str:
    """A time in its two largest units: 4 h 12 min."""
    minutes = round(seconds / 60)
    if minutes == 0:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // (24 * 60)} d {minutes // 60 % 24} h"
