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

from repghost.dataset import DataModule
from repghost.detection.detections import Detections
from repghost.detection.figures import NOTHING, Truth
from repghost.detection.quality import shown_rows
from repghost.files import atomic_write, rows_as_csv, write_text
from repghost.text import as_cell

PICTURES = ("pictures",)
REPORTS = ("classes", "predictions", *PICTURES)


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
            draw_detections(images, shown, detections, truth, classes, file)


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
