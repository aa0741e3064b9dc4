"""What a loader has to do for one batch: which samples, which windows, which resize. Shared by both loaders."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.index import Index
from data.sampling import (
    BICUBIC,
    DRAWS,
    Partition,
    crop_windows,
    epoch_order,
    evaluation_sizes,
    interpolations,
    uniforms,
)


@dataclass(frozen=True)
class BatchPlan:
    """One batch of `rows` rows on one rank.

    samples: int64 [M] rows of the index, M <= rows (fewer at the end of validation).
    positions: int64 [rows], where in the epoch each row stands. draws: float32 [rows, DRAWS].
    windows: int64 [M, 4] of (top, left, height, width), what to cut from the stored image.
    resized: int64 [M, 2] of (height, width), what the cut becomes. corners: int64 [M, 2] of (top, left), where in that
    the output of image_size x image_size begins. bicubic: bool [M].
    """

    rows: int
    samples: np.ndarray
    positions: np.ndarray
    draws: np.ndarray
    windows: np.ndarray
    resized: np.ndarray
    corners: np.ndarray
    bicubic: np.ndarray


class TrainPlan:
    """Plans training batches: shuffled, RandomResizedCrop, bilinear or bicubic per image."""

    def __init__(
        self,
        index: Index,
        partition: Partition,
        *,
        seed: int,
        image_size: int,
        scale: Sequence[float],
        ratio: Sequence[float],
    ) -> None:
        self.index = index
        self.partition = partition
        self._seed = seed
        self._image_size = image_size
        self._scale = (float(scale[0]), float(scale[1]))
        self._ratio = (float(ratio[0]), float(ratio[1]))
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def __call__(self, epoch: int, batch: int) -> BatchPlan:
        """The plan of batch `batch` of epoch `epoch`."""
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(self._seed, epoch, self.partition.samples))
        rows, start = self.partition.rows, self.partition.start(batch)
        positions = np.arange(start, start + rows)
        samples = self._order[1][start : start + rows]
        draws = uniforms(self._seed, epoch, start, rows)
        stored = self.index.samples[samples]
        return BatchPlan(
            rows=rows,
            samples=samples,
            positions=positions,
            draws=draws,
            windows=crop_windows(draws, stored["height"], stored["width"], self._scale, self._ratio),
            resized=np.full((rows, 2), self._image_size),
            corners=np.zeros((rows, 2), np.int64),
            bicubic=interpolations(draws) == BICUBIC,
        )


class EvaluationPlan:
    """Plans validation batches: in the index's order, shorter side resized (bicubic), centre crop."""

    def __init__(self, index: Index, partition: Partition, *, image_size: int, crop_fraction: float) -> None:
        self.index = index
        self.partition = partition
        self._image_size = image_size
        self._shorter = int(image_size / crop_fraction)

    def __call__(self, epoch: int, batch: int) -> BatchPlan:
        """The plan of batch `batch`; the same in every epoch."""
        rows, start = self.partition.rows, self.partition.start(batch)
        samples = np.arange(min(start, self.partition.samples), min(start + rows, self.partition.samples))
        stored = self.index.samples[samples]
        height, width = evaluation_sizes(stored["height"], stored["width"], self._shorter)
        whole = np.stack([np.zeros_like(height), np.zeros_like(width), stored["height"], stored["width"]], axis=1)
        resized = np.stack([height, width], axis=1)
        return BatchPlan(
            rows=rows,
            samples=samples,
            positions=np.arange(start, start + rows),
            draws=np.zeros((rows, DRAWS), np.float32),
            windows=whole.astype(np.int64),
            resized=resized,
            # torchvision's CenterCrop rounds half to even; so does numpy.
            corners=np.rint((resized - self._image_size) / 2).astype(np.int64),
            bicubic=np.ones(len(samples), bool),
        )


Plan = TrainPlan | EvaluationPlan
