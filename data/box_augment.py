"""Augmentation for detection: an image, its boxes and its masks, flipped, scaled and cropped together.

What happens to an image is a function of its size and of the uniforms of its place in the epoch. All coordinates are
those of the edges of pixels, from 0 to the width and the height, as COCO's are.
Check: `pytest tests/test_detection_data.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_area, clip_boxes_to_image, masks_to_boxes
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import horizontal_flip, pad, resize

from repghost.reference import IMAGENET_MEAN

# Columns of the uniforms; those of a pair are for the height and the width.
FLIP, SCALE = 0, 1
CROP_SIDES, CROP_CORNER, SCALE_CORNER = slice(2, 4), slice(4, 6), slice(6, 8)


@dataclass(frozen=True)
class Geometry:
    """What happens to an image: a window is cut out, resized, cut or padded to its former size, and flipped.

    window: (top, left, height, width) in the image. size: (height, width) to which it is resized. corner: (top, left)
    in that where the result begins; negative where there is padding before it.
    """

    window: tuple[int, int, int, int]
    size: tuple[int, int]
    corner: tuple[int, int]
    flip: bool

    def image(self, image: Tensor) -> Tensor:
        """uint8 [3, h, w] of an image, uint8 [3, H, W]; padded with ImageNet's mean."""
        return self._move(image, [round(255 * mean) for mean in IMAGENET_MEAN], InterpolationMode.BILINEAR)

    def masks(self, masks: Tensor) -> Tensor:
        """uint8 [n, h, w] of masks, uint8 [n, H, W]."""
        return self._move(masks, 0, InterpolationMode.NEAREST_EXACT)

    def boxes(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [n, 4] of boxes (left, top, right, bottom), clipped, and [n]: which share of each area is left."""
        top, left, height, width = self.window
        # In double precision, so that the share of what is not cut is 1.
        scale = torch.tensor([self.size[1] / width, self.size[0] / height] * 2, dtype=torch.float64)
        whole = boxes.double() - torch.tensor([left, top] * 2)
        seen = clip_boxes_to_image(whole, (height, width)) * scale - torch.tensor(self.corner[::-1] * 2)
        seen = clip_boxes_to_image(seen, (height, width))
        share = box_area(seen) / box_area(whole * scale)
        if self.flip:
            seen[:, [0, 2]] = width - seen[:, [2, 0]]
        return seen.float(), share.float()

    def _move(self, channels: Tensor, fill: list[float] | int, interpolation: InterpolationMode) -> Tensor:
        top, left, height, width = self.window
        moved = channels[:, top : top + height, left : left + width]
        if self.size != (height, width):
            moved = resize(moved, list(self.size), interpolation, antialias=True)
            (y, x), (h, w) = self.corner, self.size
            moved = pad(moved, [-x, -y, x + width - w, y + height - h], fill)  # which cuts where a side is negative
        return (horizontal_flip(moved) if self.flip else moved).contiguous()


@dataclass(frozen=True, kw_only=True)
class BoxAugment:
    """The augmentation of a recipe.

    flip: probability of a horizontal flip. scale: smallest and largest factor by which the image is resized before it
    is cut or padded to its former size, log-uniform (LSJ, arXiv 2012.07177). crop: smallest and largest side of a
    random window, as shares of the image's sides. min_visible: objects of whose box a smaller share is left are left
    out.
    """

    flip: float
    scale: Sequence[float]
    crop: Sequence[float]
    min_visible: float

    def geometry(self, uniforms: np.ndarray, height: int, width: int) -> Geometry:
        """What these uniforms, float32 [K], do to an image of this size."""
        draws, image = uniforms.astype(np.float64), np.array([height, width])
        low, high = self.crop
        sides = np.clip(np.rint((low + (high - low) * draws[CROP_SIDES]) * image), 1, image)
        first = np.floor(draws[CROP_CORNER] * (image - sides + 1))
        low, high = self.scale
        size = np.maximum(1, np.rint(low * (high / low) ** draws[SCALE] * sides))
        room = size - sides
        corner = np.sign(room) * np.floor(draws[SCALE_CORNER] * (abs(room) + 1))
        (top, left), (h, w), (y, x), (row, column) = (a.astype(int).tolist() for a in (first, sides, size, corner))
        return Geometry((top, left, h, w), (y, x), (row, column), bool(draws[FLIP] < self.flip))

    def visible(self, share: Tensor) -> Tensor:
        """int64 [m]: the objects of which enough is seen, from the share of each box that is left, [n]."""
        return torch.nonzero((share > 0) & (share >= self.min_visible))[:, 0]


def with_masks(boxes: Tensor, share: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """(boxes, bool [n]: whether anything is left of the mask); an object that was cut gets the box of its mask.

    boxes: float32 [n, 4]. share: [n], of each box that is left. masks: uint8 [n, h, w], after the augmentation.
    """
    left = masks.flatten(1).any(dim=1).bool()  # of uint8, any is uint8
    cut = left & (share < 1)
    boxes = boxes.clone()
    boxes[cut] = masks_to_boxes(masks[cut]) + torch.tensor([0, 0, 1, 1])  # which names the last pixel, not its edge
    return boxes, left
