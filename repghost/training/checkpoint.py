"""What is saved, when and how.

`last.ckpt` is written at the end of every epoch, every `minutes` in between, and when a signal stops the run; the
previous one stays as `previous.ckpt`. `best_raw.ckpt` and `best_ema.ckpt` hold the epoch that was best on the
validation images. What follows the last save, the evaluation, is done again on resume if the process died before it. A
checkpoint that is saved during a validation resumes at the beginning of that validation.

Files are written whole or not at all, their records carry checksums (the CRC32 of the zip format that torch.save
writes), and they are read with `weights_only=True`, so that nothing in them is executed. With `background` the run
goes on while a thread writes a copy in host memory, one file at a time and in the same order; a run that ends by itself
or by a signal waits for it.
Check: `pytest tests/test_checkpoint.py tests/test_resume.py`, `python benchmarks/kill.py`.
"""

import multiprocessing
import os
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from lightning_fabric.plugins import CheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.strategies import Strategy
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities.rank_zero import rank_zero_only, rank_zero_warn
from torch import Tensor

from repghost.description import KEY, Description
from repghost.errors import UserError, print_rank_zero
from repghost.files import atomic_write, remove_leftovers
from repghost.training.internals import rescale_batches, restart_validation
from repghost.training.module import TrainingModule
from repghost.training.reduction import GO_ON, SAVE, STOP, Requests
from repghost.training.signals import StopSignals
from repghost.weights import damage, read_checkpoint

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
BEST = {"best_raw.ckpt": "val", "best_ema.ckpt": "ema"}  # of the raw and of the averaged weights

# Changes with the content of a checkpoint; 1 had no such key.
FORMAT = 2

_SECONDS_UNTIL_SEEN = 10.0  # what a rank writes, by the others

_TENSORS_OF_A_WEIGHT = 3  # in a checkpoint: it, its average, its momentum


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's way to the disk, through `atomic_write` and `read_checkpoint`.

    background: `save_checkpoint` returns when the state is copied to host memory; a thread writes it.
    """

    background = False

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._write: Future[None] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes `path`, then copies of it under the names in `storage_options`, in this order.

        With `background`, raises what went wrong with the file before, as `wait` does, and starts the next one.
        """
        content, names = {**checkpoint, "format": FORMAT}, storage_options or ()
        if not self.background:
            _write(content, Path(path), names)
            return
        self.wait()
        self._write = self._thread.submit(_write, apply_to_collection(content, Tensor, _on_host), Path(path), names)

    def wait(self, at_most_look: bool = False) -> None:
        """Waits for what is being written, and raises what went wrong; at_most_look: only if it is over."""
        if self._write is not None and (self._write.done() or not at_most_look):
            write, self._write = self._write, None
            write.result()

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        content = read_checkpoint(path)
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise UserError(f"{path}: no checkpoint of this version of train.py; weights=FILE starts a run from it")
        return content

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _write(content: dict[str, Any], path: Path, copies: Sequence[str]) -> None:
    with atomic_write(path, keep=_kept(path)) as file:
        torch.save(content, file)
    for name in copies:
        _copy(path, path.with_name(name))


# -- reading -----------------------------------------------------------------------------------------------------------


def resume_point(folder: Path) -> Path | None:
    """The newest undamaged checkpoint of a run's `checkpoints` folder, None when the run has not saved any."""
    found = [folder / name for name in (LAST, PREVIOUS) if (folder / name).exists()]
    for path in found:
        if (problem := damage(path)) is None:
            return path
        rank_zero_warn(f"{path} is damaged ({problem}): going on from the one before")
    if found:
        raise UserError(f"{folder}: no checkpoint in it is undamaged; delete the folder to begin anew")
    return None


def require_room(folder: Path, module: TrainingModule) -> None:
    """Raises UserError where the disk has less room than two checkpoints of a run need."""
    network = sum(tensor.nbytes for tensor in module.model.state_dict().values())
    needed = 2 * _TENSORS_OF_A_WEIGHT * network
    there = next(path for path in folder.parents if path.exists())
    if (free := shutil.disk_usage(there).free) < needed:
        raise UserError(
            f"{folder}: {free / 2**20:.0f} MiB are free on this disk, and two checkpoints take {needed / 2**20:.0f}: "
            "make room, or give another output=..."
        )


def require_shared(folder: Path, strategy: Strategy) -> None:
    """Raises UserError in every rank, once all have come here, if one does not see what rank 0 writes into `folder`.

    Such a rank would resume at another step than the others, or begin anew.
    """
    token = folder / strategy.broadcast(f".seen-{secrets.token_hex(8)}")
    if strategy.is_global_zero:
        folder.mkdir(parents=True, exist_ok=True)
        token.touch()
    strategy.barrier()
    until = time.monotonic() + _SECONDS_UNTIL_SEEN
    while not (seen := _is_listed(token)) and time.monotonic() < until:
        time.sleep(0.5)
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, (seen, socket.gethostname()))
    if strategy.is_global_zero:
        token.unlink()
    if blind := [f"rank {rank} on {host}" for rank, (seen, host) in enumerate(answers) if not seen]:
        raise UserError(
            f"{folder}: {', '.join(blind)} does not see what rank 0 on {answers[0][1]} writes there: "
            "start all ranks in the same folder, or give an output=... that all machines share"
        )


def _is_listed(path: Path) -> bool:
    """Whether `path` exists; a network file system that remembers otherwise is asked again when folders are listed."""
    with suppress(OSError):
        return all(inner.name in os.listdir(inner.parent) for inner in (path.parent, path))
    return False


# -- when to save ------------------------------------------------------------------------------------------------------


class Checkpoints(Checkpoint):
    """Saves `last.ckpt` every epoch, every `minutes` and when a signal came, and the best epochs.

    background: whether a thread writes the files, `auto` for on a GPU, which would wait for them; on a CPU the thread
    would take its time from the training. signals: to be entered around the training, see StopSignals. description: of
    the network, which every checkpoint says of itself; None until it is known. record: called on every rank once
    nothing is wrong with the run's folder.
    """

    description: Description | None = None
    record: Callable[[], None] | None = None

    def __init__(self, folder: Path, minutes: float, exit_code: int, background: bool | str) -> None:
        # Who started the ranks speaks for them.
        started = multiprocessing.parent_process() is not None
        self.signals = StopSignals(exit_code, quiet=started or rank_zero_only.rank != 0)  # type: ignore[attr-defined]
        self._folder = folder
        self._seconds, self._background = 60 * minutes, background
        self._saved = time.monotonic()

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        device = trainer.strategy.root_device
        self._requests = Requests(self._request, trainer.world_size, device)
        _files(trainer).background = device.type == "cuda" if self._background == "auto" else bool(self._background)
        if trainer.is_global_zero:
            remove_leftovers(self._folder.parent)
        if stage != "fit":
            return
        if trainer.world_size > 1:
            require_shared(self._folder.parent, trainer.strategy)
        if trainer.is_global_zero:
            require_room(self._folder, _module(trainer))
        if self.record:
            self.record()

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.signals.deferred = True
        _module(trainer).requests = self._requests

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved = time.monotonic()
        if path := trainer.ckpt_path:
            batches = trainer.global_step * trainer.accumulate_grad_batches % int(trainer.num_training_batches)
            print_rank_zero(f"resumed    {path}: epoch {trainer.current_epoch + 1}, {batches} batches are done")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Not after the last batch: Lightning would skip the validation when it resumes there, and the first batch of
        # the validation does as well. Nor between accumulated batches, whose gradients are in no checkpoint.
        if batch_idx + 1 < trainer.num_training_batches and (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self._save_or_stop(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._requests.exchange()
        self._save_or_stop(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # last.ckpt comes last: a process that dies before it trains the rest of the epoch again, and saves all again.
        history, metric = _module(trainer).history, _module(trainer).metric
        columns = {name: f"{of}_{metric}" for name, of in BEST.items()} if metric else {}
        best = [name for name, column in columns.items() if history[-1][column] >= max(row[column] for row in history)]
        self._save(trainer, *best, LAST)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._wait(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        with suppress(OSError):  # what ends the run was before it
            _files(trainer).wait()

    def _request(self) -> int:
        """What this rank requests now."""
        if self.signals.received:
            return STOP
        return SAVE if time.monotonic() - self._saved >= self._seconds else GO_ON

    def _save_or_stop(self, trainer: pl.Trainer) -> None:
        _files(trainer).wait(at_most_look=True)
        request = self._requests.largest()
        if request != GO_ON and trainer.state.fn == TrainerFn.FITTING:  # the evaluation after it changes nothing
            self._save(trainer, LAST)
        if request == STOP:
            self._wait(trainer)
            print_rank_zero("stopped by a signal; the same command goes on from here")
            self.signals.stop()

    def _save(self, trainer: pl.Trainer, name: str, *copies: str) -> None:
        _module(trainer).require_finite_loss()
        trainer.save_checkpoint(self._folder / name, storage_options=copies)
        self._saved = time.monotonic()
        self._requests.clear()  # fulfilled

    def _wait(self, trainer: pl.Trainer) -> None:
        """Returns on all ranks when the files are written."""
        _files(trainer).wait()
        trainer.strategy.barrier()

    def on_save_checkpoint(self, trainer: pl.Trainer, _: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["accumulate"] = trainer.accumulate_grad_batches
        if self.description is not None:
            checkpoint[KEY] = self.description.to_json()
        if trainer.validating:
            restart_validation(checkpoint)

    def on_load_checkpoint(self, trainer: pl.Trainer, _: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        # A step may be cut into another number of batches than before.
        rescale_batches(checkpoint, checkpoint["accumulate"], trainer.accumulate_grad_batches)


def _copy(source: Path, path: Path) -> None:
    with atomic_write(path, keep=_kept(path)) as file:
        file.write(source.read_bytes())


def _kept(path: Path) -> str | None:
    """The name under which what was at `path` before is kept."""
    return PREVIOUS if path.name == LAST else None


def _module(trainer: pl.Trainer) -> TrainingModule:
    assert isinstance(trainer.lightning_module, TrainingModule)
    return trainer.lightning_module


def _files(trainer: pl.Trainer) -> AtomicCheckpointIO:
    assert isinstance(trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    return trainer.strategy.checkpoint_io
