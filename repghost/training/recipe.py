"""A training of a classifier before its first step: how far it is from the paper's recipe, and what it prints of it.

Check: `pytest tests/test_recipe.py tests/test_classifier.py`.
"""

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from repghost.command_line import CONF
from repghost.dataset import DataModule
from repghost.distillation.teaching import open_teaching
from repghost.errors import print_rank_zero
from repghost.model import RepGhostNet, count_macs, count_parameters
from repghost.reference import Row, reference_curve
from repghost.run import flat, resolve_recipe
from repghost.schema.check import shown
from repghost.training.module import TrainingModule
from repghost.training.schedule import linear_scale
from repghost.training.trainer import compiles, keep_compiled
from repghost.weights import start_from, to_quantize

_SET_BY_RECIPES = ("epochs", "batch_size", "image_size", "train_image_size")  # beside the block `recipe`
BATCHNORM_BATCH = 128  # images per device in the official runs, whose BatchNorm statistics were each device's own


def prepare(config: DictConfig, trainer: pl.Trainer, data: Any) -> tuple[TrainingModule, dict[int, Row] | None]:
    """The module that trains a run's classifier, with its initial weights, and the official run to compare it with.

    data: the run's data module, loaded for training. Prints what is about to be trained.
    """
    if config.recipe.quantization_aware:
        model = to_quantize(config.weights, config.width, data.num_classes)
        model.dropout.p = config.recipe.dropout
    else:
        model = instantiate(config.model, num_classes=data.num_classes)
        if config.weights:
            start_from(model, config.weights)
    data.augment.match_step(trainer.strategy.root_device, trainer.precision, config.channels_last)
    if compiles(config.compile, trainer.strategy.root_device):
        keep_compiled(Path(config.data.cache) / "compiled")
        often = "once for each size of the images" if len(data.sizes.all()) > 1 else "once"
        print_rank_zero(f"compile    the first batches take a minute or two, in which the step is compiled, {often}")
        data.augment.compile()
    teaching = open_teaching(config, data, trainer.strategy.root_device)
    classifier = instantiate(config.classifier)(
        model, config.recipe, steps_per_epoch=data.steps_per_epoch, teaching=teaching
    )
    official = reference_curve(config.width, config.epochs, data.counts)
    describe(config, CONF / "recipe" / "paper.yaml", trainer, data, model, official is not None)
    if len(sizes := data.sizes.all()) > 1:
        print_rank_zero(f"images     grow: {', '.join(map(str, sizes))} pixels")
    if teaching:
        print_rank_zero(f"teacher    {teaching}")
    return classifier, official


def deviations(config: DictConfig, paper: Any, ranks: int, precision: str) -> list[str]:
    """In words, every value of a resolved run that is not the paper's.

    paper: the content of conf/recipe/paper.yaml. precision: Lightning's name of the one in use.
    """
    paper = paper.copy()
    paper.width = config.width
    resolve_recipe(paper)
    mine, theirs = ({key: c[key] for key in _SET_BY_RECIPES} | flat(c.recipe, "recipe.") for c in (config, paper))
    found = [
        f"{key} {shown(mine.get(key))} instead of {shown(theirs.get(key))}"
        for key in (*_SET_BY_RECIPES, *sorted((mine.keys() | theirs.keys()) - {*_SET_BY_RECIPES, "recipe.name"}))
        if mine.get(key) != theirs.get(key)
    ]
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
    recipe, ranks, reference = config.recipe, trainer.world_size, config.recipe.reference_batch_size
    rate = linear_scale(recipe.learning_rate, batch_size=config.batch_size, reference_batch_size=reference)
    compared = "no run to compare with: those are of the published widths, on ImageNet, for 300 epochs"
    if official:
        compared = "every epoch is compared with the official run of this width"
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
        f"rate       {recipe.learning_rate:g} at batch {reference}, scaled linearly to {rate:g} "
        f"at batch {config.batch_size}\n"
        f"paper      {f'{chr(10)}           '.join(differences) or 'as in the paper'}\n"
        f"official   {compared}"
    )
