"""The keys of a recipe (conf/recipe): see repghost/schema/keys.py. Check: `pytest tests/test_schema.py`."""

from typing import Annotated, Literal

from pydantic import Field

from repghost.schema.keys import Built, SGDRecipe
from repghost.schema.values import (
    Colour,
    Count,
    ImageSize,
    Mean,
    NotNegative,
    Part,
    Path,
    Positive,
    Positives,
    Share,
    ShareBelowOne,
    Shares,
    Std,
    key,
)


class Jitter(Part):
    brightness: Annotated[float, Field(ge=0, le=10)] = key("factors are uniform in [1 - brightness, 1 + brightness]")
    contrast: Annotated[float, Field(ge=0, le=10)] = key("factors are uniform in [1 - contrast, 1 + contrast]")
    saturation: Annotated[float, Field(ge=0, le=10)] = key("factors are uniform in [1 - saturation, 1 + saturation]")


class RandAugment(Part):
    operations: Annotated[int, Field(ge=0, le=2)] = key("how many are drawn for an image")
    magnitude: Annotated[float, Field(ge=0, le=10)] = key("mean level of an operation")
    magnitude_std: Annotated[float, Field(ge=0, le=10)] = key("standard deviation of the level")
    probability: Share = key("that a drawn operation is applied")
    fill: Colour = key("colour of what a rotation or a shift uncovers")


class Erase(Part):
    probability: Share = key("that a rectangle of the image is replaced by noise")
    area: Shares = key("range of the rectangle's share of the image")
    aspect: Positives = key("range of the rectangle's height / width")


class Augment(Built):
    """`recipe.augment`."""

    flip: Share = key("probability of a horizontal flip")
    jitter: Jitter | None = key("colour jitter of the narrower networks; null: none")
    rand_augment: RandAugment | None = key("RandAugment of the wider networks (arXiv 1909.13719); null: none")
    erase: Erase | None = key("random erasing (arXiv 1708.04896); null: none")
    mean: Mean = key("mean of each channel, of pixels in [0, 1]")
    std: Std = key("standard deviation of each channel, of pixels in [0, 1]")


class Mix(Part):
    """`recipe.mix`."""

    mixup: NotNegative = key("a of Beta(a, a), from which the share of each image is drawn (arXiv 1710.09412); 0: off")
    cutmix: NotNegative = key("a of Beta(a, a), from which a rectangle's area is drawn (arXiv 1905.04899); 0: off")
    probability: Share = key("that a pair of images is mixed")
    cutmix_share: Share = key("of the mixed pairs that CutMix gets, where mixup and CutMix are both on")


class Recipe(SGDRecipe):
    """`recipe` of conf/recipe."""

    learning_rate: Positive = key("the highest, for reference_batch_size, scaled linearly to batch_size")
    start_learning_rate: NotNegative = key("of the first epoch of the warm-up, scaled likewise")
    final_learning_rate: NotNegative = key("that the cosine ends with, scaled likewise")
    warmup_epochs: Annotated[int, Field(ge=0)] = key("epochs of linear warm-up, at most epochs")
    label_smoothing: ShareBelowOne = key("share of the target that is spread over all classes")
    dropout: ShareBelowOne = key("before the classifier")
    teacher_loss: Literal["soft", "hard"] = key(
        "what is learned from a teacher: soft: its probabilities (arXiv 1503.02531); hard: its most probable class"
    )
    teacher_weight: Share = key("share of the loss that is the teacher's; the labels have the rest")
    teacher_temperature: Positive = key("by which the logits of both are divided in the soft loss")
    teacher_image_size: ImageSize | None = key("side of the images that teacher= gets; null: that of its training")
    teacher_logits: Path | None = key("folder that `python -m repghost.teach` wrote, instead of teacher=")
    start_image_size: Annotated[int, Field(ge=32, le=2048, multiple_of=32)] | None = key(
        "side of the images of the first epoch, which then grow in steps of 32 pixels; null: all epochs have one size",
        json_schema_extra={"words": "a multiple of 32 from 32 on, or null"},
    )
    full_size_epochs: Annotated[int, Field(ge=0)] = key("last epochs, of the images' full size, with start_image_size")
    cycle_epochs: Count | None = key("epochs after which order and crops of the images repeat; null: never")
    mix: Mix
    quantization_aware: bool = key(
        "whether the fused network of weights= learns, its classifier too, with every layer rounded as INT8 rounds it"
    )
    scale: Shares = key("share of the image's area that a random crop takes")
    ratio: Positives = key("aspect of a random crop")
    rand_augment_from_width: NotNegative | None = key(
        "networks of this width or wider get recipe.augment.rand_augment, others the jitter; null: all get the jitter"
    )
    augment: Augment
