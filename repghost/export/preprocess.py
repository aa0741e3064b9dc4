"""Preprocessing inside an exported file: from photographs to what the network sees.

Check: `pytest tests/test_export.py`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from repghost.images import Preprocessing

_ONE = 2.0**15  # a weight of 1; the weights of a pixel add up to at most 1.25 in size: 1.25 * 255 * _ONE < 2**24


class Preprocess(nn.Module):
    """Photographs, uint8 [N, H, W, 3], to float32 [N, 3, image_size, image_size], as evaluation does it.

    `Preprocessing.transform` in operations that every runtime has. A resize is linear along each side, so it is a
    product with two matrices, which are constants for photographs of one size (`input_size`). As in PIL and
    torchvision, columns come first, pixels are rounded between the two products, and weights are multiples of a power
    of 2. So all sums are integers below 2**24, which float32 adds exactly, in any order: every runtime gets the same
    pixels.
    """

    mean: Tensor
    std: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(self, preprocessing: Preprocessing, input_size: tuple[int, int] | None) -> None:
        super().__init__()
        self._image_size, self._shorter = preprocessing.image_size, preprocessing.shorter_side
        self._input_size = input_size
        self.register_buffer("mean", 255 * torch.tensor(preprocessing.mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(preprocessing.std).view(3, 1, 1))
        if input_size is not None:
            for name, matrix in zip(("rows", "columns"), self._matrices(*input_size), strict=True):
                self.register_buffer(name, matrix)

    def forward(self, photographs: Tensor) -> Tensor:
        x = photographs.permute(0, 3, 1, 2).float()
        fixed = self._input_size is not None
        rows, columns = (self.rows, self.columns) if fixed else self._matrices(x.shape[2], x.shape[3])
        x = _whole(rows @ _whole(x @ columns))
        return (x - self.mean) / self.std

    def _matrices(self, height: Any, width: Any) -> tuple[Tensor, Tensor]:
        """float32 [image_size, height] and [width, image_size], in units of 1 / _ONE."""
        shorter = torch.sym_min(height, width)
        rows, columns = (self._matrix(side, self._shorter * side // shorter) for side in (height, width))
        return rows, columns.T.contiguous()

    def _matrix(self, length: Any, resized: Any) -> Tensor:
        """float32 [image_size, length]: a side of `length` pixels resized to `resized`, cropped at the centre.

        A pixel's weight is Keys' cubic (a = -1/2) of its distance, stretched where the side shrinks: PIL's bicubic.
        """
        rest = resized - self._image_size
        corner = rest // 2 + rest % 2 * (rest // 2 % 2)  # torchvision rounds half to even
        target = torch.arange(self._image_size, dtype=torch.float64)[:, None] + corner + 0.5
        source = torch.arange(length, dtype=torch.float64) + 0.5
        x = ((source * resized - target * length) / torch.sym_max(length, resized)).abs()
        near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
        weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
        return (_ONE * weights / weights.sum(1, keepdim=True)).round().float()


def _whole(x: Tensor) -> Tensor:
    """Sums in units of 1 / _ONE, rounded to pixels from 0 to 255."""
    return (x / _ONE + 0.5).floor().clamp(0, 255)
