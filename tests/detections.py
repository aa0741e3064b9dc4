"""Random objects in COCO's format, and detections near them and elsewhere."""

from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask
from torch import Tensor

from repghost.detection.detections import Detections

CATEGORIES = [3, 7, 11, 90]
HEIGHT, WIDTH = 120, 160


def annotations(images: int, seed: int = 0) -> dict[str, Any]:
    """Of images of one size, some without objects; ids with gaps, polygons and RLEs, crowd regions, areas of masks."""
    rng = np.random.default_rng(seed)
    content: dict[str, Any] = {
        "images": [{"id": 5 + 3 * row, "height": HEIGHT, "width": WIDTH} for row in range(images)],
        "annotations": [],
        "categories": [{"id": number, "name": f"class {number}"} for number in CATEGORIES],
    }
    for image in content["images"]:
        for _ in range(int(rng.integers(0, 6)) if rng.random() > 0.2 else 0):
            left, top = rng.uniform(0, WIDTH - 8), rng.uniform(0, HEIGHT - 8)
            width, height = rng.uniform(4, WIDTH - left), rng.uniform(4, HEIGHT - top)
            polygon: Any = [[left, top, left + width, top, left + width, top + height, left, top + height]]
            rle = mask.segmToRle(polygon, WIDTH, HEIGHT)
            crowd = bool(rng.random() < 0.1)
            counts = rle["counts"].decode() if isinstance(rle["counts"], bytes) else rle["counts"]
            content["annotations"].append(
                {
                    "id": len(content["annotations"]) + 1,
                    "image_id": image["id"],
                    "category_id": int(rng.choice(CATEGORIES)),
                    "bbox": [float(left), float(top), float(width), float(height)],
                    "area": float(mask.area(rle)),
                    "iscrowd": int(crowd),
                    "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts} if crowd else polygon,
                }
            )
    return content


def outputs(content: dict[str, Any], per_image: int, masks: bool, seed: int = 1) -> list[dict[str, Tensor]]:
    """What a detector might give for these images: its boxes, best first, many of the same score."""
    rng = np.random.default_rng(seed)
    of_image: dict[int, list[dict[str, Any]]] = {}
    for annotation in content["annotations"]:
        of_image.setdefault(annotation["image_id"], []).append(annotation)
    found = []
    for image in content["images"]:
        boxes, labels = [], []
        for annotation in of_image.get(image["id"], []):
            left, top, width, height = np.array(annotation["bbox"]) + rng.normal(0, 3, 4)
            boxes.append([left, top, left + abs(width) + 1, top + abs(height) + 1])
            labels.append(1 + CATEGORIES.index(annotation["category_id"]))
        while len(boxes) < per_image:
            left, top = rng.uniform(0, WIDTH - 20), rng.uniform(0, HEIGHT - 20)
            boxes.append([left, top, left + rng.uniform(4, 60), top + rng.uniform(4, 60)])
            labels.append(int(rng.integers(1, len(CATEGORIES) + 1)))
        scores = np.sort(np.round(rng.random(len(boxes)), 1))[::-1].copy()
        output = {
            "boxes": torch.tensor(np.array(boxes).reshape(-1, 4)).float(),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "scores": torch.from_numpy(scores).float(),
        }
        if masks:
            output["masks"] = torch.zeros(len(boxes), 1, HEIGHT, WIDTH)
            for number, (left, top, right, bottom) in enumerate(output["boxes"].clamp(min=0).round().long().tolist()):
                output["masks"][number, 0, top:bottom, left:right] = 0.9
        found.append(output)
    return found


def detections(found: list[dict[str, Tensor]], batch: int = 4) -> list[Detections]:
    """In batches, the last of them with rows of padding, as in a validation."""
    nothing = {"boxes": torch.empty(0, 4), "labels": torch.empty(0, dtype=torch.int64), "scores": torch.empty(0)}
    if found and "masks" in found[0]:
        nothing["masks"] = torch.empty(0, 1, 32, 32)
    batches = []
    for start in range(0, len(found), batch):
        rows = torch.arange(start, start + batch)
        rows[rows >= len(found)] = -1
        batches.append(Detections.of([found[row] if row >= 0 else nothing for row in rows.tolist()], rows))
    return batches
