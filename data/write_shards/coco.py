"""COCO's format: annotations/instances_*.json and the images that it names, for detection and instance segmentation.

What is wrong with the file as a whole, its categories or its images is refused. An image without a file and an
annotation that cannot be used are refused, or left out up to --skip-bad. Boxes without area and boxes that reach
beyond their image are kept as they are and counted: COCO has some, the evaluation sees them, and training leaves out
the former and clips the latter.
Check: `pytest tests/test_coco.py`.
"""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from math import isfinite
from pathlib import Path, PurePosixPath
from typing import Any, TypeGuard

from PIL import Image
from tqdm import tqdm

from data.shards import SPLIT_NAMES
from data.write_shards.folder import read_files
from data.write_shards.source import Entry, Listing, Source, unique_keys
from repghost.errors import UserError, printable
from repghost.files import read_file, regular_file

FILE_BYTES = 4_000_000_000  # of instances_*.json; COCO's has 0.45 billion
FARTHEST, LARGEST = 1e5, 1e12  # of a coordinate and of an area, in pixels
KEPT = ("id", "category_id", "bbox", "area", "iscrowd", "segmentation")  # of an annotation, in the shards
Json = dict[str, Any]


def list_coco(root: str | Path, train: str | None = None, val: str | None = None, skip_bad: int = 0) -> Listing:
    """Data sets in COCO's format: boxes, masks and any category ids.

    SRC holds annotations/instances_*.json, whose names have train and val as a word (instances_train2017.json), or that
    --train and --val name. The images lie in SRC/train2017, SRC/images/train2017, SRC/train, SRC/images or SRC.
    --skip-bad also leaves out up to N annotations that cannot be used.
    """
    root = Path(root)
    files = {split: path for split, name in (("train", train), ("val", val)) if (path := _file(root, split, name))}
    if not files:
        raise UserError(
            f"{root}: no annotations/instances_train*.json or instances_val*.json in it: give COCO's folder"
        )
    categories: dict[int, str] = {}
    sources = []
    for split, path in files.items():
        content = _load(path)
        found = _categories(path, content["categories"])
        if categories and found != categories:
            differing = min(f"{i} {name}" for i, name in found.items() ^ categories.items())
            raise UserError(f"{path}: its categories are not those of train (category {differing}): make them equal")
        categories = found
        sources.append(_Reader(root, split, path, content, categories, skip_bad).source())
    return Listing(root, list(categories.values()), sources, category_ids=list(categories))


def _file(root: Path, split: str, name: str | None) -> Path | None:
    """The file with the annotations of a split; None where there is none."""
    folder = root / "annotations"
    if name is not None:
        found = [path for path in (Path(name), folder / name) if path.is_file()][:1]
        if not found:
            raise UserError(f"{folder / name}: no such file, which --{split} names")
    else:
        words = {path: re.findall(r"[^\W\d_]+", path.stem.casefold()) for path in folder.glob("instances_*.json")}
        found = sorted(path for path in words if not set(SPLIT_NAMES[split]).isdisjoint(words[path]))
    if len(found) > 1:
        names = " and ".join(path.name for path in found[:2])
        raise UserError(f"{folder}: {names} both look like {split}: name one with --{split}")
    return found[0] if found else None


def _load(path: Path) -> Json:
    """The content of a file of annotations, which has lists of the three kinds of entries."""
    try:
        content = json.loads(read_file(path, FILE_BYTES))
    except (ValueError, RecursionError) as error:  # of JSON, and of UTF-8
        raise UserError(f"{path}: damaged or not JSON ({error}): copy it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not COCO's format, whose files hold an object with images, annotations, categories")
    for key in ("images", "annotations", "categories"):
        entries = content.get(key)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path}: its {key} are missing or no list of objects: give a file in COCO's format")
        if not entries and key != "annotations":
            raise UserError(f"{path}: no {key} in it")
    return content


def _categories(path: Path, entries: Iterable[Json]) -> dict[int, str]:
    """Names by id, in the order of the ids, which is that of the labels."""
    names: dict[int, str] = {}
    for entry in entries:
        number, name = entry.get("id"), entry.get("name")
        if not _is_id(number):
            raise UserError(f"{path}: the id of a category is {number!r:.40}, not a whole number")
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise UserError(f"{path}: the name of category {number} is {name!r:.40}, not one that can be printed")
        if number in names or name in names.values():
            what = f"the id {number}" if number in names else f"the name {name}"
            raise UserError(f"{path}: two categories have {what}: give each its own")
        names[number] = name
    return dict(sorted(names.items()))


class _Reader:
    """Reads the images and annotations of one split out of the `content` of its file."""

    def __init__(
        self, root: Path, split: str, path: Path, content: Json, categories: dict[int, str], skip_bad: int
    ) -> None:
        self.root, self.split, self.path, self.content = root, split, path, content
        self.categories, self.skip_bad = categories, skip_bad
        self.counts: Counter[str] = Counter()  # of what is left out, empty or odd

    def source(self) -> Source:
        images: dict[int, Json] = {}
        for image in self.content["images"]:
            if (fault := _image_fault(image)) or image["id"] in images:
                raise self._error(
                    f"image {image.get('id')!r:.40}: {fault or 'another image has the same id'}: correct it"
                )
            images[image["id"]] = {name: image[name] for name in ("id", "file_name", "height", "width")}
        files = self._files(images)
        self._annotate(images)
        entries = [
            Entry(image["file_name"], path, -1, os.stat(path).st_size, annotations=json.dumps(image).encode())
            for number, image in images.items()
            if (path := files.get(number))
        ]
        if not entries:
            raise self._error("no image in it has a file")
        self.counts["images without annotations"] = sum(not image["annotations"] for image in images.values())
        remarks = [f"{count:,} {what}" for what, count in (+self.counts).items()]
        return Source(self.split, unique_keys(entries), read_files, remarks=remarks)

    def _files(self, images: dict[int, Json]) -> dict[int, str]:
        """The path of each image that has a file; all lie in the first folder that has any of them."""
        name = self.path.stem.removeprefix("instances_")
        folders = [
            self.root / folder for folder in (name, f"images/{name}", self.split, f"images/{self.split}", "images", "")
        ]
        folder = next(
            (f for f in folders for image in images.values() if (f / image["file_name"]).exists()), folders[0]
        )
        files: dict[int, str] = {}
        for number, image in images.items():
            path = folder / image["file_name"]
            if path.exists():
                regular_file(path)
                files[number] = str(path)
            else:
                self._leave_out("images without a file left out", f"image {number}: there is no {path}")
        return files

    def _annotate(self, images: dict[int, Json]) -> None:
        """Gives each image its `annotations`, and counts those that are odd."""
        known: set[int] = set()
        for annotated in images.values():
            annotated["annotations"] = []
        for annotation in self.content["annotations"]:
            number = annotation.get("image_id")
            image = images.get(number) if _is_id(number) else None
            if fault := _annotation_fault(annotation, image, self.categories, known):
                where = f"annotation {annotation.get('id')!r:.40} of image {number!r:.40}"
                self._leave_out("annotations that cannot be used left out", f"{where}: {fault}")
                continue
            assert image is not None, "else there is a fault"
            known.add(annotation["id"])
            image["annotations"].append({name: annotation[name] for name in KEPT if name in annotation})
            left, top, width, height = annotation["bbox"]
            beyond = max(-left, -top, left + width - image["width"], top + height - image["height"])
            self.counts["boxes without area, which training leaves out"] += min(width, height) == 0
            self.counts["boxes that reach more than a pixel beyond their image, which training clips"] += beyond > 1

    def _leave_out(self, what: str, line: str) -> None:
        """Counts what is left out; UserError once it is more than --skip-bad allows."""
        self.counts[what] += 1
        if self.counts[what] > self.skip_bad:
            raise self._error(f"{line}: correct it, or leave it out with --skip-bad")
        tqdm.write(printable(f"skipped {self.path}: {line}"), file=sys.stderr)

    def _error(self, line: str) -> UserError:
        return UserError(f"{self.path}: {line}")


def _image_fault(image: Json) -> str | None:
    """What is wrong with an entry of `images`."""
    if not _is_id(image.get("id")):
        return "its id is not a whole number"
    name, width, height = (image.get(key) for key in ("file_name", "width", "height"))
    if not isinstance(name, str) or not name.isprintable() or not PurePosixPath(name).name:
        return f"its file_name is {name!r:.40}, not the name of a file"
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return f"its file_name {name} leads out of the folder"
    limit = Image.MAX_IMAGE_PIXELS or 0
    if not _is_id(width) or not _is_id(height) or min(width, height) < 1 or width * height > limit:
        return f"its width and height are {width!r:.20} and {height!r:.20}, not those of an image"
    return None


def _annotation_fault(annotation: Json, image: Json | None, categories: dict[int, str], known: set[int]) -> str | None:
    """What makes an annotation useless; image: that it names, known: the ids before it."""
    if missing := [name for name in KEPT[:-1] if name not in annotation]:
        return f"it has no {missing[0]}"
    if not _is_id(annotation["id"]) or annotation["id"] in known:
        return "its id is that of another annotation" if _is_id(annotation["id"]) else "its id is not a whole number"
    if image is None:
        return "there is no such image"
    if not _is_id(category := annotation["category_id"]) or category not in categories:
        return f"there is no category {category!r:.40}"
    if type(annotation["iscrowd"]) is not int or annotation["iscrowd"] not in (0, 1):
        return f"its iscrowd is {annotation['iscrowd']!r:.20}, neither 0 nor 1"
    if not _are_numbers([annotation["area"]], LARGEST) or annotation["area"] < 0:
        return f"its area is {annotation['area']!r:.20}, not a number from 0 on"
    box = annotation["bbox"]
    if not _are_numbers(box) or len(box) != 4 or min(box[2:]) < 0:
        return f"its bbox is {box!s:.60}, not [left, top, width, height] in pixels"
    if box[0] >= image["width"] or box[1] >= image["height"] or box[0] + box[2] < 0 or box[1] + box[3] < 0:
        return f"its bbox {box} lies outside of the image's {image['width']} x {image['height']} pixels"
    return _segmentation_fault(annotation.get("segmentation", []), image["height"], image["width"])


def _segmentation_fault(segmentation: object, height: int, width: int) -> str | None:
    """What is wrong with polygons or a run-length encoding; an empty list stands for a box without a mask."""
    if isinstance(segmentation, list):
        for polygon in segmentation:
            if not _are_numbers(polygon):
                return "its segmentation has a polygon that is not a list of coordinates"
            if len(polygon) < 6 or len(polygon) % 2:
                return f"its segmentation has a polygon of {len(polygon)} numbers, not x and y of three points or more"
        return None
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        return "its segmentation is neither a list of polygons nor an RLE of size and counts"
    if segmentation["size"] != [height, width]:
        return f"the size of its RLE is {segmentation['size']!s:.40}, that of its image [{height}, {width}]"
    counts = segmentation["counts"]
    if isinstance(counts, str):
        from faster_coco_eval.core import mask  # slow to import, and only for this

        try:
            mask.decode(mask.segmToRle(segmentation, width, height))
        except (ValueError, RuntimeError, TypeError):
            return f"the counts of its RLE are damaged, or not those of {height * width} pixels"
        return None
    if not _are_numbers(counts, LARGEST) or not all(type(n) is int and n >= 0 for n in counts):
        return "the counts of its RLE are neither whole numbers from 0 on nor a string"
    if sum(counts) != height * width:
        return f"the counts of its RLE add up to {sum(counts)}, not to the {height * width} pixels of its image"
    return None


def _is_id(value: object) -> TypeGuard[int]:
    return type(value) is int and abs(value) < 2**63


def _are_numbers(value: object, limit: float = FARTHEST) -> TypeGuard[list[int | float]]:
    """Whether it is a list of finite numbers, up to the limit. Polygons far outside take minutes and memory to draw."""
    if not isinstance(value, list) or not set(map(type, value)) <= {int, float}:
        return False
    return not value or (min(value) >= -limit and max(value) <= limit and all(map(isfinite, value)))
