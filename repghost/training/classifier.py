"""ImageClassifier: what a training step, a validation and a checkpoint of a run are.

Batches arrive from the data module with images float32 [N, 3, H, W] on the device, labels int64 [N] and positions
int64 [N]; label -1 marks a row without an image. Raw and averaged weights are validated side by side in float32.
Check: `pytest tests/test_classifier.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from repghost.dataset import Batch
from repghost.errors import UserError
from repghost.metrics import score_sums, scores
from repghost.model import RepGhostNet
from repghost.training.ema import WeightAverage, ema_decay
from repghost.training.internals import copy_all
from repghost.training.schedule import epoch_learning_rate
from repghost.training.trainer import compile_step, compiles


class ImageClassifier(pl.LightningModule):
    """Trains `model` by a recipe; `ema.model` is its average, `history` the rows of metrics.csv.

    recipe: the `recipe` block of a run's config. batch_size: global. compile: the training step, see
    `repghost.training.trainer.compiles`. freeze_epochs: epochs in which only the last layer learns.
    """

    def __init__(
        self,
        model: RepGhostNet,
        recipe: Mapping[str, Any],
        *,
        epochs: int,
        batch_size: int,
        steps_per_epoch: int,
        freeze_epochs: int,
        channels_last: bool,
        compile: bool | str,
        seed: int,
    ) -> None:
        super().__init__()
        self._recipe, self._epochs, self._batch_size, self._seed = recipe, epochs, batch_size, seed
        self._freeze_epochs, self._compile, self._smoothing = freeze_epochs, compile, float(recipe["label_smoothing"])
        self.model = model.to(memory_format=torch.channels_last) if channels_last else model
        self.ema = WeightAverage(self.model, ema_decay(recipe, epochs * steps_per_epoch))
        self.history: list[dict[str, float]] = []
        self._loss: Callable[[Tensor, Tensor], Tensor] = self._network_and_loss
        self._last_step: tuple[HostCopy, int, int, Tensor] | None = None  # loss is finite, epoch, batch, positions
        self._train_sums = torch.zeros(2, dtype=torch.float64)  # loss, images of the running epoch on this rank
        self._score_sums = torch.zeros(2, 4, dtype=torch.float64)  # raw, averaged
        # What a checkpoint must agree with; config.yaml, which says more, may have been lost.
        self._run = {"width": model.width, "classes": model.classifier.out_features, "epochs": epochs}
        self._run |= {"batch_size": batch_size, "steps_per_epoch": steps_per_epoch, "seed": seed}

    # -- the optimizer ---------------------------------------------------------------------------------------------

    def epoch_learning_rate(self, epoch: int) -> float:
        """The learning rate of `epoch`, scaled to the batch size."""
        return epoch_learning_rate(self._recipe, epoch, epochs=self._epochs, batch_size=self._batch_size)

    def configure_optimizers(self) -> Optimizer:
        """SGD with Nesterov momentum."""
        return SGD(
            parameter_groups(self.model, self._recipe["weight_decay"]),
            lr=self.epoch_learning_rate(0),
            momentum=self._recipe["momentum"],
            nesterov=self._recipe["momentum"] > 0,
            # Fused SGD avoids a synchronization for AMP's scale on GPUs. On CPUs it rounds differently from timm's SGD.
            fused=self.device.type == "cuda" or None,
        )

    # -- training --------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self.ema.to(self.device)
        self._train_sums = self._train_sums.to(self.device)
        if compiles(self._compile, self.device):
            # Validation, in evaluation mode and float32, is not compiled: one graph, compiled once.
            self._loss = compile_step(self._network_and_loss)

    def on_train_epoch_start(self) -> None:
        # A pure function of the epoch: there is no scheduler whose state could be lost.
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.epoch_learning_rate(self.current_epoch)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self._freeze_epochs:
            # Frozen, BatchNorm keeps the statistics that the weights came with.
            self.model.train(self.current_epoch >= self._freeze_epochs)
            self.model.dropout.train()
        # Dropout differs between ranks; repeating a batch after a resume repeats its dropout.
        torch.manual_seed(step_seed(self._seed, self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self._loss(batch.images, batch.labels)
        images = (batch.labels >= 0).sum()
        self._train_sums += torch.stack([loss.detach().double() * images, images])
        self.require_finite_loss()  # of the step before: the host does not wait for this one
        self._last_step = HostCopy(loss.detach().isfinite()), self.current_epoch, batch_idx, batch.positions
        return loss

    def _network_and_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return smoothed_cross_entropy(self.model(images), labels, self._smoothing)

    def require_finite_loss(self) -> None:
        """Raises UserError when the loss of the last step was not finite; waits for that step."""
        if self._last_step and not self._last_step[0].read():
            _, epoch, batch, positions = self._last_step
            raise UserError(
                f"the loss is not finite in epoch {epoch}, batch {batch} (positions {int(positions[0])} to "
                f"{int(positions[-1])} of the epoch); the last checkpoint was saved before it: "
                "start a new run with a smaller learning rate or another precision"
            )

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.current_epoch < self._freeze_epochs:
            # Without a gradient SGD leaves a parameter and its momentum alone.
            for name, parameter in self.model.named_parameters():
                if not name.startswith("classifier."):
                    parameter.grad = None

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        super().optimizer_step(*arguments, **options)
        trainer: Any = self.trainer
        with trainer.profiler.profile("[ImageClassifier].average"):
            average_buffers(self.model)
            self.ema.update(self.model)

    @property
    def images_per_batch(self) -> int:
        """Images that all ranks together take in one batch of the trainer."""
        return self._batch_size // self.trainer.accumulate_grad_batches

    # -- validation ------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self.require_finite_loss()
        self._score_sums = torch.zeros(2, 4, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        models = self.model, self.ema.model
        with torch.autocast(self.device.type, enabled=False):
            self._score_sums += torch.stack([score_sums(m(batch.images), batch.labels) for m in models])

    def on_validation_epoch_end(self) -> None:
        # Sums, not means, are reduced: every image counts once on any number of ranks.
        raw, averaged = (scores(s) for s in self.trainer.strategy.reduce(self._score_sums, reduce_op="sum"))
        loss, images = self.trainer.strategy.reduce(self._train_sums.clone(), reduce_op="sum").tolist()
        self._train_sums.zero_()
        epoch, rate = self.current_epoch, self.epoch_learning_rate(self.current_epoch)
        row = {"epoch": epoch, "lr": rate, "train_loss": loss / max(images, 1)}
        for name, result in (("val", raw), ("ema", averaged)):
            row |= {f"{name}_loss": result.loss, f"{name}_top1": result.top1, f"{name}_top5": result.top5}
        self.history.append(row)
        for logger in self.trainer.loggers:
            logger.log_metrics(row, step=epoch)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"], checkpoint["ema"] = self._run, self.ema.model.state_dict()
        checkpoint["history"] = self.history
        checkpoint["train_sums"] = torch.as_tensor(self.all_gather(self._train_sums)).reshape(-1, 2)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for key, value in self._run.items():
            if (before := checkpoint["run"][key]) != value:
                raise UserError(f"the checkpoint is of a run with {key}={before}, this command says {key}={value}")
        self.ema.model.load_state_dict(checkpoint["ema"])
        self.history = checkpoint["history"]
        sums = checkpoint["train_sums"]
        if len(sums) == self.trainer.world_size:
            self._train_sums.copy_(sums[self.global_rank])
        elif self.global_rank == 0:  # another number of ranks: rank 0 takes the sum of all
            self._train_sums.copy_(sums.sum(dim=0))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weight decay for parameters with more than one dimension that are not biases, none for the rest."""
    others: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (others if parameter.ndim <= 1 or name.endswith(".bias") else decayed).append(parameter)
    return [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Mean cross-entropy over the rows whose label is not -1; zero where no row is left.

    logits: float [N, C]; labels: int64 [N]; the target is `1 - smoothing` on the label plus `smoothing` spread evenly
    over all classes (Szegedy et al., arXiv 1512.00567, section 7).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(logits, labels, ignore_index=-1, label_smoothing=smoothing, reduction="sum")
    return total / (labels >= 0).sum().clamp(min=1)


@torch.no_grad()
def average_buffers(model: nn.Module) -> None:
    """Averages the floating-point buffers (BatchNorm's running statistics) over all ranks in one flat all-reduce.

    Every rank then holds the same model at any moment. The official runs kept each rank's own statistics.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    flat = torch.cat([b.flatten() for b in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([b.numel() for b in buffers])
    copy_all(buffers, [part.view_as(b) for part, b in zip(parts, buffers, strict=True)])


class HostCopy:
    """A copy of a small tensor for the host to read later.

    On a GPU the copy is queued behind what is being computed, and `read` waits for it. A host that reads it one step
    later waits for a step that is over or nearly so, and the GPU always has work queued.
    """

    def __init__(self, value: Tensor) -> None:
        self._value, self._copied = value, None
        if value.is_cuda:
            self._value = torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> Tensor:
        """The tensor, on the CPU."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._value


def step_seed(*parts: int) -> int:
    """A 63-bit seed for what is drawn at one place of a run, such as (seed, epoch, batch, rank).

    numpy's SeedSequence mixes the numbers, so that neighbours give unrelated streams.
    """
    words = np.random.SeedSequence(parts).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))
