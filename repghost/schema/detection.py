"""The keys of a training and of an evaluation with task=detection: see repghost/schema/keys.py.

Check: `pytest tests/test_schema.py tests/test_detection_training.py`.
"""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from repghost.schema.keys import Built, BuiltLater, Evaluation, SGDRecipe, Shards, Training
from repghost.schema.values import (
    PAIR,
    Convert,
    Count,
    Path,
    Positive,
    Share,
    ShareAboveZero,
    Shares,
    Width,
    ascending,
    key,
)

DetectionReport = Literal["classes", "predictions", "pictures"]
_Scales = Annotated[list[Annotated[float, Field(ge=0.1, le=4)]], AfterValidator(ascending), Field(**PAIR)]
_Sizes = Annotated[
    list[Annotated[int, Field(ge=32, le=4096)]], AfterValidator(ascending), Field(min_length=1, max_length=2)
]


class BoxAugment(Built):
    """`recipe.augment`."""

    flip: Share = key("probability of a horizontal flip")
    scale: _Scales = key("range of the factor by which an image is enlarged or reduced within its size; [1,1]: none")
    crop: Shares = key("range of the sides of a random window as shares of the image's; [1,1]: the whole image")
    min_visible: Share = key("objects of whose box a crop leaves less are left out")


class DetectionRecipe(SGDRecipe):
    """`recipe` of the recipes for detectors."""

    learning_rate: Positive = key("of two-stage detectors, for reference_batch_size, scaled linearly to batch_size")
    one_stage_factor: Positive = key("times learning_rate is that of retinanet, fcos and ssdlite")
    warmup_steps: Annotated[int, Field(ge=0)] = key("steps of linear warm-up")
    warmup_factor: ShareAboveZero = key("share of the learning rate that the warm-up begins with")
    schedule: Literal["steps", "cosine"] = key("steps: times decay after each milestone; cosine: down to 0")
    milestones: Annotated[list[Count], Field(min_length=1)] | None = key(
        "schedule=steps: epochs after which the learning rate falls; null: none"
    )
    decay: ShareAboveZero = key("schedule=steps: factor of the learning rate at a milestone")
    augment: BoxAugment


class Detector(BuiltLater):
    """conf/detector."""

    convert: Convert
    name: Literal["retinanet", "faster_rcnn", "mask_rcnn", "ssdlite", "fcos"] = key("of torchvision's detectors")
    image_size: _Sizes = key(
        "pixels that an image is resized to; ssdlite: the side of a square",
        json_schema_extra={"words": "[SHORTER,LONGEST] side, or [SIDE], whole numbers from 32 to 4096"},
    )
    trainable_layers: Annotated[int, Field(ge=0, le=5)] = key("of the backbone, from its end on; 5: all")
    norm: Literal["frozen", "synchronized", "trained"] = key(
        "BatchNorm: with the statistics of weights, over the images of all GPUs, or over those of each"
    )
    channels: Annotated[int, Field(ge=1, le=4096)] = key("of the feature pyramid, or of ssdlite's first extra map")
    anchor_sizes: Annotated[list[Positive], Field(min_length=2, max_length=5)] = key(
        "side in pixels of the anchors of each level; ssdlite: smallest and largest share of the image"
    )
    score_threshold: Share = key("least score of a box")
    nms_threshold: Share = key("overlap (IoU) from which on the box of lower score is dropped")
    candidates: Count = key("boxes that non-maximum suppression chooses from: of a level, or of a class (ssdlite)")
    detections: Count = key("boxes of an image, at most")


class DetectionTrainingData(Shards):
    masks: bool = key("read the objects' masks, which detector=mask_rcnn sets and learns from")
    skip_budget: Share = key("share of the training images that may be damaged in an epoch; validation has none")
    empty_images: bool = key("train on images without objects, too")


class TrainDetection(Training):
    """conf/train_detection.yaml."""

    task: Literal["detection"] = key("what is trained", json_schema_extra={"words": "classification or detection"})
    width: Width = key("width multiplier of the backbone")
    weights: Path | None = key("what the backbone starts from: timm, official:FILE, a file or a folder")
    detector: Detector
    recipe: DetectionRecipe
    data: DetectionTrainingData
    module: BuiltLater

    @model_validator(mode="after")
    def _fit(self) -> Self:
        detector = self.detector
        for name, learns in (("norm", detector.norm != "frozen"), ("trainable_layers", detector.trainable_layers == 5)):
            if self.weights is None and not learns:
                value = f"detector.{name}={getattr(detector, name)}"
                raise ValueError(
                    f"{value}: random weights would never learn: give weights=timm or weights=FILE, "
                    "or detector.norm=trained detector.trainable_layers=5"
                )
        if (detector.name == "mask_rcnn") != self.data.masks:
            words = str(self.data.masks).lower()
            raise ValueError(f"data.masks={words}: detector={detector.name} has {'no ' * self.data.masks}masks")
        return self


class EvaluateDetection(Evaluation):
    """conf/evaluate_detection.yaml."""

    task: Literal["detection"] = key("what was trained", json_schema_extra={"words": "classification or detection"})
    run: Path = key("a run's folder: its averaged weights, and its data unless given here")
    report: DetectionReport | Annotated[list[DetectionReport], Field(min_length=1)] | None = key(
        "files in the run's folder: AP of every class, COCO's results in JSON, the best and worst images",
        json_schema_extra={"words": "one of classes, predictions, pictures, null, or several: [classes,pictures]"},
    )
    data: Shards
