"""ImageClassifier: what a training step, a validation and a checkpoint of a run are.

Batches arrive from the data module as (float32 images [N, 3, H, W] on the device, int64 labels [N], int64 positions
[N]); label -1 marks a row that stands for no image. Raw and averaged weights are validated side by side in float32.
Check: `pytest tests/test_classifier.py`.
"""

from collections.abc import Callable
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
from repghost.training.ema import WeightAverage
from repghost.training.schedule import learning_rate, linear_scale
from repghost.training.trainer import compile_step, compiles


class ImageClassifier(pl.LightningModule):
    """Trains `model` by the recipe; `ema.model` is its average, `history` the rows of metrics.csv.

    learning_rate, start_learning_rate and final_learning_rate are stated for `reference_batch_size` and scaled to
    `batch_size`, the global one. The average has the decay `ema_decay` or, in its place, a memory of `ema_span` times
    the steps of the run. compile: the training step, see `repghost.training.trainer`.
    """

    def __init__(
        self,
        model: RepGhostNet,
        *,
        epochs: int,
        batch_size: int,
        reference_batch_size: int,
        learning_rate: float,
        start_learning_rate: float,
        final_learning_rate: float,
        warmup_epochs: int,
        momentum: float,
        weight_decay: float,
        label_smoothing: float,
        ema_decay: float | None,
        ema_span: float | None,
        steps_per_epoch: int,
        freeze_epochs: int,
        channels_last: bool,
        compile: bool | str,
        seed: int,
    ) -> None:
        super().__init__()
        if (ema_decay is None) == (ema_span is None):
            raise UserError(f"recipe.ema_decay={ema_decay}, recipe.ema_span={ema_span}: give one, null the other")
        if ema_span is not None:
            ema_decay = max(0.0, 1 - 1 / (ema_span * epochs * steps_per_epoch))
        for key, value in {"label_smoothing": label_smoothing, "ema_decay": ema_decay, "momentum": momentum}.items():
            if value is None or not 0 <= value < 1:
                raise UserError(f"recipe.{key}={value} is not in [0, 1)")
        if learning_rate <= 0 or weight_decay < 0:
            raise UserError(f"recipe.learning_rate={learning_rate}, recipe.weight_decay={weight_decay}: not negative")
        self.model = model.to(memory_format=torch.channels_last) if channels_last else model
        self.ema = WeightAverage(self.model, float(ema_decay or 0))
        self._compile = compile
        self._loss: Callable[[Tensor, Tensor], Tensor] = self._network_and_loss

        def scaled(value: float) -> float:
            return linear_scale(value, batch_size=batch_size, reference_batch_size=reference_batch_size)

        self._curve: dict[str, Any] = {
            "epochs": epochs,
            "peak": scaled(learning_rate),
            "start": scaled(start_learning_rate),
            "final": scaled(final_learning_rate),
            "warmup_epochs": warmup_epochs,
        }
        self._sgd = {"momentum": momentum, "weight_decay": weight_decay}
        self._label_smoothing = label_smoothing
        self._freeze_epochs = freeze_epochs
        self._seed = seed
        self._batch_size = batch_size
        self.history: list[dict[str, float]] = []
        # What a checkpoint has to agree in; config.yaml, which says more, may have been lost.
        self._run = {
            "width": model.width,
            "classes": model.classifier.out_features,
            "epochs": epochs,
            "batch_size": batch_size,
            "steps_per_epoch": steps_per_epoch,
            "seed": seed,
        }
        self._watch = LossWatch()
        self._train_sums = torch.zeros(2, dtype=torch.float64)  # loss, images of the running epoch on this rank
        self._score_sums = torch.zeros(2, 4, dtype=torch.float64)  # raw, averaged

    # -- the optimizer ---------------------------------------------------------------------------------------------

    def epoch_learning_rate(self, epoch: int) -> float:
        """The learning rate of `epoch`, scaled to the batch size."""
        return learning_rate(epoch, **self._curve)

    def configure_optimizers(self) -> Optimizer:
        """SGD with Nesterov momentum."""
        return SGD(
            parameter_groups(self.model, self._sgd["weight_decay"]),
            lr=self.epoch_learning_rate(0),
            momentum=self._sgd["momentum"],
            nesterov=self._sgd["momentum"] > 0,
            # One kernel, which takes AMP's scale without asking the device. A CPU's rounds otherwise than timm's SGD.
            fused=self.device.type == "cuda" or None,
        )

    # -- training --------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self.ema.to(self.device)
        self._train_sums = self._train_sums.to(self.device)
        if compiles(self._compile, self.device):
            # The network of a validation is in another mode and stays as it is: one graph, compiled once.
            self._loss = compile_step(self._network_and_loss)

    def on_train_epoch_start(self) -> None:
        # A pure function of the epoch: there is no scheduler whose state could be lost.
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.epoch_learning_rate(self.current_epoch)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self._freeze_epochs:
            self.model.train(not self._frozen)  # frozen, BatchNorm keeps the statistics that the weights came with
            self.model.dropout.train()
        # Dropout differs between ranks and is the same again when the batch is.
        torch.manual_seed(step_seed(self._seed, self.current_epoch, batch_idx, self.global_rank))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self._loss(batch.images, batch.labels)
        images_counted = (batch.labels >= 0).sum()
        self._train_sums += torch.stack([loss.detach().double() * images_counted, images_counted])
        self._watch.follow(loss, self.current_epoch, batch_idx, batch.positions)
        return loss

    def _network_and_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        return smoothed_cross_entropy(self.model(images), labels, self._label_smoothing)

    def require_finite_loss(self) -> None:
        """Raises UserError when the loss of the last step was not a number; waits for that step."""
        self._watch.check()

    @property
    def _frozen(self) -> bool:
        return self.current_epoch < self._freeze_epochs

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self._frozen:
            # Without a gradient SGD leaves a parameter and its momentum alone.
            for name, parameter in self.model.named_parameters():
                if not name.startswith("classifier."):
                    parameter.grad = None

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
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
        row = {
            "epoch": self.current_epoch,
            "lr": self.epoch_learning_rate(self.current_epoch),
            "train_loss": loss / max(images, 1),
            "val_loss": raw.loss,
            "val_top1": raw.top1,
            "val_top5": raw.top5,
            "ema_loss": averaged.loss,
            "ema_top1": averaged.top1,
            "ema_top5": averaged.top5,
        }
        self.history.append(row)
        for logger in self.trainer.loggers:
            logger.log_metrics(row, step=self.current_epoch)

    # -- checkpoints -----------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = self._run
        checkpoint["ema"] = self.ema.model.state_dict()
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
        elif self.global_rank == 0:  # another number of ranks: one of them carries the sum of all on
            self._train_sums.copy_(sums.sum(dim=0))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weight decay for parameters with more than one dimension that are not biases, none for the rest."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
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
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    flat = torch.cat([b.flatten() for b in buffers])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    parts = flat.split([b.numel() for b in buffers])
    torch._foreach_copy_(buffers, [part.view_as(b) for part, b in zip(parts, buffers, strict=True)])


class LossWatch:
    """Looks at the loss of every step one step later.

    On a GPU the verdict on a step is copied to the host while the next step is queued, and read only then: the host
    waits for a step that the GPU has left behind, the GPU never waits for the host.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, torch.cuda.Event | None, int, int, Tensor] | None = None

    def follow(self, loss: Tensor, epoch: int, batch: int, positions: Tensor) -> None:
        """Takes note of a step's loss (a scalar on any device) and checks the one before it."""
        before = self._pending
        finite, event = torch.isfinite(loss.detach()), None
        if finite.is_cuda:
            finite = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(finite, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending = (finite, event, epoch, batch, positions)
        if not loss.is_cuda:
            self.check()
        elif before is not None:
            _require_finite(*before)

    def check(self) -> None:
        """Checks the last step; waits for it."""
        if self._pending is not None:
            _require_finite(*self._pending)


def _require_finite(finite: Tensor, event: torch.cuda.Event | None, epoch: int, batch: int, positions: Tensor) -> None:
    if event is not None:
        event.synchronize()
    if not finite:
        first, last = int(positions[0]), int(positions[-1])
        raise UserError(
            f"the loss is not finite in epoch {epoch}, batch {batch} (positions {first} to {last} of the epoch); "
            "the last checkpoint is from before; begin a new run with a smaller learning rate or another precision"
        )


def step_seed(*parts: int) -> int:
    """A 63-bit seed for what is drawn at one place of a run, such as (seed, epoch, batch, rank).

    numpy's SeedSequence mixes the numbers, so that neighbours give unrelated streams.
    """
    words = np.random.SeedSequence(parts).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))
