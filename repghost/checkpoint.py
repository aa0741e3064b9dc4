"""What is saved, when and how.

`last.ckpt` is written at the end of every epoch and every `minutes` in between; the one before it stays as
`previous.ckpt`. `best_raw.ckpt` and `best_ema.ckpt` are copies of the epoch that was best on the validation images.
Files are written whole or not at all, their records carry checksums (the CRC32 of the zip format that torch.save
writes), and they are read with `weights_only=True`, so that nothing in them is executed.
"""

import pickle
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import CheckpointIO
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.utilities.rank_zero import rank_zero_warn

from repghost.atomic import atomic_write
from repghost.classifier import ImageClassifier
from repghost.errors import UserError

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
BEST = {"best_raw.ckpt": "val_top1", "best_ema.ckpt": "ema_top1"}


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's way to the disk, through `atomic_write` and `read_checkpoint`."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        path = Path(path)
        with atomic_write(path, keep=PREVIOUS if path.name == LAST else None) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        return read_checkpoint(path)

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a file written by `torch.save`, on the CPU, without executing anything in it."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: not a checkpoint of tensors and plain values ({_first_sentence(error)})") from None


def damage(path: Path) -> str | None:
    """What is wrong with the file of a checkpoint, None when every record has its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            record = archive.testzip()
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        return str(error)
    return f"record {record} has a wrong checksum" if record else None


def resume_point(folder: Path) -> Path | None:
    """The newest undamaged checkpoint of a run's `checkpoints` folder, None when the run has not saved any."""
    found = [folder / name for name in (LAST, PREVIOUS) if (folder / name).exists()]
    for path in found:
        if (problem := damage(path)) is None:
            return path
        rank_zero_warn(f"{path} is damaged ({problem}): falling back to the one before")
    if found:
        raise UserError(f"{folder}: no checkpoint in it is undamaged; delete the folder to begin anew")
    return None


class Checkpoints(Checkpoint):
    """Saves `last.ckpt` every epoch and every `minutes`, and copies of the best epochs."""

    def __init__(self, folder: Path, minutes: float) -> None:
        if minutes <= 0:
            raise UserError(f"checkpoint.minutes={minutes}: more than zero")
        self._folder = folder
        self._seconds = 60 * minutes
        self._saved = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Not at the end of an epoch, where validation is still to come, nor between accumulated batches.
        last = batch_idx + 1 == trainer.num_training_batches
        if last or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        due = time.monotonic() - self._saved >= self._seconds
        if trainer.strategy.broadcast(due):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert isinstance(pl_module, ImageClassifier)
        self._save(trainer)
        if trainer.is_global_zero:
            for name, column in BEST.items():
                values = [row[column] for row in pl_module.history]
                if values[-1] >= max(values):
                    with open(self._folder / LAST, "rb") as source, atomic_write(self._folder / name) as target:
                        shutil.copyfileobj(source, target)
        trainer.strategy.barrier()

    def _save(self, trainer: pl.Trainer) -> None:
        assert isinstance(trainer.lightning_module, ImageClassifier)
        trainer.lightning_module.require_finite_loss()
        trainer.save_checkpoint(self._folder / LAST)
        self._saved = time.monotonic()


def _first_sentence(error: BaseException) -> str:
    return " ".join(str(error).split()).split(". ")[0]
