"""Writes a store of logits: the data pipeline of a training, a teacher in the place of the network.

It runs under the Trainer of a training, with its checkpoints, so that it stops, resumes and shares the work among
devices as a training does. Check: `pytest tests/test_logits_store.py`.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from repghost.dataset import Batch
from repghost.distillation.store import STORE, LogitsStore, top_logits
from repghost.distillation.teacher import Teacher
from repghost.distillation.teaching import seen_images, teacher_of
from repghost.errors import UserError, print_rank_zero
from repghost.training.checkpoint import AtomicCheckpointIO, Checkpoints, resume_point
from repghost.training.loggers import SpeedBar, duration
from repghost.training.module import TrainingModule
from repghost.training.trainer import compile_step, compiles, keep_compiled

_LOOKED_AT = 1024  # images of an epoch that its line speaks of


def write_logits(config: DictConfig) -> None:
    """Writes the store that a resolved config of conf/teach.yaml describes, as one of its ranks.

    Nothing is done where it is complete.
    """
    folder = Path(config.out)
    checkpoints = Checkpoints(folder / "checkpoints", **config.checkpoint)
    trainer = instantiate(config.trainer)(
        directory=folder,
        callbacks=[checkpoints, SpeedBar(refresh_rate=1)],
        plugins=[AtomicCheckpointIO()],
        limit_val_batches=0,
    )
    with checkpoints.signals:
        device = trainer.strategy.root_device
        data = instantiate(config.data)
        data.setup("fit")
        data.augment.match_step(device, trainer.precision, config.channels_last)
        teacher = teacher_of(config, data)
        store = _store(config, data, teacher, device)
        if store.written >= store.epochs:
            print_rank_zero(f"{folder} is complete")
            return
        print_rank_zero(f"teacher    {teacher}")
        print_rank_zero(
            f"logits     {folder}: {store.epochs} epochs of {store.positions:,} images, {store.top} classes of each in "
            f"{store.dtype}: {store.bytes / 1e9:,.2f} GB"
        )
        if compiles(config.compile, device):
            keep_compiled(Path(config.data.cache) / "compiled")
            data.augment.compile()
        if trainer.is_global_zero and not (folder / STORE).exists():
            store.save()
        writer = LogitsWriter(teacher, store, config, data.steps_per_epoch)
        trainer.fit(writer, datamodule=data, ckpt_path=resume_point(folder / "checkpoints"), weights_only=True)


def _store(config: DictConfig, data: Any, teacher: Teacher, device: torch.device) -> LogitsStore:
    """The store to be written, whose beginning may be there. Raises UserError where another one is, or no room."""
    folder, classes = Path(config.out), data.num_classes
    store = LogitsStore(
        folder,
        teacher=teacher.name,
        weights=teacher.weights,
        classes=classes,
        top=min(config.top, classes),
        dtype=config.dtype,
        positions=data.steps_per_epoch * data.batch_size,
        epochs=config.epochs,
        seen=seen_images(config, data, device),
    )
    if (folder / STORE).exists():
        begun = LogitsStore.open(folder)
        begun.require(store.seen, 0, 0)
        for key in ("weights", "top", "dtype", "positions", "epochs"):
            if (before := getattr(begun, key)) != (now := getattr(store, key)):
                raise UserError(
                    f"{folder}: was begun with {key}={before}, this command says {now}: give another folder"
                )
        return replace(store, written=begun.written)
    there = next(path for path in folder.absolute().parents if path.exists())
    if (free := shutil.disk_usage(there).free) < store.bytes:
        raise UserError(
            f"{folder}: {free / 1e9:,.2f} GB are free on this disk, and the logits take {store.bytes / 1e9:,.2f}: "
            "make room, store fewer epochs or a smaller top, or give another folder"
        )
    return store


class LogitsWriter(TrainingModule):
    """Writes what `teacher` says of each batch; the Trainer counts the steps of one weight that stays zero."""

    metric, nesterov, fused_on_cpu = None, False, False
    model: nn.Linear

    def __init__(self, teacher: Teacher, store: LogitsStore, config: DictConfig, steps_per_epoch: int) -> None:
        super().__init__(
            nn.Linear(1, 1, bias=False),
            config.recipe,
            epochs=config.epochs,
            batch_size=config.batch_size,
            steps_per_epoch=steps_per_epoch,
            seed=config.seed,
            identity={"teacher": teacher.weights},
        )
        nn.init.zeros_(self.model.weight)
        self._teacher, self._store, self._config = teacher, store, config
        self._answer: Callable[[Tensor], Tensor] = teacher
        self._began = 0.0

    def epoch_learning_rate(self, epoch: int) -> float:
        return 0.0

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._teacher.to(self.device, self._config.channels_last)
        if compiles(self._config.compile, self.device):
            self._answer = compile_step(self._teacher)

    def on_train_epoch_start(self) -> None:
        self._began = time.monotonic()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits = top_logits(self._answer(batch.images), self._store.top, self._store.dtype)
        self._store.write(self.current_epoch, int(batch.positions[0]), logits)
        nothing = self.model.weight.sum() * 0
        return self.step_taken(nothing, torch.zeros_like(batch.labels).sum(), batch.positions, batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Nothing is validated."""

    def on_train_epoch_end(self) -> None:
        self._store.sync(self.current_epoch)
        self.trainer.strategy.barrier()
        done, epochs = self.current_epoch + 1, self._store.epochs
        if self.trainer.is_global_zero and done > self._store.written:
            self._store = replace(self._store, written=done)
            self._store.save()
        left = (epochs - done) * (time.monotonic() - self._began)
        print_rank_zero(
            f"epoch {done:>{len(str(epochs))}}/{epochs}  {self._store.top} classes hold {self._held():.1%} of the "
            f"probability  {duration(left)} left"
        )

    def _held(self) -> float:
        """Mean share of the probability that the stored classes have, of some images of this epoch."""
        some = torch.arange(min(self._store.positions, _LOOKED_AT))
        return float(self._store.read(self.current_epoch, some).values.float().exp().sum(dim=1).mean())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._store.sync(self.current_epoch)  # before the checkpoint says so
        super().on_save_checkpoint(checkpoint)
