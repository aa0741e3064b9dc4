"""Masks as COCO's run lengths (RLE). Check: `pytest tests/test_detectors.py`."""

import numpy as np
import torch
from torch import Tensor

MASK_THRESHOLD = 0.5  # probability from which on a pixel is in a mask


def run_lengths(masks: Tensor) -> list[bytes]:
    """The compressed `counts` of COCO's RLE for probabilities, float [N, 1, H, W] on the CPU."""
    from faster_coco_eval.core import mask  # slow to import

    if not len(masks):
        return []
    pixels = (masks[:, 0] >= MASK_THRESHOLD).to(torch.uint8).permute(1, 2, 0).numpy()
    return [rle["counts"] for rle in mask.encode(np.asfortranarray(pixels))]
