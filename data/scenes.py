"""The embedded data set of detection: scikit-learn's digits on its photographs, in COCO's format, without a download.

800 training and 200 validation scenes with sides of 96 to 128 pixels. Each has one to four digits, enlarged, rotated
and coloured, that do not touch; their boxes and masks are those of the ink. The digits and the parts of the photographs
that validation shows are never in training. The files go through the importer of COCO, like any other data set.
Check: `pytest tests/test_coco.py -k scenes`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.digits import VALIDATION_EVERY, prepare
from data.write_shards.coco import list_coco
from data.write_shards.write import write_shards

SCENES = {"train": 800, "val": 200}
SIDES, DIGIT_SIDES = (96, 128), (32, 64)  # pixels
MOST_DIGITS, ATTEMPTS = 4, 5  # in a scene, and to place each of them
DEGREES = 15  # of rotation, either way
TRAINING_SHARE = 0.7  # of the width of the photographs, from the left
QUALITY = 95


def prepare_scenes(cache: Path) -> Path:
    """The folder of shards `cache`/digits_scenes, written on first use while other processes wait."""

    def write(source: Path, shards: Path) -> None:
        write_scenes(source)
        write_shards(list_coco(source), shards, images_per_shard=256, workers=1, quiet=True)

    return prepare(cache, "digits_scenes", write)


def write_scenes(root: Path) -> None:
    """Writes `root`/annotations/instances_{train,val}.json and `root`/{train,val}/NUMBER.jpg into a new folder."""
    from sklearn.datasets import load_digits, load_sample_images  # slow to import, and used once

    digits, photographs = load_digits(), load_sample_images().images
    (root / "annotations").mkdir()
    for split, count in SCENES.items():
        (root / split).mkdir()
        held_out = np.arange(len(digits.target)) % VALIDATION_EVERY == VALIDATION_EVERY - 1
        numbers = np.flatnonzero(held_out == (split == "val"))
        categories = [{"id": digit, "name": str(digit)} for digit in range(10)]
        content: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}
        for scene in range(1, count + 1):
            rng = np.random.default_rng([len(split), scene])
            canvas = _background(rng, photographs[scene % len(photographs)], split == "train")
            height, width = canvas.shape[:2]
            name, masks = f"{scene:04d}.jpg", np.zeros((height, width), bool)
            wanted = int(rng.integers(1, MOST_DIGITS + 1))
            for number in rng.choice(numbers, ATTEMPTS * wanted).tolist():
                if not wanted or (mask := _draw(rng, canvas, digits.images[number], masks)) is None:
                    continue
                masks, wanted = masks | mask, wanted - 1
                annotation = {"id": len(content["annotations"]) + 1, "image_id": scene, "iscrowd": 0}
                content["annotations"].append({**annotation, "category_id": int(digits.target[number]), **_shape(mask)})
            Image.fromarray(np.rint(canvas).astype(np.uint8)).save(root / split / name, quality=QUALITY)
            content["images"].append({"id": scene, "file_name": name, "height": height, "width": width})
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))


def _background(rng: np.random.Generator, photograph: np.ndarray, training: bool) -> np.ndarray:
    """float64 [H, W, 3]: a window of one part of a photograph, at half its contrast, so that the digits stand out."""
    border = int(TRAINING_SHARE * photograph.shape[1])
    part = photograph[:, :border] if training else photograph[:, border:]
    height, width = rng.integers(SIDES[0], SIDES[1] + 1, 2).tolist()
    top, left = (int(rng.integers(0, side - s + 1)) for side, s in zip(part.shape, (height, width), strict=False))
    return 64 + part[top : top + height, left : left + width] / 2


def _draw(rng: np.random.Generator, canvas: np.ndarray, ink: np.ndarray, taken: np.ndarray) -> np.ndarray | None:
    """Draws a digit where none is; returns its mask, bool [H, W], or None where there is no room for it."""
    side = int(rng.integers(DIGIT_SIDES[0], DIGIT_SIDES[1] + 1))
    small = Image.fromarray(np.rint(ink * (255 / 16)).astype(np.uint8))  # ink is counted from 0 to 16
    angle = float(rng.uniform(-DEGREES, DEGREES))
    turned = small.resize((side, side), Image.Resampling.BICUBIC).rotate(angle, Image.Resampling.BICUBIC, expand=True)
    alpha = np.asarray(turned) / 255
    rows, columns = (np.flatnonzero((alpha > 0.5).any(axis=axis)) for axis in (1, 0))
    alpha = alpha[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    top, left = (int(rng.integers(0, side - s + 1)) for side, s in zip(taken.shape, alpha.shape, strict=True))
    window = slice(top, top + alpha.shape[0]), slice(left, left + alpha.shape[1])
    if taken[window].any():
        return None
    color = rng.uniform(0, 60, 3) if canvas[window].mean() > 128 else rng.uniform(195, 255, 3)
    canvas[window] += alpha[..., None] * (color - canvas[window])
    mask = np.zeros_like(taken)
    mask[window] = alpha > 0.5
    return mask


def _shape(mask: np.ndarray) -> dict[str, Any]:
    """COCO's bbox, area and segmentation (an uncompressed RLE) of a mask, bool [H, W]."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)).tolist() for axis in (1, 0))
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    changes = np.flatnonzero(np.diff(mask.flatten("F").astype(np.int8), prepend=0, append=2))
    counts = np.diff(changes, prepend=0).tolist()  # of 0 and 1 in turn, down the columns
    return {"bbox": box, "area": int(mask.sum()), "segmentation": {"size": [*mask.shape], "counts": counts}}
