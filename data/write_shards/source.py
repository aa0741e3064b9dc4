"""The four layouts in which ImageNet and other sets arrive, listed as arrays before any image is read.

A `Source` says where the bytes of every image of one split lie and what its label is; `data.write_shards`
reads them from there. Labels follow the sorted class names (sorted WordNet ids for ImageNet), as in
torchvision and timm; Parquet files state their own labels. Archives are walked by their tar headers, the tars
inside a tar too, at their offsets: nothing is extracted, and members that could lead outside (absolute names,
"..", links, devices) are refused.

Check: `pytest tests/test_write_shards.py`.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from repghost.errors import UserError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
SPLITS = ("train", "val")
ENTRY = np.dtype([("file", "<i8"), ("offset", "<i8"), ("size", "<i8"), ("label", "<i8"), ("group", "<i8")])


@dataclass(frozen=True)
class Source:
    """All images of one split in a fixed order; `table`: [N] of ENTRY, `keys`: N unique names.

    Image i is, by kind, "file": the file `files[file]`; "archive": its `size` bytes from `offset` on;
    "parquet": row `offset` of that file, which lies in row group `group` (counted over all files).
    """

    split: str
    kind: str
    files: list[str]
    table: np.ndarray
    keys: list[str]
    ignored: int = 0  # files that are no images by their extension

    def __len__(self) -> int:
        return len(self.keys)

    def digest(self) -> str:
        """Hex digest of what decides the order and the labels, wherever the files lie."""
        digest = hashlib.sha256("\n".join(self.keys).encode())
        digest.update(self.table["label"].tobytes())
        digest.update(self.table["group"].tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Listing:
    """A data set before it is written: class names in label order, and a source for each split."""

    classes: tuple[str, ...]
    sources: tuple[Source, ...]

    @property
    def shuffle(self) -> str:
        """How the images get into their order (`data.write_shards`): "global" or "row-groups"."""
        return "row-groups" if self.sources[0].kind == "parquet" else "global"


def _source(
    split: str,
    kind: str,
    files: list[str],
    rows: Sequence[tuple[int, ...]],
    names: list[str],
    ignored: int = 0,
) -> Source:
    """`rows` as in ENTRY; `names` are the keys with the file's extension, not yet unique."""
    return Source(split, kind, files, np.array(rows, ENTRY), _unique(names), ignored)


def _name(class_name: str, path: str) -> str:
    """ "n01440764_10026.JPEG" in class n01440764, or "cat_1.jpg" for 1.jpg in class cat."""
    return path if path.startswith(f"{class_name}_") else f"{class_name}_{path}"


def _unique(names: Sequence[str]) -> list[str]:
    """Keys from names such as "cat/a.b.jpg": "cat_a_b". webdataset ends a key at the first dot.

    Names that differ in their extension only keep it ("cat_a_b_png"); whatever still collides gets a number.
    """
    parts = [os.path.splitext(name) for name in names]
    keys = [re.sub(r"[^\w-]", "_", stem) for stem, _ in parts]
    count = Counter(keys)
    taken: set[str] = set()
    for i, (_, extension) in enumerate(parts):
        key = base = keys[i] + (f"_{extension[1:].lower()}" if count[keys[i]] > 1 else "")
        number = 2
        while key in taken:
            key, number = f"{base}_{number}", number + 1
        taken.add(key)
        keys[i] = key
    return keys


def _check_classes(where: object, classes: Sequence[str]) -> None:
    if not classes:
        raise UserError(f"{where}: no class folders in it: expected one folder of images for each class")
    if len(classes) == 1:
        raise UserError(f"{where}: only one class ({classes[0]}), so there is nothing to learn")


def _is_image(name: str) -> bool:
    return not name.startswith(".") and name.lower().endswith(IMAGE_EXTENSIONS)  # "._a.jpg" is a file of macOS


# --- folder ---------------------------------------------------------------------------------------


# --- archives -------------------------------------------------------------------------------------


# --- kaggle ---------------------------------------------------------------------------------------


# --- parquet --------------------------------------------------------------------------------------
