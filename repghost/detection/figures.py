"""COCO's twelve figures of detections, by faster-coco-eval, which comes to the same numbers as pycocotools.

Check: `pytest tests/test_detection_evaluation.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor

from repghost.detection.detections import Detections

# Average precision: over IoUs from 0.5 to 0.95, at 0.5, at 0.75, of small, medium and large objects; average recall:
# with 1, 10, 100 detections of an image, of small, medium and large objects.
FIGURES = (
    "map", "map50", "map75", "map_small", "map_medium", "map_large",
    "mar1", "mar10", "mar100", "mar_small", "mar_medium", "mar_large",
)  # fmt: skip
NOTHING = -1.0  # a figure of objects that the data set does not have


class Truth:
    """The objects of a split. annotations: COCO's `images`, in the order of the index, `annotations`, `categories`."""

    def __init__(self, annotations: Mapping[str, Any], categories: Sequence[int]) -> None:
        self.images: list[dict[str, Any]] = annotations["images"]
        self.categories = [*categories]
        self._coco = COCO(dict(annotations))

    def objects(self, row: int) -> list[dict[str, Any]]:
        """COCO's annotations of the image in a row of the index."""
        return [*self._coco.imgToAnns[self.images[row]["id"]]]

    def boxes_of(self, objects: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
        """float32 [n, 4], left, top, right, bottom, and int64 [n], labels from 1, of COCO's annotations."""
        boxes = torch.tensor([each["bbox"] for each in objects], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        return boxes, torch.tensor([1 + self.categories.index(each["category_id"]) for each in objects]).long()

    def figures(self, detections: Detections, masks: bool) -> dict[str, float]:
        """FIGURES of the boxes, in [0, 1] or NOTHING, and, under `mask_...`, of the `masks` if those are wanted."""
        found = dict(zip(FIGURES, self._evaluated(detections, "bbox").stats[: len(FIGURES)].tolist(), strict=True))
        if masks:
            stats = self._evaluated(detections, "segm").stats[: len(FIGURES)].tolist()
            found |= {f"mask_{name}": value for name, value in zip(FIGURES, stats, strict=True)}
        return found

    def by_class(self, detections: Detections, kind: Literal["bbox", "segm"] = "bbox") -> list[float]:
        """The average precision of every class, in [0, 1]; NOTHING for one without objects."""
        precision = self._evaluated(detections, kind).eval["precision"]  # [IoUs, recalls, classes, areas, counts]
        of_classes = (precision[:, :, k, 0, -1] for k in range(len(self.categories)))
        return [float(np.mean(of[of > -1])) if (of > -1).any() else NOTHING for of in of_classes]

    def _evaluated(self, detections: Detections, kind: Literal["bbox", "segm"]) -> Any:
        results = [*detections.results(self.images, self.categories)]
        for result in results:
            # The area of a detection is that of its mask; of a box nothing else is read.
            if kind == "segm":
                del result["bbox"]
            else:
                result["segmentation"] = []
        found = self._coco.loadRes(results)
        evaluation = COCOeval_faster(self._coco, found, kind, print_function=lambda *_: None)
        evaluation.run()
        return evaluation
