"""The index of a split for detection: its images, and their objects as arrays.

The annotations lie in the shards, KEY.json beside KEY.jpg, as COCO's file had them; `data.write_shards` made arrays of
what training needs of them at every step.
Check: `pytest tests/test_coco.py`.
"""

import itertools
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from data.index import Index, load_indexes
from data.reader import ShardReader
from data.shards import MANIFEST, load_manifest
from data.tars import SAMPLE
from repghost.errors import UserError

# One row for each annotation, in the order of the images. box: left, top, width, height in pixels, as imported.
OBJECT = np.dtype(
    [("image", "<i8"), ("category_id", "<i8"), ("box", "<f8", 4), ("crowd", "?"), ("segmented", "?")], align=False
)


def object_row(image: int, annotation: dict[str, Any]) -> tuple[Any, ...]:
    """A row of OBJECT for one of COCO's annotations of the image in row `image` of the index."""
    segmented = bool(annotation.get("segmentation"))
    return image, annotation["category_id"], annotation["bbox"], annotation["iscrowd"] == 1, segmented


@dataclass(frozen=True, kw_only=True)
class CocoIndex(Index):
    """The images of one split and their M objects.

    image_ids: int64 [N], COCO's. records: [N] of SAMPLE, the .json member of each image. objects: [M] of OBJECT.
    """

    image_ids: np.ndarray
    records: np.ndarray
    objects: np.ndarray

    @cached_property
    def bounds(self) -> np.ndarray:
        """int64 [N + 1]: the objects of image i are those from bounds[i] to bounds[i + 1]."""
        return np.searchsorted(self.objects["image"], np.arange(len(self) + 1))

    @cached_property
    def boxes(self) -> np.ndarray:
        """float32 [M, 4]: (left, top, right, bottom) in pixels, within the image."""
        box, image = self.objects["box"], self.samples[self.objects["image"]]
        sides = np.stack([image["width"], image["height"]] * 2, axis=1)
        return np.clip(np.concatenate([box[:, :2], box[:, :2] + box[:, 2:]], axis=1), 0, sides).astype(np.float32)

    @cached_property
    def labels(self) -> np.ndarray:
        """int64 [M]: 1 + the place of the category in `classes`; 0 is the background."""
        return np.searchsorted(self.category_ids, self.objects["category_id"]) + 1

    @cached_property
    def learned(self) -> np.ndarray:
        """bool [M]: what training shows to the detector, which is no crowd region and no box without area."""
        sides = self.boxes[:, 2:] - self.boxes[:, :2]
        return ~self.objects["crowd"] & (sides > 0).all(axis=1)

    @cached_property
    def shown(self) -> np.ndarray:
        """int64 [K]: the images that have objects to learn."""
        return np.unique(self.objects["image"][self.learned])

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of images, categories and annotations: tells data sets apart, wherever they lie."""
        digest = sha256(f"{super().fingerprint} {self.category_ids}".encode())
        for array in (self.image_ids, self.records, self.objects):
            digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    @property
    def record_index(self) -> Index:
        """The .json members in place of the images, for a ShardReader."""
        return Index(self.split, self.shards, self.records, self.classes)

    def annotations(self) -> dict[str, Any]:
        """COCO's `images` (in the order of the index), `annotations` and `categories`, as they were imported.

        But an annotation's id is at least 1: COCO's evaluation takes 0 for "not found" and would give too low a figure.
        """
        reader = ShardReader(self.record_index)
        images, annotations = [], []
        for row in range(len(self)):
            record = json.loads(reader.read(row))
            annotations += [{**annotation, "image_id": record["id"]} for annotation in record.pop("annotations")]
            images.append(record)
        free = itertools.count(1 + max((annotation["id"] for annotation in annotations), default=0))
        for annotation in annotations:
            annotation["id"] = annotation["id"] if annotation["id"] > 0 else next(free)
        categories = [{"id": i, "name": name} for i, name in zip(self.category_ids, self.classes, strict=True)]
        return {"images": images, "annotations": annotations, "categories": categories}


def load_coco(root: str | Path, splits: Sequence[str], cache: str | Path) -> dict[str, CocoIndex]:
    """The indexes of `splits` of the shards in `root`, which `python -m data.write_shards coco` wrote.

    Raises UserError for whatever is missing, damaged or does not fit, and OSError for what cannot be read.
    """
    root = Path(root).expanduser()
    if root.is_dir() and not any((root / name).exists() for name in (MANIFEST, "parts/plan.json")):
        how = f"python -m data.write_shards coco {root} SHARDS writes COCO's files as shards"
        raise UserError(f"{root}: no {MANIFEST} in it: {how}, which data.root names")
    indexes, manifest = load_indexes(root, splits, cache), load_manifest(root)
    if "category_ids" not in manifest:
        raise UserError(
            f"{root}: shards without annotations: detection needs those of python -m data.write_shards coco"
        )
    return {split: _with_objects(index, root, manifest) for split, index in indexes.items()}


def _with_objects(index: Index, root: Path, manifest: dict[str, Any]) -> CocoIndex:
    path = root / manifest["splits"][index.split]["objects"]["file"]
    try:
        with np.load(path) as arrays:
            records, ids, objects = (arrays[name] for name in ("records", "ids", "objects"))
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: damaged ({error}): write the shards again") from None
    described = (
        records.dtype == SAMPLE and objects.dtype == OBJECT and records.shape == ids.shape == index.samples.shape
    )
    within = described and (np.diff(objects["image"], prepend=0, append=len(index) - 1) >= 0).all()
    if not within or not np.isin(objects["category_id"], index.category_ids).all():
        raise UserError(f"{path}: not the objects of {len(index)} images: copy it and {MANIFEST} again")
    of_images = {field.name: getattr(index, field.name) for field in fields(index)}
    return CocoIndex(**of_images, image_ids=ids, records=records, objects=objects)
