"""What a loader has to do for one batch: which samples, which windows, which resize. Shared by both loaders."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.index import Index
from data.sampling import (
    BICUBIC,
    BILINEAR,
    CROP,
    CROP_ATTEMPTS,
    CROP_LEFT,
    CROP_TOP,
    DRAWS,
    INTERPOLATION,
    Partition,
    epoch_order,
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


def crop_windows(
    draws: np.ndarray, height: np.ndarray, width: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """int64 [N, 4] of (top, left, height, width): torchvision's RandomResizedCrop.get_params from given draws.

    Ten attempts at an area uniform in `scale` and an aspect log-uniform in `ratio`; the first that fits is placed
    uniformly; if none fits, the largest central window within `ratio`. draws: float32 [N, DRAWS]; height and width:
    [N] pixels.
    """
    height, width = height.astype(np.int64), width.astype(np.int64)
    attempts = draws[:, CROP].astype(np.float64).reshape(-1, CROP_ATTEMPTS, 2)
    area = (scale[0] + (scale[1] - scale[0]) * attempts[..., 0]) * (height * width)[:, None]
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * attempts[..., 1])
    w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    rows, first = np.arange(len(draws)), fits.argmax(axis=1)
    h, w = h[rows, first], w[rows, first]
    top = np.floor(draws[:, CROP_TOP].astype(np.float64) * (height - h + 1)).astype(np.int64)
    left = np.floor(draws[:, CROP_LEFT].astype(np.float64) * (width - w + 1)).astype(np.int64)
    windows = np.stack([top, left, h, w], axis=1)

    none_fits = ~fits.any(axis=1)
    if none_fits.any():
        windows[none_fits] = _central_windows(height[none_fits], width[none_fits], ratio)
    return windows


def _central_windows(height: np.ndarray, width: np.ndarray, ratio: tuple[float, float]) -> np.ndarray:
    """int64 [N, 4]: the largest centred window whose aspect lies within `ratio` (torchvision's fallback)."""
    h = np.where(width / height < ratio[0], np.minimum(np.rint(width / ratio[0]), height), height).astype(np.int64)
    w = np.where(width / height > ratio[1], np.minimum(np.rint(height * ratio[1]), width), width).astype(np.int64)
    h, w = np.maximum(h, 1), np.maximum(w, 1)
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1)


def interpolations(draws: np.ndarray) -> np.ndarray:
    """int64 [N]: BILINEAR or BICUBIC, each with probability 1/2 (timm's `interpolation="random"`)."""
    return np.where(draws[:, INTERPOLATION] < 0.5, BILINEAR, BICUBIC)


def evaluation_sizes(height: np.ndarray, width: np.ndarray, shorter: int) -> tuple[np.ndarray, np.ndarray]:
    """int64 [N], int64 [N]: height and width once the shorter side is `shorter` (torchvision's Resize, floored)."""
    height, width = height.astype(np.int64), width.astype(np.int64)
    least = np.minimum(height, width)
    return height * shorter // least, width * shorter // least
