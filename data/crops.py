"""Which samples make a batch, which window of each is cut out and to what it is resized. Shared by both loaders.

Claim: training crops have the distribution of torchvision's RandomResizedCrop, evaluation crops are those of its
Resize and CenterCrop.
Check: `pytest tests/test_sampling.py tests/test_loader.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data import sampling
from data.image_sizes import ImageSizes
from data.index import Index
from data.sampling import NUM_UNIFORMS, RankSampler, epoch_order


@dataclass(frozen=True)
class BatchCrops:
    """The crops of one batch of N rows, N being the batch size per rank.

    image_size: side of the output. positions: int64 [N], the index of each row in the epoch. uniforms: float32
    [N, NUM_UNIFORMS]. samples: int64 [M], rows of the index; M is less than N at the end of validation.
    windows: int64 [N, 4] of (top, left, height, width), what is cut from the stored image. sizes: int64 [N, 2] of
    (height, width), what the window is resized to. corners: int64 [N, 2] of (top, left), where the output begins in
    that. parts: int64 [N, 4] as windows, the part of each window that the output is computed from; a centre crop needs
    less than all of it. bicubic: bool [N], otherwise bilinear. Rows from M on are those of an image of the output's
    size; one that cannot be opened, whose size in the index is 0, counts as a single pixel.
    """

    image_size: int
    positions: np.ndarray
    uniforms: np.ndarray
    samples: np.ndarray
    windows: np.ndarray
    sizes: np.ndarray
    corners: np.ndarray
    parts: np.ndarray
    bicubic: np.ndarray


@dataclass(frozen=True)
class RandomCrops:
    """Training: samples in the order of the epoch, RandomResizedCrop, bilinear or bicubic per image.

    sizes: of the images, by epoch. cycle: epochs after which order and crops repeat, None for never.
    """

    index: Index
    sampler: RankSampler
    sizes: ImageSizes
    seed: int
    scale: Sequence[float]
    ratio: Sequence[float]
    cycle: int | None = None

    def __call__(self, epoch: int, batch: int) -> BatchCrops:
        """The crops of batch `batch` of epoch `epoch`."""
        image_size = self.sizes(epoch)
        epoch = epoch % self.cycle if self.cycle else epoch
        count, start = self.sampler.batch_size, self.sampler.start(batch)
        samples = epoch_order(self.seed, epoch, self.sampler.samples)[start : start + count]
        uniforms = sampling.uniforms(self.seed, epoch, start, count)
        height, width = (np.maximum(self.index.samples[side][samples], 1) for side in ("height", "width"))
        windows = crop_windows(uniforms, height, width, self.scale, self.ratio)
        return BatchCrops(
            image_size=image_size,
            positions=np.arange(start, start + count),
            uniforms=uniforms,
            samples=samples,
            windows=windows,
            sizes=np.full((count, 2), image_size),
            corners=np.zeros((count, 2), np.int64),
            parts=windows,
            bicubic=uniforms[:, sampling.INTERPOLATION] >= 0.5,  # timm's interpolation="random"
        )


@dataclass(frozen=True)
class CenterCrops:
    """Evaluation: samples in the order of the index, shorter side resized (bicubic), centre crop.

    crop_fraction: side of the crop as a share of the shorter side.
    """

    index: Index
    sampler: RankSampler
    image_size: int
    crop_fraction: float

    def __call__(self, epoch: int, batch: int) -> BatchCrops:
        """The crops of batch `batch`; the same in every epoch."""
        count, start = self.sampler.batch_size, self.sampler.start(batch)
        samples = np.arange(min(start, self.sampler.samples), min(start + count, self.sampler.samples))
        windows = np.tile([0, 0, self.image_size, self.image_size], (count, 1))
        for column, side in ((2, "height"), (3, "width")):
            windows[: len(samples), column] = np.maximum(self.index.samples[side][samples], 1)
        sizes = evaluation_sizes(windows[:, 2], windows[:, 3], int(self.image_size / self.crop_fraction))
        # torchvision's CenterCrop rounds half to even; so does numpy.
        corners = np.rint((sizes - self.image_size) / 2).astype(np.int64)
        return BatchCrops(
            image_size=self.image_size,
            positions=np.arange(start, start + count),
            uniforms=np.zeros((count, NUM_UNIFORMS), np.float32),
            samples=samples,
            windows=windows,
            sizes=sizes,
            corners=corners,
            parts=central_parts(windows, sizes, corners, self.image_size),
            bicubic=np.ones(count, bool),
        )


Crops = RandomCrops | CenterCrops


def crop_windows(
    uniforms: np.ndarray, height: np.ndarray, width: np.ndarray, scale: Sequence[float], ratio: Sequence[float]
) -> np.ndarray:
    """int64 [N, 4] of (top, left, height, width): torchvision's RandomResizedCrop.get_params from given uniforms.

    Ten attempts at an area uniform in `scale` and an aspect log-uniform in `ratio`; the first that fits is placed
    uniformly; if none fits, the largest central window within `ratio`. uniforms: float32 [N, NUM_UNIFORMS]; height,
    width: [N] pixels.
    """
    height, width = height.astype(np.int64), width.astype(np.int64)
    attempts = uniforms[:, sampling.CROP].astype(np.float64).reshape(-1, sampling.CROP_ATTEMPTS, 2)
    area = (scale[0] + (scale[1] - scale[0]) * attempts[..., 0]) * (height * width)[:, None]
    low, high = np.log(ratio)
    aspect = np.exp(low + (high - low) * attempts[..., 1])
    w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    rows, first = np.arange(len(uniforms)), fits.argmax(axis=1)
    h, w = h[rows, first], w[rows, first]
    top = np.floor(uniforms[:, sampling.CROP_TOP].astype(np.float64) * (height - h + 1)).astype(np.int64)
    left = np.floor(uniforms[:, sampling.CROP_LEFT].astype(np.float64) * (width - w + 1)).astype(np.int64)
    drawn = np.stack([top, left, h, w], axis=1)
    return np.where(fits.any(axis=1, keepdims=True), drawn, _central_windows(height, width, ratio))


def _central_windows(height: np.ndarray, width: np.ndarray, ratio: Sequence[float]) -> np.ndarray:
    """int64 [N, 4]: the largest centred window whose aspect lies within `ratio` (torchvision's fallback)."""
    h = np.where(width / height < ratio[0], np.minimum(np.rint(width / ratio[0]), height), height).astype(np.int64)
    w = np.where(width / height > ratio[1], np.minimum(np.rint(height * ratio[1]), width), width).astype(np.int64)
    h, w = np.maximum(h, 1), np.maximum(w, 1)
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1)


def evaluation_sizes(height: np.ndarray, width: np.ndarray, shorter: int) -> np.ndarray:
    """int64 [N, 2]: height and width once the shorter side is `shorter` (torchvision's Resize, floored)."""
    sides = np.stack([height, width], axis=1).astype(np.int64)
    return sides * shorter // sides.min(axis=1, keepdims=True)


def central_parts(windows: np.ndarray, sizes: np.ndarray, corners: np.ndarray, image_size: int) -> np.ndarray:
    """int64 [N, 4]: the part of each window from which the square at `corners` of the resized window is computed.

    windows: int64 [N, 4] of (top, left, height, width); sizes: int64 [N, 2] that they are resized to by the bicubic
    filter with antialiasing, which reaches two pixels of the smaller of both images to either side.
    """
    sides = windows[:, 2:]
    scale = sides / sizes
    reach = 2 * np.maximum(scale, 1) + 1  # and one for rounding
    start = np.maximum(np.floor((corners + 0.5) * scale - reach), 0).astype(np.int64)
    end = np.minimum(np.ceil((corners + image_size - 0.5) * scale + reach).astype(np.int64), sides)
    return np.concatenate([windows[:, :2] + start, end - start], axis=1)
