"""COCO's twelve figures of random detections: seconds of this project's evaluation, and of pycocotools on the same.

    python benchmarks/coco_figures.py [--images 5000] [--boxes 36] [--rounds 3]

Both begin with detections in memory and annotations that were read, and end with the same figures, which is checked;
rounds alternate.
"""

import argparse
import contextlib
import copy
import io
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from repghost.detection.detections import Detections
from repghost.detection.figures import FIGURES, Truth

CLASSES, HEIGHT, WIDTH = 80, 480, 640
OBJECTS = 14  # of an image, at most; COCO's have seven on average


def random_data(images: int, boxes: int) -> tuple[dict[str, Any], Detections]:
    """Annotations in COCO's format, and detections near their objects and elsewhere."""
    rng = np.random.default_rng(0)
    content: dict[str, Any] = {
        "images": [{"id": row + 1, "height": HEIGHT, "width": WIDTH} for row in range(images)],
        "annotations": [],
        "categories": [{"id": number, "name": str(number)} for number in range(1, CLASSES + 1)],
    }
    outputs = []
    for image in content["images"]:
        corners, sides = rng.uniform(0, [WIDTH - 140, HEIGHT - 140], (boxes, 2)), rng.uniform(4, 140, (boxes, 2))
        labels = rng.integers(1, CLASSES + 1, boxes)
        for number in range(min(boxes, int(rng.integers(0, OBJECTS + 1)))):
            box = [*corners[number].tolist(), *sides[number].tolist()]
            about = {
                "id": len(content["annotations"]) + 1,
                "image_id": image["id"],
                "iscrowd": int(rng.random() < 0.02),
            }
            area = float(np.prod(sides[number])) * float(rng.uniform(0.4, 1))
            content["annotations"].append({**about, "category_id": int(labels[number]), "bbox": box, "area": area})
        near = corners + rng.normal(0, 5, corners.shape)
        order = torch.from_numpy(rng.permutation(boxes))
        found = torch.from_numpy(np.concatenate([near, near + sides], axis=1)).float()
        scores = torch.from_numpy(np.sort(rng.random(boxes))[::-1].copy()).float()
        outputs.append({"boxes": found[order], "labels": torch.from_numpy(labels)[order], "scores": scores})
    return content, Detections.of(outputs, torch.arange(images))


def ours(content: dict[str, Any], detections: Detections) -> list[float]:
    """The figures by faster-coco-eval, from flat arrays."""
    figures = Truth(content, range(1, CLASSES + 1)).figures(detections, masks=False)
    return [figures[name] for name in FIGURES]


def of_pycocotools(content: dict[str, Any], detections: Detections) -> list[float]:
    """The figures by pycocotools, from COCO's results."""
    results = [*detections.results(content["images"], range(1, CLASSES + 1))]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the medians of both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000, help="(default: %(default)s)")
    parser.add_argument("--boxes", type=int, default=36, help="detections of an image (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    content, detections = random_data(options.images, options.boxes)
    seconds: dict[str, list[float]] = {"repghost": [], "pycocotools": []}
    for _ in range(options.rounds):
        figures = []
        for took, function in zip(seconds.values(), (ours, of_pycocotools), strict=True):
            given = copy.deepcopy(content)
            began = time.perf_counter()
            figures.append(function(given, detections))
            took.append(time.perf_counter() - began)
        np.testing.assert_allclose(*figures, rtol=0, atol=1e-12)
    mine, theirs = (median(took) for took in seconds.values())
    print(
        f"{options.images:,} images with {options.boxes} boxes each, {CLASSES} classes: {mine:.1f} s, "
        f"pycocotools {theirs:.1f} s: {theirs / mine:.1f} times as fast, the same twelve figures"
    )


if __name__ == "__main__":
    main()
