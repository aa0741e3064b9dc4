"""What a recipe means for one width."""

from omegaconf import DictConfig


def resolve_recipe(config: DictConfig) -> None:
    """Leaves the one colour augmentation that the recipe gives to `config.width`, in place.

    Networks of `recipe.rand_augment_from_width` or wider get RandAugment, the others the jitter; null: every width the
    jitter. The paper draws the line between 1.11 and 1.3.
    """
    threshold = config.recipe.rand_augment_from_width
    wide = threshold is not None and config.width >= threshold
    config.recipe.augment["jitter" if wide else "rand_augment"] = None
