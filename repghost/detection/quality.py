"""How well a detector did on an image, and which images are shown for that.

Check: `pytest tests/test_detection_evaluation.py`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from repghost.detection.detections import Detections
from repghost.detection.figures import Truth

SHOWN_IMAGES = 6  # of the best, and as many of the worst
SHOWN_SCORE = 0.5  # least of a detection that is drawn, and counts for how well an image was done


def shown_rows(detections: Detections, truth: Truth) -> list[tuple[int, float]]:
    """The rows of the images with objects that were done best, then of those done worst, with their quality."""
    qualities = [(quality(detections, truth, row), row) for row in range(len(truth.images)) if truth.objects(row)]
    ranked = [(row, value) for value, row in sorted(qualities, key=lambda pair: (-pair[0], pair[1]))]
    worst = ranked[SHOWN_IMAGES:][-SHOWN_IMAGES:]
    return [*ranked[:SHOWN_IMAGES], *reversed(worst)]


def quality(detections: Detections, truth: Truth, row: int) -> float:
    """The panoptic quality (Kirillov et al., arXiv 1801.00868) of the boxes in an image, over all classes, in [0, 1].

    The sum of the IoUs of objects and detections of their class, of 0.5 or more, over the mean number of both. Crowd
    regions and detections below SHOWN_SCORE are left out.
    """
    objects = [annotation for annotation in truth.objects(row) if not annotation.get("iscrowd")]
    boxes, labels = boxes_of(objects, truth)
    found = detections.of_image(row)
    counts = detections.scores[found] >= SHOWN_SCORE
    iou = box_iou(boxes, detections.boxes[found][counts])
    iou[labels[:, None] != detections.labels[found][counts]] = 0
    total = 0.0
    while iou.numel() and (best := float(iou.max())) >= 0.5:
        total += best
        of_object, of_detection = np.unravel_index(int(iou.argmax()), iou.shape)
        iou[of_object], iou[:, of_detection] = 0, 0
    return 2 * total / max(1, len(objects) + int(counts.sum()))


def boxes_of(objects: Sequence[dict[str, Any]], truth: Truth) -> tuple[Tensor, Tensor]:
    """float32 [n, 4], left, top, right, bottom, and int64 [n], labels, of COCO's annotations."""
    label_of = {category: label for label, category in enumerate(truth.categories, 1)}
    boxes = torch.tensor([annotation["bbox"] for annotation in objects]).reshape(-1, 4).float()
    boxes[:, 2:] += boxes[:, :2]
    return boxes, torch.tensor([label_of[annotation["category_id"]] for annotation in objects]).long()
