"""TrainingModule: what every training of this project shares, whatever the network learns.

Optimizer, weight average, the exchange of the ranks, the check of the loss, the rows of metrics.csv, checkpoints. A
subclass says what the learning rate, a training step and a validation are.
Check: `pytest tests/test_classifier.py tests/test_checkpoint.py`.
"""

import gc
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from repghost.errors import UserError
from repghost.training.batchnorm import BatchCounts
from repghost.training.ema import WeightAverage, ema_decay
from repghost.training.internals import LightningModule
from repghost.training.reduction import HostCopy, RankAverage, Requests, steps_ahead


class TrainingModule(LightningModule):
    """Trains `model` by a recipe; `ema.model` is its average, `history` the rows of metrics.csv.

    recipe: the `recipe` block of a run's config. batch_size: global. identity: what a checkpoint must agree with,
    beside epochs, batch size, steps and seed. `requests`: what the ranks exchange in a step beside gradients and
    statistics. metric: the figure by which the best epoch is chosen, the larger the better; the columns `val_METRIC`
    and `ema_METRIC` of `history` have it; None: no epoch is better than another. nesterov: SGD's form of momentum.
    fused_on_cpu: whether its steps are the faster ones on CPUs, too, which round differently from timm's.
    """

    metric: ClassVar[str | None]
    nesterov: ClassVar[bool]
    fused_on_cpu: ClassVar[bool]
    requests: Requests | None = None

    def __init__(
        self,
        model: nn.Module,
        recipe: Mapping[str, Any],
        *,
        epochs: int,
        batch_size: int,
        steps_per_epoch: int,
        seed: int,
        identity: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self._recipe, self._epochs, self._batch_size, self._seed = recipe, epochs, batch_size, seed
        self.model = model
        self.ema = WeightAverage(self.model, ema_decay(recipe, epochs * steps_per_epoch))
        self.history: list[dict[str, float]] = []
        self._average_ranks: RankAverage | None = None
        self._collected = False  # Python's garbage
        self._steps: deque[tuple[HostCopy, int, int, Tensor]] = deque()  # loss is finite, epoch, batch, positions
        self._train_sums = torch.zeros(2, dtype=torch.float64)  # loss, images of the running epoch on this rank
        # config.yaml, which says more, may have been lost.
        self._run = {**identity, "epochs": epochs}
        self._run |= {"batch_size": batch_size, "steps_per_epoch": steps_per_epoch, "seed": seed}

    def epoch_learning_rate(self, epoch: int) -> float:
        """The learning rate that `epoch` ends with, scaled to the batch size."""
        raise NotImplementedError

    def epoch_words(self, row: Mapping[str, float]) -> str:
        """The figures in a row of `history` that are printed at the end of its epoch."""
        raise NotImplementedError

    # -- the optimizer ---------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> Optimizer:
        """SGD with momentum."""
        return SGD(
            parameter_groups(self.model, self._recipe["weight_decay"]),
            lr=self.epoch_learning_rate(0),
            momentum=self._recipe["momentum"],
            nesterov=self.nesterov and self._recipe["momentum"] > 0,
            fused=self._fused,
        )

    @property
    def _fused(self) -> bool | None:
        """Fused SGD avoids a synchronization for AMP's scale on GPUs.

        Gradients that are to be clipped need that synchronization; Lightning does not clip those of a fused optimizer.
        """
        possible = self.fused_on_cpu or self.device.type == "cuda"
        return (possible and self._recipe["gradient_clip"] is None) or None

    def configure_gradient_clipping(self, optimizer: Optimizer, *_: Any, **__: Any) -> None:
        """Scales the gradients of a step so that the norm of them all is at most recipe.gradient_clip."""
        if (limit := self._recipe["gradient_clip"]) is not None:
            self.clip_gradients(optimizer, gradient_clip_val=limit, gradient_clip_algorithm="norm")

    def set_learning_rate(self, rate: float) -> None:
        """For the steps that follow. There is no scheduler whose state could be lost."""
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = rate

    # -- training --------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        self.ema.to(self.device)
        self._train_sums = self._train_sums.to(self.device)
        self._counts = BatchCounts(self.model, self.ema.model)  # of the tensors on this device
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._average_ranks = RankAverage(self.model)

    def on_train_start(self) -> None:
        # A checkpoint may be of another device, whose optimizer is another one.
        prepare_optimizer(self.trainer.optimizers[0], self._fused)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # What is drawn differs between ranks; repeating a batch after a resume repeats it.
        seed_step(step_seed(self._seed, self.current_epoch, batch_idx, self.global_rank), self.device)

    def step_taken(self, loss: Tensor, images: Tensor, positions: Tensor, batch_idx: int) -> Tensor:
        """Notes a training step, to be called at its end: the mean loss of so many images at these positions."""
        if self.model.training:
            self._counts.add_batch()
        self._train_sums += torch.stack([loss.detach().double() * images, images])
        self.require_finite_loss(steps_ahead(self.device) - 1)
        self._steps.append((HostCopy(loss.detach().isfinite()), self.current_epoch, batch_idx, positions))
        return loss

    def require_finite_loss(self, but: int = 0) -> None:
        """Raises UserError when the loss of a step, `but` the last ones, was not finite; waits for those steps."""
        while len(self._steps) > but:
            finite, epoch, batch, positions = self._steps.popleft()
            if not finite.read():
                positions = positions[positions >= 0] if (positions >= 0).any() else positions
                raise UserError(
                    f"the loss is not finite in epoch {epoch}, batch {batch} (positions {int(positions[0])} to "
                    f"{int(positions[-1])} of the epoch); the last checkpoint was saved before it: "
                    "start a new run with a smaller learning rate or another precision"
                )

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        def closure() -> Any:
            # The forward and the backward pass. AMP looks for infinities in the gradients that all ranks share.
            loss = optimizer_closure() if optimizer_closure else None
            if self._average_ranks:
                self._average_ranks(self.requests)
            return loss

        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        trainer: Any = self.trainer
        with trainer.profiler.profile(f"[{type(self).__name__}].average"):
            self.ema.update(self.model)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self._collected:
            # What is there after the first step stays. Python would look through all of it again and again.
            gc.collect()
            gc.freeze()
            self._collected = True

    def on_train_end(self) -> None:
        gc.unfreeze()
        self._counts.end()

    @property
    def images_per_batch(self) -> int:
        """Images that all ranks together take in one batch of the trainer."""
        return self._batch_size // self.trainer.accumulate_grad_batches

    # -- validation ------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self.require_finite_loss()

    def end_epoch(self, figures: Mapping[str, float]) -> None:
        """Appends the row of an epoch to `history` and logs it; figures: of its validation, the same on every rank."""
        # Sums, not means, are reduced: every image counts once on any number of ranks.
        loss, images = self.trainer.strategy.reduce(self._train_sums.clone(), reduce_op="sum").tolist()
        self._train_sums.zero_()
        epoch, rate = self.current_epoch, self.epoch_learning_rate(self.current_epoch)
        row = {"epoch": epoch, "lr": rate, "train_loss": loss / max(images, 1), **figures}
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
            if (before := checkpoint["run"].get(key)) != value:
                raise UserError(f"the checkpoint is of a run with {key}={before}, this command says {key}={value}")
        self.ema.model.load_state_dict(checkpoint["ema"])
        self.history = checkpoint["history"]
        sums = checkpoint["train_sums"]
        if len(sums) == self.trainer.world_size:
            self._train_sums.copy_(sums[self.global_rank])
        elif self.global_rank == 0:  # another number of ranks: rank 0 takes the sum of all
            self._train_sums.copy_(sums.sum(dim=0))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups of the parameters that learn: weight decay for those with more than one dimension that are not biases,
    none for the rest."""
    others: list[nn.Parameter] = []
    decayed: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (others if parameter.ndim <= 1 or name.endswith(".bias") else decayed).append(parameter)
    return [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


def prepare_optimizer(optimizer: Optimizer, fused: bool | None) -> None:
    """Makes SGD `fused` or not, whatever the state says that it was given.

    Fused, every parameter gets a momentum of zero where it has none: torch takes the momentum of all or of none, and at
    the first step leaves uninitialized memory where AMP skips that step. The first update of a zero is the gradient.
    """
    for group in optimizer.param_groups:
        group["fused"] = fused
        for parameter in group["params"] if fused and group["momentum"] else ():
            state = optimizer.state[parameter]
            if state.get("momentum_buffer") is None:
                state["momentum_buffer"] = torch.zeros_like(parameter)


def seed_step(seed: int, device: torch.device) -> None:
    """Seeds the generators that a step draws from, as torch.manual_seed does, which takes longer for all devices."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def step_seed(*parts: int) -> int:
    """A 63-bit seed for what is drawn at one place of a run, such as (seed, epoch, batch, rank).

    numpy's SeedSequence mixes the numbers, so that neighbours give unrelated streams.
    """
    words = np.random.SeedSequence(parts).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))
