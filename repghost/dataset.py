"""What the network's side asks of a data set: its batches, the index of a split, and the data module that feeds them.

`data/` provides them; `repghost` never imports it, so that another source of images can take its place.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import pytorch_lightning as pl
from torch import Tensor


class Mixture(NamedTuple):
    """What mixup or CutMix has put into each of N training images."""

    labels: Tensor  # int64 [N]: of the other image
    shares: Tensor  # float32 [N]: the image's own share of the target; 1 where nothing was mixed in


class TeacherLogits(NamedTuple):
    """What a teacher said of N training images: for each its K most probable classes."""

    values: Tensor  # float16 or float32 [N, K]: logarithms of the probabilities
    classes: Tensor  # int64 [N, K]


class Batch(NamedTuple):
    """N rows. A row without an image (the end of validation, a skipped image) has label -1 and counts nowhere."""

    images: Tensor  # [N, 3, H, W], uint8 from a loader, normalized float32 (bfloat16 if autocast is) on the device
    labels: Tensor  # int64 [N]
    positions: Tensor  # int64 [N]: index in the epoch; in validation, the row of the index
    uniforms: Tensor  # float32 [N, K]: the random draws of each row
    mixture: Mixture | None = None  # in a training that mixes images, on the device
    teacher: TeacherLogits | None = None  # in a training from stored logits


class DetectionBatch(NamedTuple):
    """N rows on one rank. A row of padding (the end of validation) has position -1, a black image and no objects."""

    images: list[Tensor]  # [3, H, W] of any sizes, uint8 from a loader, float32 in [0, 1] on the device
    targets: list[dict[str, Tensor]]  # boxes float32 [n, 4] (left, top, right, bottom in pixels), labels int64 [n] from
    # 1 (0 is background), masks uint8 [n, H, W] where the detector has masks
    positions: Tensor  # int64 [N]: index in the epoch; in validation, the row of the index


class SplitIndex(Protocol):
    """The images of one split."""

    @property
    def classes(self) -> Sequence[str]:
        """A name for each label."""

    def __len__(self) -> int:
        """How many images there are."""

    def keys(self) -> Sequence[str]:
        """The key of every image: its member name without extension."""

    @property
    def fingerprint(self) -> str:
        """Hex digest of the images and the class names: tells data sets apart, wherever they lie."""


class DetectionIndex(SplitIndex, Protocol):
    """The images of one split, and the objects in them."""

    @property
    def category_ids(self) -> Sequence[int]:
        """COCO's id of each class, in their order; label 1 is the first class."""

    def annotations(self) -> dict[str, Any]:
        """COCO's `images`, in the order of the index, `annotations` and `categories`, as they were imported."""


class DataModule(pl.LightningDataModule):
    """Feeds batches of `Batch` to a Trainer and knows what its splits hold."""

    def index(self, split: str) -> SplitIndex:
        """The index of a split: "train" or "val"."""
        raise NotImplementedError

    @property
    def fingerprints(self) -> dict[str, str]:
        """That of every split which was loaded."""
        raise NotImplementedError

    def images(self, split: str, rows: Sequence[int]) -> Tensor:
        """uint8 [N, 3, S, S]: the images in these rows of a split's index, cropped as in evaluation; black if bad."""
        raise NotImplementedError

    def stored_images(self, split: str, rows: Sequence[int]) -> list[Tensor]:
        """uint8 [3, H, W] each: the images in these rows of a split's index, of any sizes, as they are stored."""
        raise NotImplementedError

    @property
    def seconds_waited(self) -> float:
        """How long the training has waited for its batches so far."""
        return 0.0

    @property
    def counts(self) -> tuple[int, int]:
        """Numbers of training and of validation images."""
        raise NotImplementedError

    @property
    def num_classes(self) -> int:
        """Number of classes of the splits together."""
        raise NotImplementedError
