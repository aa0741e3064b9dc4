"""Top-1, Top-5 and loss of a model and of its fused twin over the validation images, and how far the two differ."""

from typing import Any

import pytorch_lightning as pl
import torch

from repghost.classifier import Batch
from repghost.errors import UserError
from repghost.metrics import score_sums, scores
from repghost.model import RepGhostNet
from repghost.reparameterize import reparameterize


class Evaluation(pl.LightningModule):
    """Evaluates `model` and `reparameterize(model)` side by side, in float32 whatever the trainer's precision."""

    def __init__(self, model: RepGhostNet) -> None:
        super().__init__()
        self.model = model.eval()
        self.fused = reparameterize(model)

    def on_validation_epoch_start(self) -> None:
        self._sums = torch.zeros(2, 4, dtype=torch.float64, device=self.device)  # unfused, fused
        self._flips = torch.zeros((), dtype=torch.int64, device=self.device)
        self._extremes = torch.zeros(2, device=self.device)  # largest difference, largest logit

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels, _ = batch
        with torch.autocast(self.device.type, enabled=False):
            logits, fused = self.model(images), self.fused(images)
        self._sums += torch.stack([score_sums(logits, labels), score_sums(fused, labels)])
        counted = (labels >= 0)[:, None]
        self._flips += ((logits.argmax(1) != fused.argmax(1)) & counted[:, 0]).sum()
        extremes = torch.stack([((logits - fused).abs() * counted).max(), (logits.abs() * counted).max()])
        self._extremes = torch.maximum(self._extremes, extremes)

    def on_validation_epoch_end(self) -> None:
        reduce = self.trainer.strategy.reduce
        self._sums, self._flips = reduce(self._sums, reduce_op="sum"), reduce(self._flips, reduce_op="sum")
        self._extremes = reduce(self._extremes, reduce_op="max")

    def results(self) -> dict[str, Any]:
        """The figures of `evaluation.json`; accuracies in percent."""
        unfused, fused = (scores(s) for s in self._sums)
        difference, largest = self._extremes.tolist()
        return {
            "images": unfused.images,
            "top1": unfused.top1,
            "top5": unfused.top5,
            "loss": unfused.loss,
            "fused": {
                "top1": fused.top1,
                "top5": fused.top5,
                "loss": fused.loss,
                "max_abs_logit_diff": difference,
                "max_rel_logit_diff": difference / largest,
                "top1_flips": int(self._flips),
            },
        }


def evaluate(
    trainer: pl.Trainer, model: RepGhostNet, data: pl.LightningDataModule, expected_images: int
) -> dict[str, Any]:
    """Evaluates `model` on the validation images of `data` with the devices of `trainer`.

    Raises UserError when not every image was counted exactly once.
    """
    evaluation = Evaluation(model)
    trainer.validate(evaluation, datamodule=data, verbose=False)
    results = evaluation.results()
    if results["images"] != expected_images:
        raise UserError(f"evaluated {results['images']} images, but the data set has {expected_images}")
    return results
