"""Every file of conf/ with every width composes and builds; every recipe gives each width its own augmentation."""

from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from repghost.model import WIDTHS
from repghost.reference import IMAGENET_MEAN, IMAGENET_STD
from repghost.run import resolve_recipe

pytestmark = pytest.mark.usefixtures("few_blocks")

CONF = Path(__file__).parents[1] / "conf"
CHOICES = {group.name: sorted(p.stem for p in group.glob("*.yaml")) for group in CONF.iterdir() if group.is_dir()}
OF_DETECTION = {
    "recipe": ["coco_1x", "quick_detection", "ssdlite_320"],
    "data": ["coco", "digits_scenes"],
    "detector": CHOICES.pop("detector"),
}
for group, names in OF_DETECTION.items():
    CHOICES[group] = [name for name in CHOICES.get(group, ()) if name not in names]


def composed(*overrides: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(
            "train", ["data.root=x", "name=x", *overrides] if "data=digits" not in overrides else [*overrides]
        )
    resolve_recipe(config)
    OmegaConf.resolve(config)
    return config


def build(config: Any, tmp_path: Path) -> None:
    """Everything of a run but the data itself."""
    trainer = instantiate(config.trainer)(directory=tmp_path)
    assert trainer.max_epochs == config.epochs
    instantiate(config.data.augment)
    model = instantiate(config.model, num_classes=7)
    classifier = instantiate(config.classifier)(model, config.recipe, steps_per_epoch=3)
    assert classifier.configure_optimizers().param_groups[0]["lr"] > 0
    if config.logger:
        instantiate(config.logger, save_dir=str(tmp_path), name="x")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("recipe", CHOICES["recipe"])
def test_every_recipe_builds_at_every_width(recipe: str, width: float, tmp_path: Path) -> None:
    config = composed(f"recipe={recipe}", f"width={width}", "trainer=cpu")
    build(config, tmp_path)
    augment = config.data.augment
    assert (augment.rand_augment is None) == (width < 1.2) and (augment.jitter is None) == (width > 1.2)


@pytest.mark.parametrize("choice", [f"{group}={name}" for group, names in CHOICES.items() for name in names])
def test_every_file_composes_and_builds(choice: str, tmp_path: Path) -> None:
    offline = ["logger.offline=true"] if choice == "logger=wandb" else []
    others = [] if choice.startswith("trainer=") else ["trainer=cpu"]
    if choice == "data=digits":
        offline = [f"data.cache={tmp_path}"]
    config = composed(choice, *offline, *others)
    if choice == "trainer=gpu":
        assert config.trainer.accelerator == "gpu"  # building it needs one
    else:
        build(config, tmp_path)


@pytest.mark.parametrize("choice", [f"{group}={name}" for group, names in OF_DETECTION.items() for name in names])
def test_every_file_of_detection_composes_and_builds(choice: str, tmp_path: Path) -> None:
    root = [f"data.cache={tmp_path}"] if choice == "data=digits_scenes" else ["data.root=x"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train_detection", ["name=x", "width=0.1", "trainer=cpu", choice, *root])
    OmegaConf.resolve(config)
    assert config.task == "detection"
    instantiate(config.data.augment)
    model = instantiate(config.detector)(num_classes=7)
    module = instantiate(config.module)(model, config.recipe, steps_per_epoch=3, classes=7)
    assert module.configure_optimizers().param_groups[0]["lr"] > 0


def test_the_paper_recipe_is_the_paper_s() -> None:
    config = composed()
    assert (config.epochs, config.batch_size, config.image_size) == (300, 1024, 224)
    recipe = config.recipe
    assert (recipe.learning_rate, recipe.momentum, recipe.weight_decay) == (0.6, 0.9, 1e-5)
    assert (recipe.label_smoothing, recipe.dropout, recipe.ema_decay) == (0.1, 0.2, 0.9999)
    assert config.data.crop_fraction * 256 == config.image_size


def test_the_normalization_is_imagenet_s() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        evaluation = compose("evaluate", ["data.root=x"]).data.augment
    for augment in (composed().recipe.augment, evaluation):
        assert (tuple(augment.mean), tuple(augment.std)) == (IMAGENET_MEAN, IMAGENET_STD)
