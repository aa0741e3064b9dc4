"""What a recipe means for one width, and how far a run is from the paper's."""

from typing import Any

from omegaconf import DictConfig

from repghost.run import flat

BATCHNORM_BATCH = 128  # images per device in the official runs, whose BatchNorm statistics were each device's own


def resolve_recipe(config: DictConfig) -> None:
    """Leaves the one colour augmentation that the recipe gives to `config.width`, in place.

    Networks of `recipe.rand_augment_from_width` or wider get RandAugment, the others the jitter; null: every width the
    jitter. The paper draws the line between 1.11 and 1.3.
    """
    threshold = config.recipe.rand_augment_from_width
    wide = threshold is not None and config.width >= threshold
    config.recipe.augment["jitter" if wide else "rand_augment"] = None


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
