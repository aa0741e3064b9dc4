"""Reports of a detector's evaluation.

    classes        classes.csv, the average precision of every class
    predictions    predictions.json, all detections as COCO's results, which pycocotools loads
    pictures       pictures.png, the images that were done best and worst: their objects, and beside them what was found

Check: `pytest tests/test_detection_evaluation.py -k report`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torchvision.ops import box_iou

from repghost.dataset import DataModule
from repghost.detection.detections import Detections
from repghost.detection.figures import NOTHING, Truth
from repghost.files import atomic_write, rows_as_csv, write_text
from repghost.text import as_cell

PICTURES = ("pictures",)
REPORTS = ("classes", "predictions", *PICTURES)
SHOWN_IMAGES = 6  # of the best, and as many of the worst
SHOWN_SCORE = 0.5  # least of a detection that is drawn, and counts for how well an image was done


def write_reports(
    names: Sequence[str],
    detections: Detections,
    truth: Truth,
    classes: Sequence[str],
    data: DataModule,
    folder: Path,
) -> None:
    """Writes the reports `names` on the detections in the validation images of `data` into `folder`."""
    if "classes" in names:
        write_text(folder / "classes.csv", rows_as_csv(_class_rows(detections, truth, classes)))
    if "predictions" in names:
        results = detections.results(truth.images, truth.categories)
        write_text(folder / "predictions.json", json.dumps([*results]))
    if "pictures" in names:
        from repghost.detection.pictures import draw_detections  # matplotlib is slow to import

        shown = shown_rows(detections, truth)
        images = data.stored_images("val", [row for row, _ in shown])
        with atomic_write(folder / "pictures.png") as file:
            draw_detections(images, shown, SHOWN_SCORE, detections, truth, classes, file)


def _class_rows(detections: Detections, truth: Truth, classes: Sequence[str]) -> list[dict[str, Any]]:
    precisions = {"map": truth.by_class(detections, "bbox")}
    if len(detections.masks):
        precisions["mask_map"] = truth.by_class(detections, "segm")
    objects = dict.fromkeys(truth.categories, 0)
    for row in range(len(truth.images)):
        for annotation in truth.objects(row):
            objects[annotation["category_id"]] += not annotation.get("iscrowd")
    return [
        {"category_id": category, "class": as_cell(name), "objects": objects[category]}
        | {key: "" if values[k] == NOTHING else values[k] for key, values in precisions.items()}
        for k, (category, name) in enumerate(zip(truth.categories, classes, strict=True))
    ]


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
    boxes, labels = truth.boxes_of(objects)
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
