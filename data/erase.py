"""Random erasing: which rectangle of an image, and the noise in it.

Check: `pytest tests/test_augment.py -k "eras or noise"`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from data import sampling
from data.sampling import between


@dataclass(frozen=True)
class Erase:
    """Random erasing (arXiv 1708.04896) of one rectangle: its probability, share of the image, shape.

    area: range of the share; aspect: range of height / width.
    """

    probability: float
    area: Sequence[float]
    aspect: Sequence[float]

    def boxes(self, uniforms: Tensor, height: int, width: int) -> Tensor:
        """int64 [N, 4]: (top, left, height, width) of each sample's rectangle, all 0 if it has none.

        As timm's RandomErasing: the first of ten attempts, area uniform and aspect log-uniform, that is
        smaller than the image on both sides, placed uniformly; nothing is erased if none is.
        """
        uniforms = uniforms.double()
        attempts = uniforms[:, sampling.ERASE_SHAPE].reshape(-1, sampling.ERASE_ATTEMPTS, 2)
        area = between(attempts[..., 0], *self.area) * (height * width)
        aspect = between(attempts[..., 1], *(math.log(value) for value in self.aspect)).exp()
        h, w = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
        fits = (h < height) & (w < width)
        first = fits.long().argmax(dim=1, keepdim=True)  # of equal values the first
        h, w = h.gather(1, first).flatten(), w.gather(1, first).flatten()
        erased = fits.any(dim=1) & (uniforms[:, sampling.ERASE] < self.probability)
        top = (uniforms[:, sampling.ERASE_TOP] * (height - h + 1)).floor()
        left = (uniforms[:, sampling.ERASE_LEFT] * (width - w + 1)).floor()
        return torch.stack([top, left, h, w], dim=1).long() * erased.unsqueeze(1)


def erase_in_place(pixels: Tensor, boxes: Tensor, uniforms: Tensor, quantiles: Tensor) -> None:
    """Noise of N(0, 1) into the box of every sample of float32 [N, 3, H, W], as `erase`."""
    for image, key, (top, left, h, w) in zip(pixels, uniforms, boxes.tolist(), strict=True):
        if h > 0:
            rectangle = (slice(None), slice(top, top + h), slice(left, left + w))
            numbers = torch.arange(image.numel(), device=image.device).view(image.shape)
            image[rectangle] = normal_noise(key, numbers[rectangle], quantiles)


def erase(pixels: Tensor, boxes: Tensor, uniforms: Tensor, quantiles: Tensor) -> Tensor:
    """float32 [N, 3, H, W] with noise of N(0, 1) in the box of every sample.

    boxes: int64 [N, 4] of (top, left, height, width); uniforms: float32 [N], from which the noise of each is made;
    quantiles: `normal_quantiles`.
    """
    top, left, h, w = boxes.view(-1, 4, 1, 1, 1).unbind(1)
    y = torch.arange(pixels.shape[2], device=pixels.device).view(1, 1, -1, 1)
    x = torch.arange(pixels.shape[3], device=pixels.device)
    inside = (y >= top) & (y < top + h) & (x >= left) & (x < left + w)
    numbers = torch.arange(pixels[0].numel(), device=pixels.device).view(1, *pixels.shape[1:])
    return torch.where(inside, normal_noise(uniforms.view(-1, 1, 1, 1), numbers, quantiles), pixels)


def normal_noise(uniforms: Tensor, numbers: Tensor, quantiles: Tensor) -> Tensor:
    """float32, N(0, 1) for each number of a pixel; other uniforms give other noise. The first two are broadcast.

    uniforms: float32 of 24 bits; numbers: int64; quantiles: `normal_quantiles`. A hash instead of a generator, so that
    the noise of an image depends neither on the rest of its batch nor on the device: the 32-bit mixer `lowbias32` of
    C. Wellons' hash-prospector for the key and for the number, whose upper 20 bits choose a quantile.
    """
    key = _mixed_bits((uniforms * 2**24).long())
    return quantiles[_mixed_bits(numbers ^ key) >> 12]


def normal_quantiles() -> Tensor:
    """float32 [2**20] of N(0, 1), at the centres of equal parts: a table has the same bits everywhere."""
    return torch.from_numpy(ndtri((np.arange(2**20) + 0.5) / 2**20)).float()


def _mixed_bits(bits: Tensor) -> Tensor:
    """int64 with 32 bits in use, each of which depends on all of those of `bits`; products may overflow."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
    return bits ^ (bits >> 16)
