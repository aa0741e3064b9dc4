"""DetectorTraining: what a training step and a validation of a detector are, and what is printed of a run at its start.

Raw and averaged weights are validated side by side in float32, by COCO's figures for all images of all ranks.
Check: `pytest tests/test_detection_training.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor, nn

from repghost.dataset import DataModule, DetectionBatch, DetectionIndex
from repghost.detection.detections import Detections
from repghost.detection.figures import Truth
from repghost.errors import UserError, print_rank_zero
from repghost.model import count_parameters
from repghost.reference import Row
from repghost.training.module import TrainingModule
from repghost.training.schedule import linear_scale, step_learning_rate
from repghost.weights import start_from

WITH_MASKS = "mask_rcnn"
ONE_STAGE = ("retinanet", "fcos", "ssdlite")
# The columns of metrics.csv, of those figures that the detector has.
_VALIDATED = ("map", "map50", "mask_map", "mask_map50")


class DetectorTraining(TrainingModule):
    """Trains one of torchvision's detectors.

    detector, width: its name and the width of its backbone. classes: without the background. The other arguments are
    those of TrainingModule.
    """

    metric, nesterov, fused_on_cpu = "map", False, True

    def __init__(
        self, model: nn.Module, recipe: Mapping[str, Any], *, detector: str, width: float, classes: int, **run: int
    ) -> None:
        super().__init__(model, recipe, identity={"detector": detector, "width": width, "classes": classes}, **run)
        self._steps_per_epoch = run["steps_per_epoch"]
        self._peak = peak_rate(recipe, detector, run["batch_size"])
        self._truth: Truth | None = None
        self._found: list[list[Detections]] = []  # of the raw and of the averaged weights

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step of the run, counted from 0."""
        steps = self._steps_per_epoch
        return step_learning_rate(self._recipe, step, epochs=self._epochs, steps_per_epoch=steps, peak=self._peak)

    def epoch_learning_rate(self, epoch: int) -> float:
        return self.learning_rate((epoch + 1) * self._steps_per_epoch - 1)

    def epoch_words(self, row: Mapping[str, float]) -> str:
        kinds = {"box mAP": "map", "mask mAP": "mask_map"}
        of = {kind: key for kind, key in kinds.items() if f"val_{key}" in row}
        return "  ".join(f"{kind} raw {row[f'val_{key}']:.3f}  EMA {row[f'ema_{key}']:.3f}" for kind, key in of.items())

    # -- training --------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        super().on_fit_start()
        synchronized = any(isinstance(module, nn.SyncBatchNorm) for module in self.model.modules())
        if synchronized and self.trainer.world_size > 1 and self.device.type != "cuda":
            raise UserError("detector.norm=synchronized: only GPUs can: give detector.norm=trained, or trainer=gpu")

    def on_train_batch_start(self, batch: DetectionBatch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        step = batch_idx // self.trainer.accumulate_grad_batches
        self.set_learning_rate(self.learning_rate(self.current_epoch * self._steps_per_epoch + step))

    def training_step(self, batch: DetectionBatch, batch_idx: int) -> Tensor:
        losses = self.model(batch.images, batch.targets)
        loss = torch.stack([loss.float() for loss in losses.values()]).sum()
        return self.step_taken(loss, (batch.positions >= 0).sum(), batch.positions, batch_idx)

    # -- validation ------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        super().on_validation_epoch_start()
        self._found = [[], []]

    def validation_step(self, batch: DetectionBatch, batch_idx: int) -> None:
        with torch.autocast(self.device.type, enabled=False):
            for model, found in zip((self.model, self.ema.model), self._found, strict=True):
                found.append(Detections.of(model(batch.images), batch.positions))

    def on_validation_epoch_end(self) -> None:
        trainer: Any = self.trainer
        joined = [Detections.joined(found) for found in self._found]
        figures: dict[str, float] = {}
        index: DetectionIndex = trainer.datamodule.index("val")
        for name, detections in zip(("val", "ema"), joined, strict=True):
            if detections is not None:
                detections.require_all(len(index))
                self._truth = self._truth or Truth(index.annotations(), index.category_ids)
                found = self._truth.figures(detections, self._run["detector"] == WITH_MASKS)
                figures |= {f"{name}_{key}": found[key] for key in _VALIDATED if key in found}
        self._found = []
        self.end_epoch(trainer.strategy.broadcast(figures))


def prepare(config: DictConfig, trainer: pl.Trainer, data: Any) -> tuple[TrainingModule, dict[int, Row] | None]:
    """The module that trains a run's detector, with its initial weights; there is no official run to compare it with.

    data: the run's data module, loaded for training. Prints what is about to be trained.
    """
    model = instantiate(config.detector)(num_classes=data.num_classes)
    if config.weights:
        start_from(model.backbone.body, config.weights)
    steps = data.steps_per_epoch
    module = instantiate(config.module)(model, config.recipe, steps_per_epoch=steps, classes=data.num_classes)
    describe(config, trainer, data, model)
    return module, None


def peak_rate(recipe: Mapping[str, Any], detector: str, batch_size: int) -> float:
    """The highest learning rate of a detector's run."""
    rate = recipe["learning_rate"] * (recipe["one_stage_factor"] if detector in ONE_STAGE else 1)
    return linear_scale(rate, batch_size=batch_size, reference_batch_size=recipe["reference_batch_size"])


def describe(config: DictConfig, trainer: pl.Trainer, data: DataModule, model: nn.Module) -> None:
    """Prints what is about to be trained, and on what."""
    recipe, detector = config.recipe, config.detector
    parameters, (train, val) = count_parameters(model), data.counts
    rate = peak_rate(recipe, detector.name, config.batch_size)
    start = f"from {config.weights}" if config.weights else "from random weights"
    print_rank_zero(
        f"run        {Path(config.output) / config.name}\n"
        f"network    {detector.name} on RepGhostNet {config.width:g}x, {parameters / 1e6:.2f}M parameters, "
        f"images of {' x '.join(map(str, detector.image_size))} pixels\n"
        f"data       {train:,} training and {val:,} validation images, {data.num_classes} classes of objects\n"
        f"recipe     {recipe.name}: {config.epochs} epochs, global batch {config.batch_size} on {trainer.world_size} "
        f"device(s), precision {trainer.precision}\n"
        f"backbone   {start}, {detector.trainable_layers} of 5 layers learn, BatchNorm {detector.norm}\n"
        f"rate       {rate:g} after {recipe.warmup_steps} steps of warm-up"
    )
