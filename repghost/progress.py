"""What a run shows and leaves behind while it trains: a line per epoch, a bar, metrics.csv, timing.csv, curve.png."""

import csv
import sys
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, TQDMProgressBar
from pytorch_lightning.utilities.rank_zero import rank_zero_only

from repghost.classifier import ImageClassifier
from repghost.figures import draw_curve
from repghost.files import atomic_write, rows_as_csv, write_text
from repghost.reference import Row, standing

TIMING = ("epoch", "train_seconds", "images_per_second", "validation_seconds")


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
