"""ImageClassifier: what a training step and a validation of a classifier are.

Batches arrive from the data module with images float32 [N, 3, H, W] on the device (in a training in bf16 on a GPU:
bfloat16, in channels_last), labels int64 [N] and positions int64 [N]; label -1 marks a row without an image. The loss
is the cross-entropy with the labels, of both images where two were mixed, and with a teacher partly its own. Raw and
averaged weights are validated side by side in float32.
Check: `pytest tests/test_classifier.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from repghost.dataset import Batch, Mixture, TeacherLogits
from repghost.distillation.loss import dense, full_precision
from repghost.distillation.teaching import Teaching
from repghost.metrics import score_sums, scores
from repghost.model import RepGhostNet
from repghost.training.module import TrainingModule
from repghost.training.schedule import epoch_learning_rate
from repghost.training.trainer import compile_step, compiles


class ImageClassifier(TrainingModule):
    """Trains a RepGhostNet to classify images.

    compile, compile_mode: of the training step and the validation, see `repghost.training.trainer`. freeze_epochs:
    epochs in which only the last layer learns. teaching: by whom and how, None without a teacher. The other arguments
    are those of TrainingModule.
    """

    metric, nesterov, fused_on_cpu = "top1", True, False
    model: RepGhostNet

    def __init__(
        self,
        model: RepGhostNet,
        recipe: Mapping[str, Any],
        *,
        freeze_epochs: int,
        channels_last: bool,
        compile: bool | str,
        compile_mode: str,
        teaching: Teaching | None = None,
        **run: int,
    ) -> None:
        model = model.to(memory_format=torch.channels_last) if channels_last else model
        identity: dict[str, Any] = {"width": model.width, "classes": model.classifier.out_features}
        identity["teacher"] = teaching.weights if teaching else None
        super().__init__(model, recipe, identity=identity, **run)
        self._freeze_epochs, self._smoothing = freeze_epochs, float(recipe["label_smoothing"])
        self._compile, self._compile_mode, self._teaching = compile, compile_mode, teaching
        self._channels_last = channels_last
        self._loss: Callable[..., Tensor] = self._network_and_loss
        self._scores: Callable[[Tensor, Tensor], Tensor] = self._networks_and_scores
        self._score_sums = torch.zeros(2, 4, dtype=torch.float64)  # raw, averaged

    def epoch_learning_rate(self, epoch: int) -> float:
        return epoch_learning_rate(self._recipe, epoch, epochs=self._epochs, batch_size=self._batch_size)

    def epoch_words(self, row: Mapping[str, float]) -> str:
        return f"Top-1 raw {row['val_top1']:6.2f}%  EMA {row['ema_top1']:6.2f}%"

    # -- training --------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self._teaching and self._teaching.teacher:
            self._teaching.teacher.to(self.device, self._channels_last)
        if compiles(self._compile, self.device):
            self._loss = compile_step(self._network_and_loss, self._compile_mode)
            self._scores = compile_step(self._networks_and_scores)

    def on_train_epoch_start(self) -> None:
        self.set_learning_rate(self.epoch_learning_rate(self.current_epoch))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        learning = self.current_epoch >= self._freeze_epochs
        if (self.model.training, self.model.dropout.training) != (learning, True):
            # Frozen, BatchNorm keeps the statistics that the weights came with.
            self.model.train(learning)
            self.model.dropout.train()
        super().on_train_batch_start(batch, batch_idx)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self._loss(batch.images, batch.labels, batch.mixture, batch.teacher)
        return self.step_taken(loss, (batch.labels >= 0).sum(), batch.positions, batch_idx)

    def _network_and_loss(
        self, images: Tensor, labels: Tensor, mixture: Mixture | None, stored: TeacherLogits | None
    ) -> Tensor:
        logits = self.model(images)
        loss = smoothed_cross_entropy(logits, labels, self._smoothing, mixture)
        if self._teaching is None:
            return loss
        by_teacher, answers = self._teaching.loss, self._answers(images, stored, logits.shape[1])
        return (1 - by_teacher.weight) * loss + by_teacher.weight * by_teacher(logits, answers, labels)

    def _answers(self, images: Tensor, stored: TeacherLogits | None, num_classes: int) -> Tensor:
        """float32 [N, num_classes]: logarithms of the teacher's probabilities, equal from it and from a store."""
        if stored is not None:
            return dense(stored, num_classes)
        assert self._teaching is not None and self._teaching.teacher is not None, "a teacher, or its logits"
        return self._teaching.teacher(images).float().log_softmax(dim=1)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.current_epoch < self._freeze_epochs:
            # Without a gradient SGD leaves a parameter and its momentum alone.
            for name, parameter in self.model.named_parameters():
                if not name.startswith("classifier."):
                    parameter.grad = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["teacher"] = self._teaching.name if self._teaching else None

    # -- validation ------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._score_sums = torch.zeros(2, 4, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        with torch.autocast(self.device.type, enabled=False):
            self._score_sums += self._scores(batch.images, batch.labels)

    def _networks_and_scores(self, images: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([score_sums(model(images), labels) for model in (self.model, self.ema.model)])

    def on_validation_epoch_end(self) -> None:
        figures: dict[str, float] = {}
        sums = self.trainer.strategy.reduce(self._score_sums, reduce_op="sum")
        for name, result in zip(("val", "ema"), map(scores, sums), strict=True):
            figures |= {f"{name}_loss": result.loss, f"{name}_top1": result.top1, f"{name}_top5": result.top5}
        self.end_epoch(figures)


def smoothed_cross_entropy(logits: Tensor, labels: Tensor, smoothing: float, mixture: Mixture | None = None) -> Tensor:
    """Mean cross-entropy over the rows whose label is not -1; zero where no row is left.

    logits: float [N, C]; labels: int64 [N]; the target is `1 - smoothing` on the label plus `smoothing` spread evenly
    over all classes (Szegedy et al., arXiv 1512.00567, section 7). mixture: what was mixed into the images, whose
    labels then share the first part of the target.
    """
    logits = full_precision(logits)
    options: dict[str, Any] = {"ignore_index": -1, "label_smoothing": smoothing}
    if mixture is None:
        total = F.cross_entropy(logits, labels, reduction="sum", **options)
    else:
        own, other = (F.cross_entropy(logits, each, reduction="none", **options) for each in (labels, mixture.labels))
        total = (mixture.shares * own + (1 - mixture.shares) * other).sum()
    return total / (labels >= 0).sum().clamp(min=1)
