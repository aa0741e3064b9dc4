"""Loss and Top-k as sums over images, so that ranks and batches of any size add up to exact means."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Scores(NamedTuple):
    """Means over `images` images; accuracies in percent."""

    loss: float
    top1: float
    top5: float
    images: int


def score_sums(logits: Tensor, labels: Tensor) -> Tensor:
    """float64 [4]: summed cross-entropy, Top-1 hits, Top-5 hits and images of a batch.

    logits: float [N, C]; labels: int64 [N], where -1 marks a row that stands for no image and counts nowhere.
    With fewer than five classes Top-5 means Top-C.
    """
    counted = labels >= 0
    loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="none").double().sum()
    hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
    return torch.stack([loss, hits[:, 0].sum(), hits.sum(), counted.sum()])


def scores(sums: Tensor) -> Scores:
    """The means that `score_sums`, added over batches and ranks, stand for."""
    loss, top1, top5, images = sums.tolist()
    return Scores(loss / images, 100 * top1 / images, 100 * top5 / images, int(images))
