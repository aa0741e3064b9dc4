"""A small data set in COCO's format for tests: patches of photographs with coloured shapes, each an object."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from faster_coco_eval.core import mask
from images import patch
from PIL import Image

CATEGORIES = [{"id": 7, "name": "box"}, {"id": 3, "name": "wedge"}, {"id": 90, "name": "blob"}]
COLORS = {3: (255, 0, 0), 7: (0, 255, 0), 90: (0, 0, 255)}


def make_split(root: Path, split: str, images: int, first: int) -> dict[str, Any]:
    """`root`/SPLIT2017/*.jpg and the content of their file of annotations; every fifth image has no object."""
    (root / f"{split}2017").mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": CATEGORIES}
    for number in range(first, first + images):
        image, draw = patch(number, 48, 96), np.random.default_rng(number)
        width, height = image.size
        name = f"{number:012d}.{'png' if number % 4 == 3 else 'jpg'}"
        for _ in range(0 if number % 5 == 4 else int(draw.integers(1, 4))):
            w, h = (int(draw.integers(8, 30)) for _ in range(2))
            left, top = int(draw.integers(0, width - w)), int(draw.integers(0, height - h))
            category = int(draw.choice([3, 7, 90]))
            corners = [(left, top), (left + w, top), (left + w, top + h), (left, top + h)]
            polygon = corners[:3] if category == 3 else corners
            segmentation: Any = [[float(x) for corner in polygon for x in corner]]
            shape = decoded({"segmentation": segmentation}, height, width)
            if category == 90:
                segmentation = {"size": [height, width], "counts": _runs(shape)}
            image.paste(COLORS[category], mask=Image.fromarray(shape))
            content["annotations"].append(
                {
                    "id": 1 + 100 * number + len(content["annotations"]),
                    "image_id": 10 + number,
                    "category_id": category,
                    "bbox": [float(left), float(top), float(w), float(h)],
                    "area": float(shape.sum()),
                    "iscrowd": int(category == 90 and number % 3 == 0),
                    "segmentation": segmentation,
                }
            )
        image.save(root / f"{split}2017" / name)
        content["images"].append({"id": 10 + number, "file_name": name, "width": width, "height": height})
    return content


def _runs(shape: np.ndarray) -> list[int]:
    """COCO's uncompressed RLE: lengths of runs of 0 and 1, down the columns."""
    flat = shape.flatten(order="F").astype(np.int8)
    edges = np.flatnonzero(np.diff(flat, prepend=0, append=2))
    return np.diff(edges, prepend=0).tolist()


def make_coco(root: Path, train: int = 20, val: int = 7) -> Path:
    """`root`/annotations/instances_{train,val}2017.json and their images."""
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for split, images, first in (("train", train, 0), ("val", val, train)):
        content = make_split(root, split, images, first)
        (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return root


def decoded(annotation: dict[str, Any], height: int, width: int) -> np.ndarray:
    """bool [height, width]: the mask of an annotation, by COCO's own library."""
    return mask.decode(mask.segmToRle(annotation["segmentation"], width, height)).astype(bool)
