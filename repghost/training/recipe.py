"""A recipe: its values for the training step, and how far a run is from the paper's.

Check: `pytest tests/test_recipe.py tests/test_classifier.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

import pytorch_lightning as pl
from omegaconf import DictConfig, OmegaConf

from repghost.dataset import DataModule
from repghost.errors import UserError, print_rank_zero
from repghost.model import RepGhostNet, count_macs, count_parameters
from repghost.run import flat, resolve_recipe
from repghost.training.schedule import learning_rate, linear_scale

BATCHNORM_BATCH = 128  # images per device in the official runs, whose BatchNorm statistics were each device's own


@dataclass(frozen=True)
class Recipe:
    """The keys of `recipe` that the training step reads, with the types that they have there.

    The three learning rates are stated for batches of `reference_batch_size` and scaled to the global batch size. Of
    `ema_decay` and `ema_span`, the average's memory as a share of the steps of a run, one is given.
    """

    learning_rate: float
    start_learning_rate: float
    final_learning_rate: float
    reference_batch_size: int
    warmup_epochs: int
    momentum: float
    weight_decay: float
    label_smoothing: float
    ema_decay: float | None
    ema_span: float | None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """The recipe in the `recipe` block of a run's config. Raises UserError for an impossible value, by its key."""
        recipe = cls(**{field.name: config[field.name] for field in fields(cls)})
        decay, span = recipe.ema_decay, recipe.ema_span
        if (decay is None) == (span is None):
            raise UserError(f"recipe.ema_decay={decay}, recipe.ema_span={span}: give one, and null for the other")
        for key in ("momentum", "label_smoothing", "ema_decay"):
            if config[key] is not None and not 0 <= config[key] < 1:
                raise UserError(f"recipe.{key}={config[key]} is not in [0, 1)")
        for key in ("learning_rate", "ema_span"):
            if config[key] is not None and config[key] <= 0:
                raise UserError(f"recipe.{key}={config[key]} has to be more than 0")
        if recipe.weight_decay < 0:
            raise UserError(f"recipe.weight_decay={recipe.weight_decay} has to be 0 or more")
        return recipe

    def rate(self, epoch: int, *, epochs: int, batch_size: int) -> float:
        """The learning rate of `epoch`, counted from 0, in a run of `epochs` epochs at the global `batch_size`."""
        ratio = {"batch_size": batch_size, "reference_batch_size": self.reference_batch_size}
        return learning_rate(
            epoch,
            epochs=epochs,
            peak=linear_scale(self.learning_rate, **ratio),
            start=linear_scale(self.start_learning_rate, **ratio),
            final=linear_scale(self.final_learning_rate, **ratio),
            warmup_epochs=self.warmup_epochs,
        )

    def decay(self, steps: int) -> float:
        """The decay of the weight average in a run of `steps` steps."""
        if self.ema_span is not None:
            return max(0.0, 1 - 1 / (self.ema_span * steps))
        assert self.ema_decay is not None
        return self.ema_decay


def deviations(config: DictConfig, paper: Any, ranks: int, precision: str) -> list[str]:
    """In words, every value of a resolved run that is not the paper's.

    paper: the content of conf/recipe/paper.yaml. precision: Lightning's name of the one in use.
    """
    paper = paper.copy()
    paper.width = config.width
    resolve_recipe(paper)
    found = [
        f"{key} {config[key]} instead of {paper[key]}"
        for key in ("epochs", "batch_size", "image_size")
        if config[key] != paper[key]
    ]
    mine, theirs = flat(config.recipe, "recipe."), flat(paper.recipe, "recipe.")
    for key in sorted((mine.keys() | theirs.keys()) - {"recipe.name"}):
        if mine.get(key) != theirs.get(key):
            found.append(f"{key} {mine.get(key)} instead of {theirs.get(key)}")
    if (per_device := config.batch_size // ranks // config.accumulate) != BATCHNORM_BATCH:
        found.append(f"BatchNorm over {per_device} images per device instead of {BATCHNORM_BATCH}")
    if precision == "32-true":
        found.append("precision float32 instead of mixed")
    if ranks > 1:
        found.append("BatchNorm statistics averaged over the devices")
    if config.weights:
        found.append(f"starts from {config.weights}")
    return found


def describe(
    config: DictConfig, paper: Path, trainer: pl.Trainer, data: DataModule, model: RepGhostNet, official: bool
) -> None:
    """Prints what is about to be trained, on what, and in what it deviates from the recipe in the file `paper`."""
    recipe, ranks = config.recipe, trainer.world_size
    rate = linear_scale(
        recipe.learning_rate, batch_size=config.batch_size, reference_batch_size=recipe.reference_batch_size
    )
    params, macs = count_parameters(model) / 1e6, count_macs(model, config.image_size) / 1e6
    train, val = data.counts
    differences = deviations(config, OmegaConf.load(paper), ranks, str(trainer.precision))
    print_rank_zero(
        f"run        {Path(config.output) / config.name}\n"
        f"network    RepGhostNet {config.width:g}x, {params:.2f}M parameters, {macs:.1f}M multiply-accumulates "
        f"at {config.image_size} pixels\n"
        f"data       {train:,} training and {val:,} validation images in {data.num_classes} classes\n"
        f"recipe     {recipe.name}: {config.epochs} epochs, global batch {config.batch_size} on {ranks} device(s), "
        f"precision {trainer.precision}\n"
        f"rate       {recipe.learning_rate:g} at batch {recipe.reference_batch_size}, scaled linearly to {rate:g} "
        f"at batch {config.batch_size}\n"
        f"paper      {f'{chr(10)}           '.join(differences) or 'as in the paper'}\n"
        + (
            "official   every epoch is compared with the official run of this width"
            if official
            else "official   no run to compare with: those are of the published widths, on ImageNet, for 300 epochs"
        )
    )
