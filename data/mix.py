"""Mixup and CutMix: neighbours in the epoch's order are mixed with each other, on the training device.

The order of an epoch is random, so a neighbour is a random other image; and it is in the same batch on any number of
devices. What happens to a pair is drawn from the uniforms of both: a pure function of seed, epoch and position.
Claim: given the same draws, the images and targets of timm's Mixup(mode="pair").
Check: `pytest tests/test_mix.py`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import betaincinv
from torch import Tensor

from data import sampling
from repghost.dataset import Mixture


class MixPlan(NamedTuple):
    """What is done to each of N rows; both rows of a pair have the same numbers."""

    pixel_shares: Tensor  # float32 [N]: the image's own share of every pixel, 1 for CutMix
    label_shares: Tensor  # float32 [N]: of the target
    boxes: Tensor  # int64 [N, 4]: (top, left, bottom, right) of the part that the two exchange, empty for mixup


@dataclass(frozen=True)
class Mix:
    """Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of pairs of images.

    mixup, cutmix: of Beta(a, a), from which the share is drawn; 0 is off. probability: that a pair is mixed at all.
    cutmix_share: of the mixed pairs that CutMix gets where both are on.
    """

    mixup: float
    cutmix: float
    probability: float
    cutmix_share: float

    @property
    def is_on(self) -> bool:
        """Whether anything is ever mixed."""
        return (self.mixup > 0 or self.cutmix > 0) and self.probability > 0

    def plan(self, uniforms: Tensor, labels: Tensor, side: int) -> MixPlan:
        """What is done to each row; to be called on the host.

        uniforms: float32 [N, NUM_UNIFORMS], N even; labels: int64 [N], -1 for a row without an image, which is mixed
        with nothing; side: of the images, in pixels.
        """
        pairs = uniforms[:, sampling.MIX].double().numpy().reshape(-1, 4)  # kind, share, vertical and horizontal place
        share = self.cutmix_share if self.mixup > 0 and self.cutmix > 0 else float(self.cutmix > 0)
        whole = (labels.numpy().reshape(-1, 2) >= 0).all(axis=1)
        mixed = whole & (pairs[:, 0] < self.probability)
        cut = mixed & (pairs[:, 0] < self.probability * share)
        blended = mixed & ~cut
        shares = np.ones(len(pairs))
        for rows, alpha in ((cut, self.cutmix), (blended, self.mixup)):
            shares[rows] = betaincinv(alpha, alpha, pairs[rows, 1]) if rows.any() else 1.0
        boxes = _boxes(shares, pairs[:, 2:], side) * cut[:, None]
        pixel_shares = np.where(cut, 1.0, shares)
        areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        label_shares = np.where(cut, 1 - areas / side**2, shares)
        pixels, targets, both = (
            torch.from_numpy(each).repeat_interleave(2, 0) for each in (pixel_shares, label_shares, boxes)
        )
        return MixPlan(pixels.float(), targets.float(), both)


def _boxes(shares: np.ndarray, places: np.ndarray, side: int) -> np.ndarray:
    """int64 [M, 4]: CutMix's rectangle, square before it is clipped to the image, around a uniform pixel."""
    cut = (side * np.sqrt(1 - shares)).astype(np.int64)[:, None]
    centres = (places * side).astype(np.int64)
    return np.concatenate([np.maximum(centres - cut // 2, 0), np.minimum(centres + (cut + 1) // 2, side)], axis=1)


def mix(images: Tensor, plan: MixPlan) -> Tensor:
    """[N, 3, S, S] of floats, each row mixed with its neighbour, in the dtype and memory format of `images`."""
    others = neighbours(images)
    shares = plan.pixel_shares.view(-1, 1, 1, 1)
    top, left, bottom, right = plan.boxes.view(-1, 4, 1, 1, 1).unbind(1)
    y = torch.arange(images.shape[2], device=images.device).view(1, 1, -1, 1)
    x = torch.arange(images.shape[3], device=images.device)
    exchanged = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    blended = images.float() * shares + others.float() * (1 - shares)
    mixed = torch.where(exchanged, others, blended.to(images.dtype))
    channels_last = images.is_contiguous(memory_format=torch.channels_last)
    return mixed.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def mixture(labels: Tensor, plan: MixPlan) -> Mixture:
    """The targets of `mix`; labels: int64 [N]."""
    return Mixture(neighbours(labels), plan.label_shares)


def neighbours(rows: Tensor) -> Tensor:
    """The rows in pairs exchanged: 1, 0, 3, 2, ...; their number is even."""
    return rows[torch.arange(len(rows), device=rows.device) ^ 1]
