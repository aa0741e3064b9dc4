"""The keys of a training and of an evaluation of a classifier, and of repghost.teach: see repghost/schema/keys.py.

Check: `pytest tests/test_schema.py`.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationInfo, model_validator

from repghost.schema.keys import Built, BuiltLater, Evaluation, Shards, Training
from repghost.schema.recipe import Recipe
from repghost.schema.values import (
    Count,
    ImageSize,
    Loader,
    Mean,
    Path,
    Processes,
    Report,
    Share,
    ShareAboveZero,
    Std,
    Width,
    key,
)


class ImageShards(Shards):
    """conf/data/imagenet.yaml, which every data set builds on."""

    train: Path | None = key("training shards of others: a glob or name-{0000..0063}.tar, in data.root")
    val: Path | None = key("validation shards of others: a glob or name-{0000..0063}.tar, in data.root")
    class_names: Path | None = key("text file with a class name a line, for shards of others")
    readers: Processes = key("processes of a rank that read for dali; 0: a thread does; auto: 1 or 2 on a GPU, else 0")
    hw_decoder_load: Share = key("dali on a GPU: share of a batch that its JPEG decoder takes, where it has one")
    thread_affinity: bool = key("dali on a GPU: keep the threads that decode on the cores of its socket")
    crop_fraction: ShareAboveZero = key("centre crop of evaluation, as a share of the resized image's shorter side")


class TrainingData(ImageShards):
    """`data` of conf/train.yaml."""

    skip_budget: Share = key("share of the training images that may be damaged in an epoch; validation has none")
    mix: Built


class Normalization(Built):
    """`data.augment` of conf/evaluate.yaml."""

    mean: Mean = key("mean of each channel, of pixels in [0, 1]; with run= the run's")
    std: Std = key("standard deviation of each channel, of pixels in [0, 1]; with run= the run's")


class EvaluationData(ImageShards):
    augment: Normalization


class Train(Training):
    """conf/train.yaml."""

    task: Literal["classification"] = key("what is trained", json_schema_extra={"words": "classification or detection"})
    width: Width = key("width multiplier: 0.5, 0.58, 0.8, 1.0, 1.11, 1.3, 1.5 and 2.0 are published")
    weights: Path | None = key(
        "what to start from (the classifier by recipe=qat alone): timm, official:FILE, a file or a folder"
    )
    teacher: Path | None = key(
        "to learn from in every step: timm:NAME, timm:NAME@FILE, a run's folder or a file of this project's weights"
    )
    freeze_epochs: Annotated[int, Field(ge=0)] = key("epochs in which only the classifier learns, at most epochs")
    loader: Loader
    channels_last: bool = key("memory format of images and weights")
    compile: Literal["auto"] | bool = key(
        "torch.compile training step and validation, which takes minutes, once; auto: on GPUs"
    )
    compile_mode: Literal["default", "reduce-overhead"] = key(
        "reduce-overhead: the compiled step as CUDA graphs, for GPUs that wait for the host; takes more memory"
    )
    data: TrainingData
    model: Built
    classifier: BuiltLater
    image_size: ImageSize = key("side of the square that the network sees, in pixels")
    train_image_size: ImageSize | None = key("the same in training only; null: image_size")
    recipe: Recipe

    @model_validator(mode="after")
    def _fit(self, info: ValidationInfo) -> Self:
        """Context: the keys on the command line. A recipe's own warm-up may be longer than a run that was cut short."""
        epochs, recipe = self.epochs, self.recipe
        for name, value in (("recipe.warmup_epochs", recipe.warmup_epochs), ("freeze_epochs", self.freeze_epochs)):
            if name in (info.context or ()) and value > epochs:
                raise ValueError(f"{name}={value}: give at most epochs={epochs}")
        if self.freeze_epochs and self.weights is None:
            frozen = f"freeze_epochs={self.freeze_epochs}: there is nothing learned to freeze without weights"
            raise ValueError(f"{frozen}: give weights=timm or weights=FILE")
        if recipe.quantization_aware and self.weights is None:
            raise ValueError("recipe.quantization_aware: rounding is for a trained network: give weights=outputs/NAME")
        if self.accumulate > 1 and self.compile_mode == "reduce-overhead":
            raise ValueError(
                f"accumulate={self.accumulate}: CUDA graphs overwrite the gradients that it adds up: "
                "give compile_mode=default"
            )
        return self

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        recipe, full = self.recipe, self.train_image_size or self.image_size
        start, at_full_size = recipe.start_image_size, recipe.full_size_epochs
        if start is None and at_full_size:
            raise ValueError(
                f"recipe.full_size_epochs={at_full_size}: is for recipe.start_image_size=PIXELS, give both"
            )
        if start is None:
            return self
        if not full - 6 * 32 <= start <= full:
            raise ValueError(
                f"recipe.start_image_size={start}: give at most the full size, {full}, and at least {full - 192}, "
                "since the step is compiled for every size"
            )
        if at_full_size > self.epochs:
            raise ValueError(f"recipe.full_size_epochs={at_full_size}: give at most epochs={self.epochs}")
        if recipe.cycle_epochs:
            raise ValueError("recipe.cycle_epochs: images that grow do not repeat: leave recipe.start_image_size out")
        return self

    @model_validator(mode="after")
    def _taught(self) -> Self:
        weight, logits = self.recipe.teacher_weight, self.recipe.teacher_logits
        if self.teacher and logits:
            raise ValueError(f"teacher={self.teacher}: recipe.teacher_logits are another teacher: give one of them")
        if weight and not (self.teacher or logits):
            raise ValueError(
                f"recipe.teacher_weight={weight:g}: give teacher=..., too, or recipe.teacher_logits=FOLDER"
            )
        if (self.teacher or logits) and not weight:
            raise ValueError("recipe.teacher_weight=0: nothing is learned from a teacher: give recipe=distill")
        return self


class Teach(Train):
    """conf/teach.yaml."""

    out: Path = key("folder of the logits")
    top: Count = key("most probable classes that are stored of each image, at most all")
    dtype: Literal["float16", "float32"] = key("of the stored logits")

    @model_validator(mode="after")
    def _taught(self) -> Self:
        if self.teacher is None or self.recipe.teacher_logits:
            raise ValueError("teacher is missing: give teacher=timm:NAME, a run's folder or a file of weights")
        if (self.recipe.cycle_epochs or self.epochs) < self.epochs:
            raise ValueError(f"epochs={self.epochs}: give at most recipe.cycle_epochs={self.recipe.cycle_epochs}")
        return self


class Evaluate(Evaluation):
    """conf/evaluate.yaml."""

    run: Path | None = key("a run's folder: its averaged weights, and its data and preprocessing unless given here")
    weights: Path | None = key("instead of run: timm (published), official:FILE, a file of any form, or a folder")
    width: Width = key("width multiplier of weights that do not say it themselves")
    image_size: ImageSize = key("side of the square that the network sees, in pixels")
    loader: Loader
    report: Report | Annotated[list[Report], Field(min_length=1)] | None = key(
        "files in the run's folder, or beside results: classes and predictions are CSV, confusion and worst pictures",
        json_schema_extra={"words": "one of classes, predictions, confusion, worst, null, or several: [classes,worst]"},
    )
    test_set: Literal["imagenet_v2", "imagenet_real", "imagenet_a", "imagenet_r", "imagenet_sketch"] | None = key(
        "how labels count; set by data=imagenet_v2 and its siblings"
    )
    real_labels: Path | None = key("ReaL's real.json, for data=imagenet_real")
    data: EvaluationData
    recipe: Any = Field(None, json_schema_extra={"unread": True})  # what a data set says of training

    @model_validator(mode="after")
    def _together(self) -> Self:
        if (self.run is None) == (self.weights is None):
            raise ValueError("give either run=outputs/NAME or weights=timm, weights=FILE")
        return self
