"""The side of training images by epoch: small ones first, which cost less, the last epochs at full size.

Check: `pytest tests/test_image_sizes.py`.
"""

from dataclasses import dataclass

STEP = 32  # the network's stride: its last map is then a whole number of pixels


@dataclass(frozen=True)
class ImageSizes:
    """Maps an epoch to the side of its images in pixels.

    full: of the last `full_epochs` of `epochs`, and of all epochs where `start` is None. start: of the first epoch, a
    multiple of 32; from there the side grows evenly, rounded down to multiples of 32 (progressive resizing, as in
    EfficientNetV2, arXiv 2104.00298).
    """

    full: int
    start: int | None = None
    epochs: int = 1
    full_epochs: int = 1

    def __call__(self, epoch: int) -> int:
        growing = self.epochs - self.full_epochs
        if self.start is None or epoch >= growing:
            return self.full
        return (self.start + (self.full - self.start) * epoch // growing) // STEP * STEP

    def all(self) -> list[int]:
        """Every side, in ascending order."""
        return sorted({self(epoch) for epoch in range(self.epochs)})
